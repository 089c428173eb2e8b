"""The policy: a causal LM seen as hidden states and a head; log-probs, losses and generation over packed
groups."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from agro_kernels import linear_agro_loss, linear_logprobs, linear_logprobs_known
from agro_lightning.distributed.fsdp import common_forwards, unsharded
from agro_lightning.models import packed_attention as attention
from agro_lightning.models.batch import TokenBatch, repeat_prompts, select_sequences
from agro_lightning.models.compat import attention_name, decoder_of, set_attention
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.frozen_casts import keep_casts
from agro_lightning.models.pieces import like_lengths
from agro_lightning.models.positions import LengthClasses, joined
from agro_lightning.models.pretrained import add_lora, load_lm
from agro_lightning.primitives.dtensor import local_part


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """How the model turns h Wᵀ into logits, read off its config."""

    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, settings: PolicySettings, config: Any) -> "HeadOptions":
        """The settings' own values, else those of the config, which multimodal models keep in text_config."""
        text = config.get_text_config(decoder=True)

        def said(*names: str) -> float | None:
            found = [value for name in names if (value := getattr(text, name, None))]
            return float(found[0]) if found else None

        scale = said("logit_scale", "lm_head_multiplier", "output_multiplier") or 1.0
        divisor = said("logits_scaling") or 1.0
        scale = scale * divisor if text.model_type == "hyperclovax" else scale / divisor
        softcap = said("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        return cls(
            logit_scale=scale if settings.logit_scale is None else settings.logit_scale,
            softcap=softcap if settings.softcap is None else settings.softcap,
        )


Packing = Literal["shared", "plain", "single"]


class TokenLogprobs(NamedTuple):
    """Per target token: log-prob and logsumexp of its logits, both fp32, at the sampling temperature."""

    logprobs: Float[Tensor, " N"]
    logsumexp: Float[Tensor, " N"]


class GroupLoss(NamedTuple):
    """The fused AGRO loss of a batch; the fields of agro_kernels.LinearAgroLoss."""

    loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    logprobs: Float[Tensor, " N"]
    log_ratios: Float[Tensor, " B"]
    coefficients: Float[Tensor, " B"]


