"""Real architectures with few, random weights."""

from pathlib import Path

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

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
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "llama_tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=8),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "mistral_sliding": lambda: hf.MistralConfig(**SMALL, sliding_window=6),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "cohere": lambda: hf.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: hf.GraniteConfig(**SMALL, logits_scaling=3.0),
}

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
LONG_ROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[4.0, 8.0, 16.0, 32.0]
)

SINGLE = {
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **SMALL,
        **MOE,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    "lfm2": lambda: hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "gpt_oss": lambda: hf.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "mamba": lambda: hf.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4
    ),
    "falcon_h1": lambda: hf.FalconH1Config(
        **SMALL, **MAMBA, head_dim=8, mamba_d_ssm=64, mamba_n_groups=1, lm_head_multiplier=0.5
    ),
    "bamba": lambda: hf.BambaConfig(**SMALL, **MAMBA, attn_layer_indices=[1]),
    "jamba": lambda: hf.JambaConfig(
        **SMALL,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "rwkv": lambda: hf.RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=128
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **{**SMALL, "num_hidden_layers": 3}, head_dim=8, lru_width=32, attention_window_size=8
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: hf.MptConfig(
        vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, expansion_ratio=2
    ),
}
"""Architectures whose layers do not part the sequences of a row."""

PLAIN = {
    "gptj": lambda: hf.GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, eos_token_id=2
    ),
    "llama4_text": lambda: hf.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
    ),
}
"""Architectures whose attention cannot share a prompt."""

SHARED = {
    "phi3_longrope": lambda: hf.Phi3Config(
        **{**SMALL, "max_position_embeddings": 64},
        original_max_position_embeddings=10,
        rope_parameters=dict(LONG_ROPE),
    ),
    "llama_dynamic": lambda: hf.LlamaConfig(
        **{**SMALL, "max_position_embeddings": 8},
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
    ),
    "gemma3_text": lambda: hf.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SMALL, **MOE, head_dim=8),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
}
"""Further architectures that share prompts."""

PACKINGS = {
    **dict.fromkeys(ARCHITECTURES | SHARED, "shared"),
    **dict.fromkeys(PLAIN, "plain"),
    **dict.fromkeys(SINGLE, "single"),
}
"""What `packing: auto` comes to."""


def tiny_lm(name: str, seed: int = 0, times: float = 4.0, **changes) -> PreTrainedModel:
    """A model of the named style; its matrices, multiplied, make distributions that are far from uniform."""
    torch.manual_seed(seed)
    config = (ARCHITECTURES | SHARED | PLAIN | SINGLE)[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(times)
    return lm


def save_with_tokenizer(lm: PreTrainedModel, tokenizer, folder: Path) -> Path:
    """A local model folder as a user would have it."""
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
