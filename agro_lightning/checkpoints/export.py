"""From a checkpoint to a folder that `from_pretrained` loads."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from agro_lightning.checkpoints.files import check_checkpoint, is_sharded, read_marker, read_plain
from agro_lightning.checkpoints.safe_dcp import read_everything
from agro_lightning.checkpoints.sharded import read_rank
from agro_lightning.checkpoints.single_file import CHECKPOINT_KEY
from agro_lightning.models.compat import no_init_weights
from agro_lightning.models.config import LoraSettings
from agro_lightning.models.pretrained import add_lora, load_tokenizer, resolve_path
from agro_lightning.models.sharded_loading import parameters_on_meta
from agro_lightning.primitives.atomic_files import atomic_path
from agro_lightning.primitives.quiet import without_progress_bars

PREFIX = "policy.lm."


def export(
    ckpt: str,
    out: str,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    card: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Writes the trained policy as safetensors with config and tokenizer, without a GPU.

    A file's weights are mapped into memory, those of a folder of shards read into it.

    Args:
        ckpt: a checkpoint of a run: a file, or a folder of shards.
        out: the folder to write, new or empty; it appears whole or not at all.
        adapter_only: for a LoRA policy, write the adapter instead of the merged model.
        max_shard_size: largest safetensors file.
        tokenizer: where the tokenizer comes from, when the model that the run started from has moved.
        dtype: type of the written weights; by default the one they were trained in.
        card: makes README.md of what the checkpoint says of itself.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: `out` holds a model, or anything else.
        OSError: there is no room for it, or it cannot be written to; names what is needed.
        ValueError: the checkpoint is not one of agro-lightning's, is damaged, or has no adapter to write.
    """
    target = Path(out).expanduser()
    if (target / "config.json").exists() or (target / "adapter_config.json").exists():
        raise FileExistsError(f"{out} holds a model already; give another --out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out} is there already, and is no empty folder; give another --out")
    about, weights = read_policy(Path(ckpt).expanduser())
    lora = LoraSettings(**about["policy"]["lora"]) if about["policy"]["lora"] else None
    if adapter_only and lora is None:
        raise ValueError(f"{ckpt} has no adapter: the policy was trained whole. Leave adapter_only out")
    tokens = load_tokenizer(
        tokenizer or about["policy"]["path"], trust_remote_code=about["policy"]["trust_remote_code"]
    )
    model = build_model(weights, about["model_config"], lora)
    needed = sum(weight.nbytes for weight in weights.values())
    with atomic_path(target, needed=needed) as aside, without_progress_bars(in_logs=True):
        if adapter_only:
            _write_adapter(model, aside, about)
        else:
            if lora is not None:
                _part_tied_weights(model)
                model = model.merge_and_unload()
            if dtype is not None:
                model = model.to(getattr(torch, dtype))
            if about["generation_config"]:
                model.generation_config = GenerationConfig.from_dict(about["generation_config"])
            model.save_pretrained(aside, max_shard_size=max_shard_size)
        tokens.save_pretrained(aside)
        if card is not None:
            (aside / "README.md").write_text(card(about), encoding="utf-8")
    print(f"{ckpt} -> {target} ({'adapter' if adapter_only else 'model'} and tokenizer)")


def read_policy(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The policy in a checkpoint: what it says of settings, model and global_step, and the weights by
    transformers' names.

    Nothing but tensors and plain values is read, and no code from the checkpoint is run.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is half-written, damaged, or not one of agro-lightning's.
    """
    check_checkpoint(path)
    if is_sharded(path):
        loaded = read_rank(path, 0)
        state = read_everything(path, f"state_dict.{PREFIX}")["state_dict"]
    else:
        loaded = read_plain(path, mmap=True)
        state = loaded.get("state_dict", {})
    if CHECKPOINT_KEY not in loaded:
        raise ValueError(f"{path} was not written by agro-lightning (it has no {CHECKPOINT_KEY!r} entry)")
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    step = read_marker(path)["global_step"] if is_sharded(path) else loaded.get("global_step")
    return {**loaded[CHECKPOINT_KEY], "global_step": step}, weights


@torch.no_grad()
def _part_tied_weights(model: Any) -> None:
    """Gives the head its own weight where an adapter changes the input embedding that it shared: the policy's
    head has read the weight without the adapter."""
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(embedding, "base_layer") and head is not None and head.weight is embedding.base_layer.weight:
        head.weight = nn.Parameter(head.weight.clone())
        base.config.tie_word_embeddings = False


def _write_adapter(model: Any, target: Path, about: dict[str, Any]) -> None:
    model.save_pretrained(target, save_embedding_layers=False)
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = resolve_path(about["policy"]["path"])
    path.write_text(json.dumps(config, indent=2))


def build_model(weights: dict[str, Tensor], config: dict[str, Any], lora: LoraSettings | None) -> Any:
    """The model with the given weights, without ever making random ones."""
    with no_init_weights(), parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        model.tie_weights()
        model = model if lora is None else add_lora(model, lora)
    model.load_state_dict(weights, strict=True, assign=True)
    (model.get_base_model() if lora is not None else model).tie_weights()
    return model.eval()
