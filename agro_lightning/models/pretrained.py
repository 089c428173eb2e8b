"""A causal LM, its tokenizer and its adapters, from a local folder, the hub, or the quick start."""

import contextlib
import difflib
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agro_lightning import quickstart
from agro_lightning.models.compat import decoder_of
from agro_lightning.models.config import LoraSettings, PolicySettings

_LINEAR = nn.Linear.forward


def resolve_path(path: str) -> str:
    """The folder of the shipped quick start for "quickstart", else the path itself.

    Raises:
        FileNotFoundError: the path looks like a local folder and is not one, or holds no config.json.
    """
    if path == "quickstart":
        return str(quickstart.FOLDER / "policy")
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"model folder {path} {what}; give a folder written by save_pretrained, a hub id such "
            "as Qwen/Qwen3-0.6B, or quickstart"
        )
    return str(folder) if folder.exists() else path


@contextlib.contextmanager
def _clear_hub_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"cannot load {path}: it is no local folder, and the hub did not give it ({reason}). Download it "
            "where there is a network and set the path to the folder"
        ) from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that stands beside a model. Raises OSError naming the path when there is none."""
    with _clear_hub_errors(path):
        return AutoTokenizer.from_pretrained(resolve_path(path), trust_remote_code=trust_remote_code)


def load_lm(settings: PolicySettings) -> PreTrainedModel:
    """Loads the causal LM: safetensors only, no code from the folder unless trusted, dropout off.

    Raises:
        FileNotFoundError, OSError: the folder or hub id cannot be loaded.
    """
    path, dtype = resolve_path(settings.path), getattr(torch, settings.dtype)
    with _clear_hub_errors(settings.path):
        if settings.weights == "random":
            config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
            lm = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
        else:
            lm = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=settings.trust_remote_code
            )
    return lm.eval()


def add_lora(lm: PreTrainedModel, settings: LoraSettings) -> nn.Module:
    """Wraps the model with peft adapters.

    Raises:
        ImportError: peft is missing.
        ValueError: target_modules names no module that text passes through, or the LM head, on which the
            fused head does not express an adapter.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("policy.lora needs peft: pip install 'agro-lightning[lora]'") from error
    decoder, head = decoder_of(lm), lm.get_output_embeddings()
    reached = [name for name, module in lm.named_modules() if module is decoder or module is head]
    _check_targets(lm, settings.target_modules, reached)
    # routers that return more than a product
    odd = [n for n, m in lm.named_modules() if isinstance(m, nn.Linear) and type(m).forward is not _LINEAR]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        # a tower for images or sound: text never passes through it
        exclude_modules="|".join(
            [rf"(?!(?:{'|'.join(map(re.escape, reached))})(?:\.|$)).*", *map(re.escape, odd)]
        ),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # of the patterns that peft itself adds for experts
        warnings.simplefilter("ignore")
        adapted = get_peft_model(lm, config)
    if hasattr(lm.get_output_embeddings(), "lora_A"):
        raise ValueError(
            f"policy.lora.target_modules = {settings.target_modules!r} puts an adapter on the LM head; "
            "the fused head reads the head's weight itself. Leave the head out of target_modules"
        )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and not parameter.is_meta:
                parameter.copy_(adapter_values(name, parameter.shape))
    return adapted


def _check_targets(lm: nn.Module, targets: list[str] | str, reached: list[str]) -> None:
    """Refuses names that are no module's, with the nearest ones."""
    inside = tuple(f"{name}." for name in reached)
    names = [name for name, _ in lm.named_modules() if name in reached or name.startswith(inside)]
    if isinstance(targets, str):
        wrong = [] if targets == "all-linear" or any(re.fullmatch(targets, n) for n in names) else [targets]
    else:
        wrong = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        wrong = wrong if targets else ["[]"]
    if wrong:
        weighted = (n for n, m in lm.named_modules() if n in names and hasattr(m, "weight"))
        known = sorted({name.rpartition(".")[2] for name in weighted})
        near = difflib.get_close_matches(wrong[0], known, n=3, cutoff=0.5)
        raise ValueError(
            f"model.policy.lora.target_modules has {wrong[0]}; {type(lm).__name__} has no such module that "
            f"text passes through; {'did you mean' if near else 'it has'} {' or '.join(near or known)}"
        )


def adapter_summary(lm: nn.Module) -> str:
    """What has adapters, and how much of the model is trained."""
    owners = {name.split(".lora_A.")[0] for name, _ in lm.named_parameters() if ".lora_A." in name}
    kinds = Counter(re.sub(r"(\.base_layer)+$", "", owner).rpartition(".")[2] for owner in owners)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in lm.parameters())
    modules = ", ".join(f"{name} x {count}" for name, count in sorted(kinds.items()))
    return f"LoRA on {modules}: {trained:,} of {whole:,} parameters are trained"


def adapter_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """What an adapter's parameter starts as: peft's distributions, drawn from the run's seed and the name.

    Sharded or not, and in whatever order parameters are made, a run thus starts from the same adapters.
    """
    generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
    if "lora_embedding_B" in name:
        return torch.randn(shape, generator=generator)
    if "lora_A" in name and len(shape) > 1:
        bound = 1 / math.sqrt(math.prod(shape[1:]))  # Kaiming's uniform with a = sqrt(5)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.zeros(shape)
