"""Which model is the policy, and how its forward pass is made: the settings under `model.policy`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters on the policy; needs the extra `lora` (peft)."""

    rank: int = 16
    """Rank of every adapter."""
    alpha: int = 32
    """Adapters are scaled by alpha / rank."""
    target_modules: list[str] | str = "all-linear"
    """Names of the linear layers that get adapters, or "all-linear" (all but the head)."""

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise ValueError(f"model.policy.lora.{name} is {value}; it must be at least 1")


@dataclass(kw_only=True)
class PolicySettings:
    """Which causal LM is trained, and how its forward pass is made."""

    path: str = "quickstart"
    """Local folder or hub id of a transformers causal LM; "quickstart" is the one that ships with the
    package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the weights are held in; float16 gives log-probs and rollouts, but does not train."""
    compute_dtype: Literal["bfloat16", "float16"] | None = None
    """Type that every forward of policy and reference computes in, rollouts included; None: that of `dtype`.

    dtype float32 and compute_dtype bfloat16 are mixed precision: fp32 weights, gradients and optimiser. One
    device enters autocast; under the strategy Sharded the weights are gathered in this type."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds the architecture of `path` with fresh weights."""
    packing: Literal["auto", "shared", "plain", "single"] = "auto"
    """"shared" computes each group's prompt once; "plain" repeats it for each completion, several sequences a
    row; "single" gives each sequence a row of its own; "auto" is the first of these that the start-up check
    finds exact for this architecture."""
    attention: Literal["auto", "dense", "flex"] = "auto"
    """How shared prompts are attended to: padded dense blocks, or flex_attention ("auto": flex on GPUs)."""
    head_backend: Literal["auto", "triton", "gluon", "chunked", "reference"] = "auto"
    """Implementation of the fused head (kernels/README.md)."""
    logit_scale: float | None = None
    """What logits are multiplied with, where the model's config does not say it; None: as the config says."""
    softcap: float | None = None
    """Cap of the logits (softcap * tanh(logits / softcap)); None: as the config says."""
    lora: LoraSettings | None = None
    """Train low-rank adapters only; the reference is then the same model with the adapters off."""
    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""

    def __post_init__(self) -> None:
        if self.dtype != "float32" and self.compute_dtype not in (None, self.dtype):
            raise ValueError(
                f"model.policy.compute_dtype is {self.compute_dtype} and dtype is {self.dtype}; such weights "
                "compute in their own type. Leave compute_dtype out, or set dtype: float32"
            )
