"""AgroModule: policy, reference and objective as a LightningModule with automatic optimisation."""

import contextlib
import math
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW

from agro_lightning.checkpoints.single_file import CHECKPOINT_KEY
from agro_lightning.distributed.fsdp import (
    ShardingSettings,
    clip_by_norm,
    data_rank,
    reshard,
    total_norm,
    unsharded,
)
from agro_lightning.models.batch import TokenBatch
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.head_check import check_logprobs
from agro_lightning.models.pieces import split_batch
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import adapter_summary
from agro_lightning.models.reference import (
    AdapterOffReference,
    CachedReference,
    FrozenReference,
    Reference,
    ReferenceKind,
    check_reference_id,
    frozen_copy,
)
from agro_lightning.models.routers import RouterLoad
from agro_lightning.models.sharded_loading import sharded_policy, sharded_reference
from agro_lightning.objectives import Agro, LossInputs, Objective
from agro_lightning.primitives.collectives import largest
from agro_lightning.primitives.rng import gather_rng, set_rng
from agro_lightning.primitives.stopwatch import StepTimer
from agro_lightning.training.compat import convert_loops
from agro_lightning.training.evaluation import PromptResult
from agro_lightning.training.metrics import StepResult, batch_metrics, router_metrics
from agro_lightning.training.optimizer import Bucket, OptimizerSettings, check_same, describe, in_words
from agro_lightning.training.optimizer_class import check_sharded, optimizer_class
from agro_lightning.training.step_callback import data_of
from agro_lightning.training.strategy import check_precision, check_trainer, refuse_unsharded
from agro_lightning.types import Prompt

PREFIX = "policy.lm."
"""How the module's names of parameters begin; transformers' follow."""


