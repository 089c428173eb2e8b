"""Real architectures with few, random weights."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    max_position_embeddings=128,
)

ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama_tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "mistral_sliding": lambda: MistralConfig(**SMALL, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=3.0),
}


def tiny_lm(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of the named style; weights are large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return lm


def save_with_tokenizer(lm: PreTrainedModel, tokenizer, folder: Path) -> Path:
    """A local model folder as a user would have it."""
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
