"""A causal LM, its tokenizer and its adapters, from a local folder, the hub, or the quick start."""

import contextlib
import difflib
import logging
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_log

from agro_lightning import quickstart
from agro_lightning.models import smollm2
from agro_lightning.models.compat import decoder_of
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.primitives.quiet import without_progress_bars

_LINEAR = nn.Linear.forward


def resolve_path(path: str) -> str:
    """The folder of "quickstart" or "calculator" in the package, of "smollm2" in the cache, else the path
    itself.

    Raises:
        ImportError: "smollm2" is not installed.
        FileNotFoundError: the path looks like a local folder and is not one, or holds no config.json.
    """
    if path in quickstart.POLICIES:
        return str(quickstart.FOLDER / quickstart.POLICIES[path])
    if path == smollm2.NAME:
        return str(smollm2.model_folder())
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "does not exist" if not folder.exists() else "is a file"
        raise FileNotFoundError(
            f"model folder {path} {'has no config.json' if folder.is_dir() else what}; give a folder written "
            "by save_pretrained, a hub id such as Qwen/Qwen3-0.6B, quickstart, calculator, or smollm2"
        )
    return str(folder) if folder.exists() else path


@contextlib.contextmanager
def explained(path: str, part: str) -> Iterator[None]:
    """Turns what transformers and safetensors say of a folder or hub id into one line that names it.

    Raises:
        OSError: a file cannot be read, or the hub does not give it.
        ImportError: the model's code needs a package.
        ValueError: everything else that is wrong with the folder.
    """
    resolved, shown = resolve_path(path), transformers_log.get_verbosity()
    transformers_log.set_verbosity(logging.CRITICAL)
    try:
        with without_progress_bars(in_logs=True):
            yield
    except (FileNotFoundError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        reason = words.split(". ")[0].rstrip(".")[:200] or type(error).__name__
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            reason = f"{type(error).__name__} {reason}"
        elif "instantiate the backend tokenizer" in words:
            reason = "it has no tokenizer.json"
        elif kind := re.search(r"Unrecognized configuration class <class '[\w.]*\.(\w+)Config'>", words):
            reason = f"{kind[1]} is no causal language model"
        elif "trust_remote_code" in words:
            reason = "it needs code of its own; read that, then set model.policy.trust_remote_code: true"
        if isinstance(error, ImportError):
            raise ImportError(f"the {part} of {path} needs a package: {reason}") from error
        if Path(resolved).is_dir():
            kind_of = OSError if isinstance(error, OSError) else ValueError
            raise kind_of(f"the {part} of model folder {path} cannot be loaded: {reason}") from error
        if not isinstance(error, OSError):
            raise ValueError(f"the {part} of {path} cannot be loaded: {reason}") from error
        raise OSError(
            f"cannot load {path}: it is no local folder, and the hub did not give it ({reason}). Download it "
            "where there is a network and set the path to the folder"
        ) from error
    finally:
        transformers_log.set_verbosity(shown)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that is beside a model. Raises what `explained` does."""
    with explained(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(resolve_path(path), trust_remote_code=trust_remote_code)


def vocabulary_size(path: str, *, trust_remote_code: bool = False) -> int:
    """Rows of a model's embedding by its config, without its weights. Raises what `explained` does."""
    with explained(path, "config"):
        config: Any = AutoConfig.from_pretrained(resolve_path(path), trust_remote_code=trust_remote_code)
        return int(config.get_text_config().vocab_size)


def load_lm(settings: PolicySettings) -> PreTrainedModel:
    """Loads the causal LM: safetensors only, no code from the folder unless trusted, dropout off.

    Raises:
        FileNotFoundError, OSError, ImportError, ValueError: the folder or hub id cannot be loaded, or the
            weights are not those of the config.
    """
    path, dtype = resolve_path(settings.path), getattr(torch, settings.dtype)
    trusted = settings.trust_remote_code
    with explained(settings.path, "model"):
        if settings.weights == "random":
            config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted).eval()
        require_safetensors(settings.path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trusted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their shapes
        )
    lm, about = loaded
    for name, held, wanted in sorted(about["mismatched_keys"]):
        raise ValueError(
            f"model folder {settings.path}: {name} has shape {tuple(held)}; the config makes it "
            f"{tuple(wanted)}. Config and weights are not of one model"
        )
    if missing := sorted(about["missing_keys"]):  # transformers would draw them at random
        raise ValueError(
            f"model folder {settings.path} has no weights for {missing[0]} ({len(missing)} such); config and "
            "weights are not of one model"
        )
    _check_configs(settings.path, lm)
    return lm.eval()


def _check_configs(path: str, lm: PreTrainedModel) -> None:
    """Refuses values that transformers takes and that nothing can work with."""
    layers = getattr(lm.config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(
            f"model folder {path}: num_hidden_layers in config.json is {layers!r}; 1 or more are needed"
        )
    ends = getattr(lm.generation_config, "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [ends]
    if not all(end is None or isinstance(end, int) for end in ids):
        raise ValueError(
            f"model folder {path}: eos_token_id in generation_config.json is {ends!r}; a token id or a list "
            "of them is needed"
        )


def require_safetensors(path: str) -> None:
    """Raises FileNotFoundError where a local folder has no safetensors weights, and says what it has."""
    folder = Path(resolve_path(path))
    if folder.is_dir() and not any(folder.glob("*.safetensors*")):
        others = sorted(f.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for f in folder.glob(kind))
        has = f"only {others[0]}" if others else "no weights"
        raise FileNotFoundError(
            f"model folder {path} has {has}; weights are loaded from safetensors alone, in which no code can "
            "hide. Load the folder once with transformers where you trust it, and save_pretrained it"
        )


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
        with contextlib.suppress(re.error):
            if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names):
                return
        wrong = [targets]
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