class AgroModule(L.LightningModule):
    """Trains a policy against a frozen reference with one objective over prompt groups.

    Args:
        policy: which causal LM is trained, and how.
        objective: the loss over groups; AGRO unless a baseline is asked for.
        optimizer: which optimiser steps the weights, and its schedule.
        reference: "frozen" (a second copy), "adapter_off" (the LoRA policy's own base), "cached" (log-probs
            that `annotate` put into the data), or "auto": adapter_off with LoRA, else frozen.
        reference_id: with "cached": the id that `annotate` printed.
        reference_reset_every: make the current policy the reference every so many steps; 0 never does.
        max_tokens: input tokens that one forward and backward may hold; larger batches are computed in slices
            with the same gradient. None: no limit.
        max_skipped_steps: stop the run after so many steps in a row were skipped for a NaN or infinity.
        temperature: the sampling temperature (linked to data.sampling.temperature).
        sharding: how policy and reference are spread over ranks, under the strategy Sharded.
    """

    def __init__(
        self,
        policy: PolicySettings = PolicySettings(),  # noqa: B008 - a dataclass of settings, read by the CLI
        objective: Objective = Agro(beta=0.02),  # noqa: B008
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        reference: ReferenceKind = "auto",
        reference_id: str | None = None,
        reference_reset_every: int = 0,
        max_tokens: int | None = None,
        max_skipped_steps: int = 10,
        temperature: float = 1.0,
        sharding: ShardingSettings = ShardingSettings(),  # noqa: B008
    ):
        super().__init__()
        for name, value, least in (
            ("reference_reset_every", reference_reset_every, 0),
            ("max_tokens", 1 if max_tokens is None else max_tokens, 1),
            ("max_skipped_steps", max_skipped_steps, 1),
        ):
            if value < least:
                raise ValueError(f"model.{name} is {value}; it must be at least {least}")
        check_reference_id(reference_id, reference, temperature)
        self.policy_settings, self.objective, self.optimizer_settings = policy, objective, optimizer
        self.reference_kind, self.cached_reference_id = reference, reference_id
        self.reference_reset_every, self.max_tokens = reference_reset_every, max_tokens
        self.max_skipped_steps, self.temperature = max_skipped_steps, temperature
        self.sharding = sharding
        self.policy: Policy | None = None
        # a plain tuple, so that nn.Module does not register the reference as a submodule (not optimised, not
        # sharded, not checkpointed)
        self._reference: tuple[Reference, ...] = ()
        self._router_load: RouterLoad | None = None
        self._slices: list[tuple[TokenBatch, Tensor, Tensor]] = []
        """(slice of the batch, its logsumexp, d loss/d log-prob) for `backward`."""
        self._reference_file: str | None = None
        self._answers: list[PromptResult] = []
        self._whole_policy = contextlib.ExitStack()
        self.timer = StepTimer()

    # ------------------------------------------------------------------ building

    def setup(self, stage: str) -> None:
        refuse_unsharded(self.trainer.strategy, self.trainer.world_size)
        check_precision(self.trainer, self.policy_settings, training=stage == "fit")
        check_trainer(self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """The step's metrics and guards come with the module, whoever builds the trainer; not where batches
        come from a loader of one's own, which counts nothing."""
        from agro_lightning.training.callbacks.non_finite import NonFiniteGuard  # which import this module
        from agro_lightning.training.callbacks.step_metrics import StepMetrics

        if data_of(self.trainer) is None:
            return []
        given = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in (StepMetrics, NonFiniteGuard) if kind not in given]

    def configure_model(self) -> None:
        """Builds policy and reference once; called by Lightning inside the strategy's context."""
        if self.policy is not None:
            return
        mesh = self.device_mesh
        if mesh is not None and self.trainer.state.fn == "fit":
            check_sharded(optimizer_class(self.optimizer_settings.class_path))
        if mesh is None:
            policy = Policy(self.policy_settings, temperature=self.temperature)
        else:
            policy = sharded_policy(
                self.policy_settings, self.sharding, mesh, self.device, temperature=self.temperature
            )
        kind = self.reference_kind
        if kind == "auto":
            kind = "adapter_off" if self.policy_settings.lora else "frozen"
        if kind == "frozen":
            reference: Reference = (
                frozen_copy(policy)
                if mesh is None
                else FrozenReference(sharded_reference(policy, self.sharding, mesh, self.device))
            )
        elif kind == "adapter_off":
            reference = AdapterOffReference(policy)
        else:
            reference = CachedReference(self.cached_reference_id or "")
        self.attach(policy, reference)
        if self.policy_settings.lora is not None:
            rank_zero_info(adapter_summary(policy.lm))

    def attach(self, policy: Policy, reference: Reference) -> None:
        """Takes a policy and a reference that are built already; configure_model then builds none."""
        self.policy, self._reference, self._router_load = policy, (reference,), RouterLoad(policy)

    @property
    def reference(self) -> Reference:
        """The frozen reference."""
        return self._reference[0]

    @property
    def world_size(self) -> int:
        """Ranks that get different data, over which gradients are averaged."""
        return self.trainer.world_size if self.device_mesh is None else data_rank(self.device_mesh).size

    def on_fit_start(self) -> None:
        if isinstance(self.reference, FrozenReference) and self.device_mesh is None:
            self.reference.to(self.device)
        assert self.policy is not None
        if self.policy_settings.attention == "flex" and self.device.type == "cpu":
            raise ValueError(
                "model.policy.attention is flex, which has no backward on a CPU; set it to auto or dense"
            )
        check_logprobs(self.policy)
        if isinstance(self.reference, FrozenReference):
            self.reference.policy.use_packing(self.policy.packing)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings, buckets = self.optimizer_settings, self._buckets()
        optimizer, schedule = settings.optimizer(buckets, self._total_steps, on_gpu=self._on_gpu())
        if len(buckets) > 1 or buckets[0].kind is not AdamW:
            rank_zero_info(f"optimiser: {in_words(describe(buckets))}")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _buckets(self) -> list[Bucket]:
        """Which optimiser steps which parameters."""
        assert self.policy is not None
        named = {name.removeprefix(PREFIX): value for name, value in self.named_parameters()}
        embeddings = (m for m in self.policy.modules() if isinstance(m, nn.Embedding))
        ends = [self.policy.head.weight, *(weight for m in embeddings for weight in m.parameters())]
        return self.optimizer_settings.plan(named, ends)

    def _on_gpu(self) -> bool:
        return next(self.parameters()).is_cuda

    def check_optimizer(self, about: dict[str, Any]) -> None:
        """Refuses a checkpoint of another optimiser, before its state is loaded; ValueError names both."""
        if self.trainer.state.fn == "fit":
            check_same(about[CHECKPOINT_KEY].get("optimizer"), describe(self._buckets()))

    def _total_steps(self) -> int:
        # asking Lightning to estimate would open the data before a checkpoint has told where it stands
        limit = self.trainer.max_steps
        return limit if limit > 0 else int(self.trainer.estimated_stepping_batches)

    def on_train_start(self) -> None:
        """A run that goes on takes the present settings: a checkpoint's optimiser brings its former ones."""
        for config in self.trainer.lr_scheduler_configs:
            assert isinstance(config.scheduler, torch.optim.lr_scheduler.LambdaLR)
            self.optimizer_settings.take_over(config.scheduler, self._buckets(), on_gpu=self._on_gpu())

    # ------------------------------------------------------------------ training

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        self.timer.start(self.device)
        ref_logprobs = self.reference_logprobs(batch)
        self.timer.end("reference", self.device)
        self._slices = []
        with self._router_load.watching() if self._router_load else contextlib.nullcontext():
            compute = self._whole if self._all_ranks_fit(batch) else self._in_slices
            result = compute(batch, ref_logprobs)
        self.last_metrics = batch_metrics(batch, result, self.sources, self.reward_names)
        self.last_metrics |= router_metrics(self._router_load)
        self.last_log_ratios = result.log_ratios
        self.timer.end("forward", self.device)
        # the loss is divided by the whole step's groups already: undo the averages of Lightning and strategy
        return result.loss * self.world_size * self.trainer.accumulate_grad_batches

    def reference_logprobs(self, batch: TokenBatch) -> Tensor:
        """(N,) reference log-probs: those of the data where they may be kept, else of this very batch, so
        that log-ratios are 0 where policy and reference are one."""
        assert self.policy is not None
        kept = self.policy.cacheable or isinstance(self.reference, CachedReference)
        known = batch.ref_logprobs if kept else None
        if known is not None and not largest(0, self.device):
            return known
        if known is None:
            largest(1, self.device)
        computed = self.reference.logprobs(batch, max_tokens=self.max_tokens)
        return computed if known is None else known

    def _whole(self, batch: TokenBatch, ref_logprobs: Tensor) -> StepResult:
        """One pass; AGRO's loss is fused with the head (unless tapered), others take its log-probs."""
        assert self.policy is not None
        objective = self.objective
        if type(objective) is Agro and not objective.taper:
            beta = objective.beta
            fused = self.policy.agro_loss(
                batch, ref_logprobs, beta=beta, negative_weight=objective.negative_weight
            )
            return StepResult(
                loss=fused.loss,
                objective=fused.objective.detach(),
                logprobs=fused.logprobs.detach(),
                ref_logprobs=ref_logprobs,
                log_ratios=fused.log_ratios.detach(),
                regularized_rewards=batch.rewards - beta * fused.log_ratios.detach(),
                advantages=-fused.coefficients.detach() * batch.num_groups,
            )
        return self._composed(batch, self.policy.logprobs(batch).logprobs, ref_logprobs)

    def _composed(self, batch: TokenBatch, logprobs: Tensor, ref_logprobs: Tensor) -> StepResult:
        out = self.objective(
            LossInputs(
                logprobs=logprobs,
                ref_logprobs=ref_logprobs,
                rewards=batch.rewards,
                sequence_ids=batch.sequence_ids,
                group_ids=batch.group_ids,
                num_groups=batch.num_groups,
                behavior_logprobs=batch.behavior_logprobs,
            )
        )
        return StepResult(
            loss=out.loss,
            objective=out.objective,
            logprobs=logprobs.detach(),
            ref_logprobs=ref_logprobs,
            log_ratios=out.log_ratios,
            regularized_rewards=out.regularized_rewards,
            advantages=out.advantages,
        )

    # ------------------------------------------------------------------ batches above the token budget

    def _all_ranks_fit(self, batch: TokenBatch) -> bool:
        return self.max_tokens is None or largest(batch.num_tokens, self.device) <= self.max_tokens

    def _in_slices(self, batch: TokenBatch, ref_logprobs: Tensor) -> StepResult:
        """Pass 1, no grad: log-probs of every slice and d loss/d log-prob; `backward` then recomputes each
        slice with these gradients."""
        assert self.policy is not None and self.max_tokens is not None
        pieces = split_batch(batch, self.max_tokens)
        slices = pieces.parts
        if max(part.num_tokens for part in slices) > self.max_tokens:  # Python shows one text once
            warnings.warn(
                f"some prompts and completions have more tokens together than model.max_tokens = "
                f"{self.max_tokens}: each is computed alone, above that limit",
                stacklevel=1,
            )
        idle = largest(len(slices), self.device) - len(slices)
        with torch.no_grad():
            measured = [self.policy.logprobs(part) for part in slices + slices[:1] * idle][: len(slices)]
        logprobs = pieces.joined([m.logprobs for m in measured]).requires_grad_()
        result = self._composed(batch, logprobs, ref_logprobs)
        (slopes,) = torch.autograd.grad(result.loss, logprobs)
        logsumexps = [m.logsumexp for m in measured]
        self._slices = list(zip(slices, logsumexps, pieces.split(slopes), strict=True))
        self._slices += [(slices[0], measured[0].logsumexp, torch.zeros_like(measured[0].logprobs))] * idle
        return result

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: the ordinary backward, or slice by slice where the batch was above the budget."""
        if not self._slices:
            loss.backward(*args, **kwargs)
        assert self.policy is not None
        for part, logsumexp, slopes in self._slices:
            (self.policy.weighted_logprobs(part, logsumexp, slopes) * self.world_size).backward()
        self._slices = []
        self.timer.end("backward", self.device)

    # ------------------------------------------------------------------ guards

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.policy is not None
        reshard(self.policy)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by global norm, and drops a step whose gradient is not finite on any rank."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        self.last_gradient_norm = norm.detach()
        self.step_skipped = not bool(torch.isfinite(norm))
        if self.step_skipped:
            for parameter in parameters:
                parameter.grad = (
                    None  # AdamW leaves parameters without a gradient, and their state, as they are
                )
        elif gradient_clip_val:
            clip_by_norm(parameters, gradient_clip_val, norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Runs the optimiser step, then resets the reference if due; must precede checkpoint callbacks."""
        super().optimizer_step(*args, **kwargs)
        every, step = self.reference_reset_every, self.trainer.global_step + 1  # the step counts from here on
        if every and step % every == 0:
            self._reset_reference(step)

    def _reset_reference(self, step: int) -> None:
        assert self.policy is not None
        self.reference.reset_to(self.policy)
        rank_zero_info(f"step {step}: the reference is now the policy (id {self.reference.reference_id})")
        if isinstance(self.reference, FrozenReference):  # checkpoints leave the reference out
            path = Path(self.trainer.default_root_dir) / f"reference-step-{step:08d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.reference.save(path)
            self._reference_file = path.name

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what resuming and exporting need besides weights; tensors and plain values only."""
        assert self.policy is not None
        config = self.policy.base.config
        generation = getattr(self.policy.base, "generation_config", None)
        checkpoint[CHECKPOINT_KEY] = {
            "policy": asdict(self.policy_settings),
            "model_config": {**config.to_dict(), "model_type": config.model_type},
            "generation_config": None if generation is None else generation.to_dict(),
            "reference_id": self.reference.reference_id,
            "reference_file": self._reference_file,
            "rng": gather_rng(),
            "optimizer": describe(self._buckets()),
        }
        if data_of(self.trainer) is not None:
            data_of(self.trainer).evict_replay()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the reference and the random generators of this rank."""
        about = checkpoint[CHECKPOINT_KEY]
        self.check_optimizer(checkpoint)
        if data_of(self.trainer) is not None and self.trainer.state.fn == "fit":
            convert_loops(checkpoint, self.trainer.accumulate_grad_batches)
        self._reference_file = about["reference_file"]
        if self._reference_file and isinstance(self.reference, FrozenReference):
            found = self._find_reference_file(self._reference_file)
            self.reference.load(found)
            here = Path(self.trainer.default_root_dir) / found.name
            if self.trainer.state.fn == "fit" and found != here:  # a new run goes on from another one's
                here.parent.mkdir(parents=True, exist_ok=True)
                self.reference.save(here)
        known = self.reference.reference_id
        if "compute_dtype" not in about["policy"]:  # ids of the version before did not name the type
            known = re.sub(r"\.\w+@", "@", known)
        if known != about["reference_id"]:
            raise ValueError(
                f"the checkpoint was trained against reference {about['reference_id']}, this run has "
                f"{self.reference.reference_id}: model.policy.path, dtype or compute_dtype, or the "
                "temperature has changed"
            )
        set_rng(about["rng"])

    def _find_reference_file(self, name: str) -> Path:
        """What a reset wrote: in this run's folder, or in that of the run that the checkpoint is from.

        Raises:
            FileNotFoundError: it is in neither.
        """
        checkpoint = Path(self.trainer.ckpt_path or "")
        folders = [Path(self.trainer.default_root_dir), checkpoint.parent.parent, checkpoint.parent]
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"the checkpoint was trained against a reset reference, and {name} is in none of "
                f"{', '.join(dict.fromkeys(map(str, folders)))}; copy it there from the folder of its run"
            )
        return found

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        assert self.policy is not None
        data_of(self.trainer).push_weights()
        self._whole_policy.enter_context(unsharded(self.policy))  # ranks may have more or fewer batches

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self._answers += data_of(self.trainer).validation.answer(batch)

    def on_validation_epoch_end(self) -> None:
        self._whole_policy.close()
        answers, self._answers = self._answers, []
        summary = data_of(self.trainer).validation.summarize(answers, data_rank(self.device_mesh))
        metrics = {f"val/{name}": value for name, value in summary.items() if not math.isnan(value)}
        # the metrics are of all ranks already: sync_dist does nothing but keep Lightning from warning
        self.log_dict(metrics, batch_size=1, rank_zero_only=True, sync_dist=True)
        # for callbacks that monitor one, which must decide alike on all ranks
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        self.log(
            "greedy",
            summary["greedy_accuracy"],
            prog_bar=True,
            logger=False,
            batch_size=1,
            rank_zero_only=True,
            sync_dist=True,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the data module's sources, for metrics by source."""
        return tuple(getattr(data_of(self.trainer), "source_names", ()))

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names of the data module's rewards, for metrics by reward."""
        return tuple(getattr(data_of(self.trainer), "reward_names", ()))
