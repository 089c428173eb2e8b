"""From a checkpoint to a folder that `from_pretrained` loads, one file's worth at a time."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from agro_lightning.checkpoints.weights_reader import PolicySource, open_policy
from agro_lightning.models.config import LoraSettings
from agro_lightning.models.pretrained import add_lora, load_tokenizer, resolve_path
from agro_lightning.models.sharded_loading import parameters_on_meta

log = logging.getLogger(__name__)


def export(
    ckpt: str,
    out: str,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Writes the trained policy as safetensors with config and tokenizer, without a GPU.

    At most one file's worth of weights is in memory at a time.

    Args:
        ckpt: a checkpoint of a run: a file, or a folder of shards.
        out: the folder to write; must not hold a model already.
        adapter_only: for a LoRA policy, write the adapter instead of the merged model.
        max_shard_size: largest safetensors file.
        tokenizer: where the tokenizer comes from, when the model that the run started from has moved.
        dtype: type of the written weights; by default the one they were trained in.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: `out` holds a model.
        ValueError: the checkpoint is not one of agro-lightning's, or has no adapter to write.
    """
    target = Path(out)
    if (target / "config.json").exists() or (target / "adapter_config.json").exists():
        raise FileExistsError(f"{out} holds a model already; give another --out")
    source = open_policy(ckpt)
    about = source.about
    lora = LoraSettings(**about["policy"]["lora"]) if about["policy"]["lora"] else None
    if adapter_only and lora is None:
        raise ValueError(f"{ckpt} has no adapter: the policy was trained whole. Leave adapter_only out")
    tokens = load_tokenizer(
        tokenizer or about["policy"]["path"], trust_remote_code=about["policy"]["trust_remote_code"]
    )
    target.mkdir(parents=True, exist_ok=True)
    if adapter_only:
        assert lora is not None
        _write_adapter(source, target, lora)
    else:
        _write_model(source, target, lora, max_shard_size, None if dtype is None else getattr(torch, dtype))
    tokens.save_pretrained(target)
    print(f"{ckpt} -> {target} ({'adapter' if adapter_only else 'model'} and tokenizer)")


def _write_model(
    source: PolicySource,
    target: Path,
    lora: LoraSettings | None,
    max_shard_size: str,
    dtype: torch.dtype | None,
) -> None:
    """Weights first and config.json last: a folder with a config is a whole model."""
    empty = _empty_model(source.about["model_config"], None)
    names = {_plain_name(name): name for name in source.shapes if "lora_" not in name}
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}  # of tied ones
    merge = _Merge(source, empty, lora)
    # an adapter on one of two tied weights parts them
    parted = {id(parameter) for name, parameter in parameters.items() if merge.changes(name)}
    outline: dict[str, Tensor] = {}
    for name in empty.state_dict():
        parameter = parameters.get(name)
        if parameter is not None:
            names.setdefault(name, names.get(first[id(parameter)]) or name)
            if first[id(parameter)] != name and id(parameter) not in parted:
                continue
        if name in names:
            outline[name] = source.shapes[names[name]].to(dtype)
    if set(revert_weight_conversion(empty, dict(outline))) != set(outline):
        log.warning(
            "%s is written under other names than it is trained under; the whole model is built in memory",
            type(empty).__name__,
        )
        model = build_model(source.read(list(source.shapes)), source.about["model_config"], lora)
        model = model.merge_and_unload() if lora is not None else model
        (model if dtype is None else model.to(dtype)).save_pretrained(target, max_shard_size=max_shard_size)
    else:
        _write_shards(source, target, outline, names, merge, max_shard_size)
    generation = source.about["generation_config"]
    if generation:
        GenerationConfig.from_dict(generation).save_pretrained(target)
    config: Any = empty.config
    config.architectures = [type(empty).__name__]
    if any(first[id(parameters[name])] != name for name in outline if name in parameters):
        config.tie_word_embeddings = False
    config.dtype = next(iter(outline.values())).dtype
    config.save_pretrained(target)


def _write_shards(
    source: PolicySource,
    target: Path,
    outline: dict[str, Tensor],
    names: dict[str, str],
    merge: "_Merge",
    max_shard_size: str,
) -> None:
    split = split_torch_state_dict_into_shards(
        outline, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, members in split.filename_to_tensors.items():
        weights = source.read([names[name] for name in members])
        ready = {
            name: merge(name, weights[names[name]]).to(outline[name].dtype).contiguous() for name in members
        }
        save_file(ready, target / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def _plain_name(name: str) -> str:
    """The name of a weight in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


class _Merge:
    """Adds a layer's adapter to its weight: W + alpha / rank * B A, computed in fp32."""

    def __init__(self, source: PolicySource, empty: nn.Module, lora: LoraSettings | None):
        self._source, self._empty, self._lora = source, empty, lora

    def _adapter(self, name: str) -> tuple[str, str] | None:
        """Names of A and B for a weight; None where it has no adapter."""
        module, _, kind = name.rpartition(".")
        if self._lora is None or kind != "weight":
            return None
        for low, high in (
            ("lora_A.default.weight", "lora_B.default.weight"),
            ("lora_embedding_A.default", "lora_embedding_B.default"),
        ):
            if f"base_model.model.{module}.{low}" in self._source.shapes:
                return f"base_model.model.{module}.{low}", f"base_model.model.{module}.{high}"
        return None

    def changes(self, name: str) -> bool:
        """Whether the weight has an adapter."""
        return self._adapter(name) is not None

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        adapter = self._adapter(name)
        if adapter is None or self._lora is None:
            return weight
        parts = self._source.read(list(adapter))
        low, high = (parts[part].float() for part in adapter)
        delta = self._lora.alpha / self._lora.rank * (high @ low)
        return (weight.float() + (delta.T if self._transposed(name.rpartition(".")[0]) else delta)).to(
            weight.dtype
        )

    def _transposed(self, module: str) -> bool:
        """Embeddings, and GPT-2's Conv1D, hold the transpose of a linear layer's weight."""
        return type(self._empty.get_submodule(module)).__name__ in ("Conv1D", "Embedding")


def _write_adapter(source: PolicySource, target: Path, lora: LoraSettings) -> None:
    model = _empty_model(source.about["model_config"], lora)
    adapter = source.read([name for name in source.shapes if "lora_" in name])
    model.load_state_dict(adapter, strict=False, assign=True)
    model.save_pretrained(target, save_embedding_layers=False)
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = resolve_path(source.about["policy"]["path"])
    path.write_text(json.dumps(config, indent=2))


def _empty_model(config: dict[str, Any], lora: LoraSettings | None) -> Any:
    """The architecture without weights; its buffers are real."""
    with no_init_weights(), parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        model.tie_weights()
        return model if lora is None else add_lora(model, lora)


def build_model(weights: dict[str, Tensor], config: dict[str, Any], lora: LoraSettings | None) -> Any:
    """The model with the given weights, without ever making random ones."""
    model = _empty_model(config, lora)
    model.load_state_dict(weights, strict=True, assign=True)
    (model.get_base_model() if lora is not None else model).tie_weights()
    return model.eval()
