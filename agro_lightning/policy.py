"""The policy: a causal LM seen as hidden states and a head; log-probs, losses and generation over packed
groups."""

import bisect
import contextlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agro_kernels import linear_agro_loss, linear_logprobs, linear_logprobs_known
from agro_lightning import attention
from agro_lightning.sharding import unsharded
from agro_lightning.types import TokenBatch


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters on the policy; needs the extra `lora` (peft)."""

    rank: int = 16
    """Rank of every adapter."""
    alpha: int = 32
    """Adapters are scaled by alpha / rank."""
    target_modules: list[str] | str = "all-linear"
    """Names of the linear layers that get adapters, or "all-linear" (all but the head)."""


@dataclass(kw_only=True)
class PolicySettings:
    """Which causal LM is trained, and how its forward pass is made."""

    path: str = "quickstart"
    """Local folder or hub id of a transformers causal LM; "quickstart" is the one that ships with the
    package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the weights are held in."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """"random" builds the architecture of `path` with fresh weights."""
    packing: Literal["auto", "shared", "plain"] = "auto"
    """"shared" computes each group's prompt once; "plain" repeats it for each completion; "auto" is shared
    where the
    start-up check finds it exact for this architecture, plain otherwise."""
    attention: Literal["auto", "dense", "flex"] = "auto"
    """How shared prompts are attended to: padded dense blocks, or flex_attention ("auto": flex on GPUs)."""
    head_backend: Literal["auto", "triton", "chunked", "reference"] = "auto"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """How the model turns h Wᵀ into logits, read off its config."""

    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, settings: PolicySettings, config: Any) -> "HeadOptions":
        """The settings' own values, else Cohere's logit_scale, Granite's logits_scaling and Gemma's
        final_logit_softcapping."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(
            logit_scale=scale if settings.logit_scale is None else settings.logit_scale,
            softcap=softcap if settings.softcap is None else settings.softcap,
        )


class TokenLogprobs(NamedTuple):
    """Per target token: log-prob and logsumexp of its logits, both fp32, at the sampling temperature."""

    logprobs: Float[Tensor, " N"]
    logsumexp: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"] | None


class GroupLoss(NamedTuple):
    """The fused AGRO loss of a batch; the fields of agro_kernels.LinearAgroLoss."""

    loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    logprobs: Float[Tensor, " N"]
    log_ratios: Float[Tensor, " B"]
    coefficients: Float[Tensor, " B"]


def resolve_path(path: str) -> str:
    """The folder of the shipped quick start for "quickstart", else the path itself.

    Raises:
        FileNotFoundError: the path looks like a local folder and is not one, or holds no config.json.
    """
    if path == "quickstart":
        return str(resources.files("agro_lightning") / "quickstart" / "policy")
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
        ValueError: adapters on the LM head, which the fused head does not express.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("policy.lora needs peft: pip install 'agro-lightning[lora]'") from error
    adapted = get_peft_model(
        lm,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
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


class Policy(nn.Module):
    """A causal LM whose log-probs come from the fused head. The FSDP root; always in eval mode, without
    dropout.

    Args:
        settings: model, packing, head.
        temperature: the sampling temperature; log-probs are of softmax(logits / temperature).
        lm: the model, where the caller built it already; by default it is loaded from settings.
    """

    def __init__(
        self, settings: PolicySettings, *, temperature: float = 1.0, lm: PreTrainedModel | None = None
    ):
        super().__init__()
        if not 0.0 < temperature < float("inf"):
            raise ValueError(
                f"the sampling temperature is {temperature}; log-probs need a positive, finite one"
            )
        base = load_lm(settings) if lm is None else lm
        self.settings, self.temperature = settings, temperature
        self.tensor_group: ProcessGroup | None = (
            None  # ranks that hold slices of each weight, set by the sharding
        )
        self.reshard_after_forward = True
        self.held = False
        self.compute_dtype: torch.dtype = base.dtype
        self.head_options = HeadOptions.of(settings, base.config)
        self.plain_attention = base.get_decoder().config._attn_implementation or "sdpa"
        if settings.gradient_checkpointing:
            for layer in self.layers_of(base):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.lm: nn.Module = add_lora(base, settings.lora) if settings.lora else base
        self.share_prompts(settings.packing != "plain")
        self.train(False)

    def share_prompts(self, shared: bool) -> None:
        """Chooses whether a packed batch computes each group's prompt once, or repeats it for each
        completion."""
        self.shared_prompts = shared
        # set for good rather than around each call, so that a checkpointed layer recomputes with the same
        # attention
        self.base.get_decoder().config._attn_implementation = (
            attention.NAME if shared else self.plain_attention
        )

    def train(self, mode: bool = True) -> "Policy":
        """Stays in eval mode: dropout would change the log-probs that the objective compares."""
        return super().train(False)

    @staticmethod
    def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers: the longest ModuleList of the decoder."""
        lists = [m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList)]
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
    def vocab_size(self) -> int:
        """Rows of the LM head; token ids must be below it."""
        return self.head.weight.shape[0]

    @property
    def max_positions(self) -> int:
        """Longest sequence (prompt and completion) of the model's config."""
        return int(getattr(self.base.config, "max_position_embeddings", None) or 2**31)

    def hidden_states(self, batch: TokenBatch) -> Float[Tensor, "N H"]:
        """The decoder's last hidden states at the places that predict the batch's targets."""
        decoder = self.base.get_decoder()
        if self.shared_prompts:
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
        rows = repeat_prompts(batch, one_row="flash" in self.plain_attention)
        out = decoder(
            input_ids=batch.input_ids[rows.places], position_ids=rows.position_ids, use_cache=False
        )
        return out.last_hidden_state.flatten(0, 1).index_select(0, rows.predictors)

    def _head(self, hidden: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        head = self.head
        weight, bias = _slice_here(head.weight), _slice_here(getattr(head, "bias", None))
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        options = dict(
            bias=bias,
            temperature=self.temperature,
            logit_scale=self.head_options.logit_scale,
            softcap=self.head_options.softcap,
            backend=self.settings.head_backend,
            vocab_group=self.tensor_group,
        )
        return (hidden, weight), options

    def logprobs(self, batch: TokenBatch, *, entropy: bool = False) -> TokenLogprobs:
        """Log-probs of the batch's targets, fp32, at the sampling temperature; differentiable."""
        tensors, options = self._head(self.hidden_states(batch))
        out = linear_logprobs(*tensors, batch.targets, entropy=entropy, **options)
        return TokenLogprobs(out.logprobs, out.logsumexp, out.entropy)

    def agro_loss(self, batch: TokenBatch, ref_logprobs: Float[Tensor, " N"], *, beta: float) -> GroupLoss:
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

    def wake(self) -> None:
        """Does nothing but count as a forward: FSDP then knows that this module is its root."""

    @contextlib.contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """Yields the model as transformers made it: no gradients, its own attention, whole weights on every
        rank."""
        config = self.base.get_decoder().config
        with torch.no_grad(), unsharded(self):
            config._attn_implementation = self.plain_attention
            try:
                yield self.lm
            finally:
                self.share_prompts(self.shared_prompts)

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The LoRA policy's own base: the reference that costs no memory."""
        with self.lm.disable_adapter():  # type: ignore[operator]
            yield


def _slice_here(weight: Any) -> Any:
    """This rank's slice of a tensor-parallel weight; any other as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class PlainRows(NamedTuple):
    """Completions with their prompts in rows, one after another, each behind its own copy of the prompt."""

    places: Int[Tensor, "rows width"]
    """The place in the packed batch whose token stands there; 0 behind a row's last sequence."""
    position_ids: Int[Tensor, "rows width"]
    """Restart at 0 with each sequence, which is how transformers tells them apart; 0 behind the last one."""
    predictors: Int[Tensor, " N"]
    """For each target, its predicting place in the rows laid end to end."""


def repeat_prompts(batch: TokenBatch, *, one_row: bool = False) -> PlainRows:
    """Plain packing: rows as wide as the longest sequence, each filled with as many as fit.

    Args:
        batch: whole groups.
        one_row: put all into a single row, for attention that needs no mask to keep sequences apart. With a
            mask, one row would take the square of all tokens.
    """
    device = batch.input_ids.device
    prompts, lengths, groups = batch.prompt_lengths, batch.completion_lengths, batch.group_ids.cpu()
    per_group = torch.zeros_like(prompts).index_add_(0, groups, lengths)
    group_starts = torch.cumsum(prompts + per_group, 0) - prompts - per_group
    within = torch.cumsum(lengths, 0) - lengths - (torch.cumsum(per_group, 0) - per_group)[groups]
    completion_starts = group_starts[groups] + prompts[groups] + within

    pieces = torch.stack([prompts[groups], lengths], 1)  # (B, 2): a prompt, then a completion
    starts = torch.stack([group_starts[groups], completion_starts], 1)
    sizes = pieces.flatten()
    offsets = torch.cumsum(sizes, 0) - sizes
    sources = torch.arange(int(sizes.sum())) + torch.repeat_interleave(starts.flatten() - offsets, sizes)

    whole = pieces.sum(1)  # (B,) tokens of each sequence
    rows, columns, width = _fill_rows(whole.tolist(), int(whole.sum() if one_row else whole.max()))
    position_ids = torch.arange(len(sources)) - torch.repeat_interleave(offsets[::2], whole)
    targets_at = torch.repeat_interleave(rows * width + columns, whole) + position_ids
    table = torch.zeros(2, (int(rows.max()) + 1) * width, dtype=torch.long)
    table[0, targets_at], table[1, targets_at] = sources, position_ids

    targets = lengths + 1
    first = torch.cumsum(targets, 0) - targets
    # the prompt's last token predicts the first target
    begins = rows * width + columns + prompts[groups] - 1
    predictors = torch.arange(int(targets.sum())) + torch.repeat_interleave(begins - first, targets)
    places, position_ids = table.view(2, -1, width).to(device)
    return PlainRows(places, position_ids, predictors.to(device))


def _fill_rows(lengths: list[int], width: int) -> tuple[Tensor, Tensor, int]:
    """Row and first column of each sequence, longest first into the fullest row that has room."""
    rows, columns = torch.empty(len(lengths), dtype=torch.long), torch.empty(len(lengths), dtype=torch.long)
    room: list[tuple[int, int]] = []  # (columns left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect.bisect_left(room, (lengths[index], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(room))
        rows[index], columns[index] = row, width - left
        bisect.insort(room, (left - lengths[index], row))
    return rows, columns, width