class Policy(nn.Module):
    """A causal LM whose log-probs come from the fused head. The FSDP root; always in eval mode, without
    dropout.

    Args:
        settings: model, packing, head.
        temperature: the sampling temperature; log-probs are of softmax(logits / temperature).
        lm: the model, where the caller built it already; by default it is loaded from settings.
        autocast: compute in settings.compute_dtype by autocast; False where FSDP casts the parameters.
    """

    def __init__(
        self,
        settings: PolicySettings,
        *,
        temperature: float = 1.0,
        lm: PreTrainedModel | None = None,
        autocast: bool = True,
    ):
        super().__init__()
        if not 0.0 < temperature < float("inf"):
            raise ValueError(
                f"the sampling temperature is {temperature}; log-probs need a positive, finite one"
            )
        base = load_lm(settings) if lm is None else lm
        # cuDNN's attention builds a plan for each new shape, in tenths of a second; rollouts and packed
        # batches have new shapes all the time. For good, as recomputation must choose alike.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.settings, self.temperature = settings, temperature
        self.tensor_group: ProcessGroup | None = (
            None  # ranks that hold slices of each weight, set by the sharding
        )
        self.reshard_after_forward = True
        self.held = False
        chosen = settings.compute_dtype
        self.compute_dtype: torch.dtype = base.dtype if chosen is None else getattr(torch, chosen)
        self.autocasts = autocast and self.compute_dtype != base.dtype
        self.head_options = HeadOptions.of(settings, base.config)
        self.length_classes = LengthClasses.of(base.config)
        self.plain_attention = attention_name(decoder_of(base))
        if settings.gradient_checkpointing:
            for layer in self.layers_of(base):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if self.autocasts:
            for module in {id(m): m for m in (base, decoder_of(base))}.values():
                module.forward = _autocasting(module.forward, self.compute_dtype)
        self.lm: nn.Module = add_lora(base, settings.lora) if settings.lora else base
        if self.autocasts and settings.lora:
            keep_casts(decoder_of(base), self.compute_dtype)
        self.use_packing("shared" if settings.packing == "auto" else settings.packing)
        self.train(False)

    def use_packing(self, packing: Packing) -> None:
        """Chooses how a batch is laid out; see PolicySettings.packing."""
        self.packing: Packing = packing
        # set for good and not around each call: a checkpointed layer recomputes with the same attention
        set_attention(self.decoder, attention.NAME if packing == "shared" else self.plain_attention)

    def train(self, mode: bool = True) -> "Policy":
        """Stays in eval mode: dropout would change the log-probs that the objective compares."""
        return super().train(False)

    @staticmethod
    def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers: the longest ModuleList of the decoder."""
        lists = [m for m in decoder_of(lm).modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"{type(lm).__name__} has no list of decoder layers; such a model cannot be sharded or "
                "checkpointed layer by layer"
            )
        return max(lists, key=len)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, adapters inside where there are any."""
        return self.lm.get_base_model() if self.settings.lora else self.lm  # type: ignore[operator,return-value]

    @property
    def decoder(self) -> Any:
        """The part of the model below the head."""
        return decoder_of(self.base)

    @property
    def layers(self) -> nn.ModuleList:
        return self.layers_of(self.base)

    @property
    def head(self) -> nn.Linear:
        """The LM head, whose weight the fused kernels read."""
        head = self.base.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.base).__name__} has no LM head; give a causal language model")
        return cast(nn.Linear, head)

    @property
    def cacheable(self) -> bool:
        """Whether a completion's log-probs may be kept for another batch: fp32 ones move by 1e-6 with the
        batch that they are computed in, those of half precision by 0.01."""
        return self.compute_dtype.itemsize >= 4

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head; token ids must be below it."""
        return self.head.weight.shape[0]

    @property
    def max_positions(self) -> int:
        """Longest sequence (prompt and completion) of the model's config."""
        return context_length(self.base.config)

    def hidden_states(self, batch: TokenBatch) -> Float[Tensor, "N H"]:
        """The decoder's last hidden states at the places that predict the batch's targets."""
        if self.length_classes is None and self.packing != "single":
            return self._hidden_states(batch)
        rows = [list(range(batch.num_sequences))]
        if self.length_classes is not None:
            rows = self.length_classes.parts(batch)
        if self.packing == "single":  # each sequence is padded to the longest beside it
            rows = like_lengths(batch, rows)
        parts = [batch] if len(rows) == 1 else [select_sequences(batch, members) for members in rows]
        idle = common_forwards(self, len(parts)) - len(parts)
        found = [self._hidden_states(part) for part in parts]
        hidden = found[0] if len(rows) == 1 else joined(found, rows, batch)
        for _ in range(idle):  # the collectives of other ranks' forwards and backwards
            hidden = hidden + 0 * self._hidden_states(parts[0]).sum()
        return hidden

    def _hidden_states(self, batch: TokenBatch) -> Float[Tensor, "N H"]:
        decoder = self.decoder
        if self.length_classes is not None:
            self.length_classes.forget(decoder)
        if self.packing == "shared":
            flex = self.settings.attention == "flex" or (
                self.settings.attention == "auto" and batch.input_ids.is_cuda
            )
            out = decoder(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                packed_layout=attention.plan_layout(batch, flex=flex),
            )
            return out.last_hidden_state[0].index_select(0, batch.predictors)
        alone = self.packing == "single"
        kind = "single" if alone else "one" if "flash" in self.plain_attention else "full"
        rows = repeat_prompts(batch, rows=kind)
        # alone in their rows, sequences need no positions, which some models do not take
        positions = {} if alone else {"position_ids": rows.position_ids}
        out = decoder(input_ids=batch.input_ids[rows.places], use_cache=False, **positions)
        return out.last_hidden_state.flatten(0, 1).index_select(0, rows.predictors)

    def _head(self, hidden: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        head = self.head
        hidden, weight = hidden.to(self.compute_dtype), local_part(head.weight).to(self.compute_dtype)
        bias = getattr(head, "bias", None)
        bias = None if bias is None else local_part(bias).to(self.compute_dtype)
        options = dict(
            bias=bias,
            temperature=self.temperature,
            logit_scale=self.head_options.logit_scale,
            softcap=self.head_options.softcap,
            backend=self.settings.head_backend,
            vocab_group=self.tensor_group,
        )
        return (hidden, weight), options

    def head_logprobs(self, hidden: Float[Tensor, "N H"], targets: Int[Tensor, " N"]) -> TokenLogprobs:
        """Log-probs of targets, fp32, at the sampling temperature; differentiable."""
        tensors, options = self._head(hidden)
        out = linear_logprobs(*tensors, targets, **options)
        return TokenLogprobs(out.logprobs, out.logsumexp)

    def logprobs(self, batch: TokenBatch) -> TokenLogprobs:
        """Log-probs of the batch's targets, fp32, at the sampling temperature; differentiable."""
        return self.head_logprobs(self.hidden_states(batch), batch.targets)

    def agro_loss(
        self,
        batch: TokenBatch,
        ref_logprobs: Float[Tensor, " N"],
        *,
        beta: float,
        negative_weight: float = 1.0,
    ) -> GroupLoss:
        """The AGRO loss of whole groups, fused with the head (agro_kernels.linear_agro_loss)."""
        tensors, options = self._head(self.hidden_states(batch))
        out = linear_agro_loss(
            *tensors,
            batch.targets,
            batch.sequence_ids,
            ref_logprobs,
            batch.rewards,
            batch.group_ids,
            beta=beta,
            negative_weight=negative_weight,
            num_groups=batch.num_groups,
            **options,
        )
        return GroupLoss(out.loss, out.objective, out.logprobs, out.log_ratios, out.coefficients)

    def weighted_logprobs(
        self, batch: TokenBatch, logsumexp: Float[Tensor, " N"], coefficients: Float[Tensor, " N"]
    ) -> Float[Tensor, ""]:
        """A scalar whose gradient is that of sum(coefficients * logprobs), without a second pass of the head.

        Args:
            logsumexp: from an earlier pass with the same weights.
            coefficients: of each target token, known from that pass.
        """
        tensors, options = self._head(self.hidden_states(batch))
        return linear_logprobs_known(*tensors, batch.targets, logsumexp, coefficients, **options)

    def trigger_lazy_init(self) -> None:
        """No-op forward that triggers FSDP2's lazy initialisation with this module as root."""

    @contextlib.contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """Yields the model as transformers made it: no gradients, its own attention, whole weights on every
        rank."""
        # Around the whole rollout too: autocast keeps its casts of the weights until the outermost exit.
        cast = _autocast(self.base, self.compute_dtype) if self.autocasts else contextlib.nullcontext()
        with torch.no_grad(), unsharded(self), cast:
            set_attention(self.decoder, self.plain_attention)
            try:
                yield self.lm
            finally:
                self.use_packing(self.packing)

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The LoRA policy's own base: the reference that costs no memory."""
        with self.lm.disable_adapter():  # type: ignore[operator]
            yield


def _autocasting(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """A module's forward under autocast, whoever calls it and in whatever thread; can be deep-copied."""
    wrapped = partial(_forward_under_autocast, forward, dtype)
    wrapped.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined] - read by `generate`
    return wrapped


def _forward_under_autocast(forward: Any, dtype: torch.dtype, /, *args: Any, **kwargs: Any) -> Any:
    with _autocast(forward.__self__, dtype):
        return forward(*args, **kwargs)


def _autocast(lm: PreTrainedModel, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(lm.device.type, dtype=dtype)


def context_length(config: Any) -> int:
    """Longest sequence that a model's config allows; of a multimodal one, its text model's."""
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return int(next((value for name in names if (value := getattr(text, name, None))), 2**31))
