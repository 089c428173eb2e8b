"""What is reached of transformers that is not its documented interface, in one place."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights as no_init_weights
from transformers.utils.hub import cached_file


def decoder_of(lm: PreTrainedModel) -> Any:
    """The module that turns token ids into the hidden states that the head reads.

    Raises:
        ValueError: the architecture names none.
    """
    decoder = lm.get_decoder()
    if decoder is lm or not hasattr(decoder, "config"):  # Llama 4; ModernBERT, whose head is its `decoder`
        found = [getattr(lm, name, None) for name in ("model", "transformer", "backbone")]
        decoder = next((inner for inner in found if isinstance(inner, nn.Module) and inner is not lm), None)
    if decoder is None:
        raise ValueError(f"{type(lm).__name__} names no decoder; give a causal language model")
    return decoder


def attention_name(decoder: Any) -> str:
    """The attention implementation that the decoder's layers look up."""
    return decoder.config._attn_implementation or "sdpa"


def set_attention(decoder: Any, name: str) -> None:
    """Changes it, without transformers' check of what the architecture declares."""
    decoder.config._attn_implementation = name


def takes_flash_attention(lm: Any) -> bool:
    """Whether the architecture declares that it works with flash attention."""
    return bool(lm._supports_flash_attn)


def file_of(folder: str, name: str) -> Path | None:
    """A file of a model folder or hub id; None where there is none of that name."""
    found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
