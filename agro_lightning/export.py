"""From a checkpoint to a folder that `AutoModelForCausalLM.from_pretrained` loads."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from agro_lightning.checkpoint import CHECKPOINT_KEY
from agro_lightning.policy import LoraSettings, add_lora, load_tokenizer, resolve_path


def export(
    ckpt: str, out: str, adapter_only: bool = False, max_shard_size: str = "5GB", tokenizer: str | None = None
) -> None:
    """Writes the trained policy as safetensors with config and tokenizer.

    Args:
        ckpt: a checkpoint of a run.
        out: the folder to write; must not hold a model already.
        adapter_only: for a LoRA policy, write the adapter instead of the merged model.
        max_shard_size: largest safetensors file.
        tokenizer: where the tokenizer comes from, when the model that the run started from has moved.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: `out` holds a model.
        ValueError: the checkpoint is not one of agro-lightning's, or has no adapter to write.
    """
    target = Path(out)
    if (target / "config.json").exists() or (target / "adapter_config.json").exists():
        raise FileExistsError(f"{out} holds a model already; give another --out")
    weights, about = read_policy(ckpt)
    lora = LoraSettings(**about["policy"]["lora"]) if about["policy"]["lora"] else None
    if adapter_only and lora is None:
        raise ValueError(f"{ckpt} has no adapter: the policy was trained whole. Leave adapter_only out")
    source = tokenizer or about["policy"]["path"]
    tokens = load_tokenizer(source, trust_remote_code=about["policy"]["trust_remote_code"])
    model = build_model(weights, about["model_config"], lora)
    if lora is not None and not adapter_only:
        model = model.merge_and_unload()
    if not adapter_only and about["generation_config"]:
        model.generation_config = GenerationConfig.from_dict(about["generation_config"])
    model.save_pretrained(target, max_shard_size=max_shard_size)
    if adapter_only:
        _name_base(target / "adapter_config.json", resolve_path(about["policy"]["path"]))
    tokens.save_pretrained(target)
    print(f"{ckpt} -> {target} ({'adapter' if adapter_only else 'model'} and tokenizer)")


def read_policy(ckpt: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The policy's weights, by the names of its transformers model, and what the checkpoint says about it.

    Nothing but tensors and plain values is read, and weights stay on disk until they are used.
    """
    path = Path(ckpt)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {ckpt} does not exist; look into the run's folder checkpoints/")
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if CHECKPOINT_KEY not in loaded:
        raise ValueError(f"{ckpt} was not written by agro-lightning (it has no {CHECKPOINT_KEY!r} entry)")
    prefix = "policy.lm."
    weights = {
        name.removeprefix(prefix): value
        for name, value in loaded["state_dict"].items()
        if name.startswith(prefix)
    }
    return weights, loaded[CHECKPOINT_KEY]


def build_model(weights: dict[str, torch.Tensor], config: dict[str, Any], lora: LoraSettings | None) -> Any:
    """The model with the given weights, without ever making random ones."""
    model_config = AutoConfig.for_model(**config)
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_config(model_config)
        if lora is not None:
            model = add_lora(model, lora)
    model.load_state_dict(weights, strict=True, assign=True)
    (model.get_base_model() if lora is not None else model).tie_weights()
    return model.eval()


def _name_base(path: Path, base: str) -> None:
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2))
