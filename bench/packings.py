"""Which packing every causal-LM architecture of the installed transformers gets, from a tiny model of each.

    python -m bench.packings            # writes docs/packings.md, in about five minutes on one core

A config is made small by setting whatever sizes it has. Where that makes no consistent model, the
architecture is listed as not tried: such a model is checked at the start of a run like any other.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "critical"

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.head_check import HeadMismatchError, PackingMismatchError, check_logprobs
from agro_lightning.models.policy import Policy

OUT = Path(__file__).parents[1] / "docs" / "packings.md"
SECONDS, PARAMETERS = 60, 8e6
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "lru_width"), 32
    ),
    **dict.fromkeys(("word_embed_proj_dim",), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "mlp_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "time_step_rank"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("head_dim", "sliding_window", "attention_window_size", "chunk_size", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_chunk_size", "linear_key_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict(vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, is_decoder=True),
    **dict(num_key_value_heads=2, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1),
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_value_head_dim=8),
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 8},
}
"""Where the defaults of a config class leave out what its published models have."""
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"num_hidden_layers": None, "num_layers": None},
    {"num_key_value_heads": None},
)


def small_config(kind: str, changes: dict[str, Any]) -> Any:
    """A config of the type with few parameters.

    Raises:
        Exception: whatever the config says of sizes that do not fit each other.
    """
    known = CONFIG_MAPPING[kind]().to_dict()
    sizes = {k: v for k, v in {**SIZES, **changes}.items() if k in known and v is not None}
    if isinstance(known.get("layer_types"), list) and "num_hidden_layers" in sizes:
        sizes["layer_types"] = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] *= 1 if len(sizes["layer_types"]) > 1 else 2
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    config = CONFIG_MAPPING[kind](**sizes | OVERRIDES.get(kind, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count:,} parameters")
    return config


def packing_of(kind: str) -> str:
    """The packing, "refused" where the check says so, or "not tried"."""
    reason = ""
    for changes in ATTEMPTS:
        try:
            config = small_config(kind, changes)
            torch.manual_seed(0)
            lm = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in lm.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(6.0)  # freshly drawn ones hide what sequences do to each other
            policy = Policy(PolicySettings(), lm=lm)
            check_logprobs(policy)
            return policy.packing
        except (HeadMismatchError, PackingMismatchError):
            return "refused"
        except TimeoutError:  # of the alarm
            raise
        except Exception as error:  # a config that cannot be made small in this way; the next may
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    print(f"{kind} was not tried: {reason}", file=sys.stderr)
    return "not tried"


def main() -> None:
    logging.disable(logging.CRITICAL)

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    found: dict[str, list[str]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        signal.alarm(SECONDS)
        try:
            packing = packing_of(kind)
        except TimeoutError:
            packing = "not tried"
        finally:
            signal.alarm(0)
        found.setdefault(packing, []).append(kind)
    lines = [
        "# Which packing an architecture gets",
        "",
        "Made by `python -m bench.packings`; see [Models](models.md#packing).",
        "",
    ]
    for packing, said in (
        ("shared", "Each group's prompt is computed once"),
        ("plain", "Prompts are repeated, several sequences in a row"),
        ("single", "One sequence a row"),
        ("refused", "Refused: no causal language model, or a head that is more than a product"),
        ("not tried", "Not tried: no small model of it was made"),
    ):
        names = found.get(packing, [])
        lines += [f"**{said}** (`{packing}`, {len(names)}): {', '.join(sorted(names)) or 'none'}", ""]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
