"""One rank's memory and communication in a training step of many ranks, from a step on tensors without data.

Construction, sharding, forward, backward, clipping and optimiser are the trainer's own; `simulate_world` says
what is replaced. Nothing is loaded but the model's config.json.
"""

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from agro_lightning.commands.doctor.memory.fake_world import fake_ranks, fake_tensors
from agro_lightning.commands.doctor.memory.head import head_workspace
from agro_lightning.commands.doctor.memory.tracker import (
    ELSEWHERE,
    GATHERED,
    GRADIENTS,
    HEAD,
    KV_CACHE,
    OPTIMIZER,
    PARAMETERS,
    REFERENCE,
    MemoryTracker,
    Traffic,
)
from agro_lightning.distributed.fsdp import plan_meshes
from agro_lightning.models.batch import TokenBatch, pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.reference import (
    AdapterOffReference,
    CachedReference,
    FrozenReference,
    Reference,
    ReferenceKind,
)
from agro_lightning.models.sharded_loading import empty_policy, reference_settings
from agro_lightning.training.metrics import StepResult
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer_class import lowbit_bytes
from agro_lightning.types import Completion, Prompt, PromptGroup

ROLLOUT, FORWARD, BACKWARD, STEP = "rollout", "forward", "backward", "optimiser step"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one optimiser step takes on a rank, at its largest: every prompt and completion at full length."""

    ranks: int = 1
    tensor_parallel: int = 1
    gpu: bool = True
    """Estimate for a GPU: flex attention, the Triton head. Otherwise: dense attention, the chunked head."""
    groups: int
    """Prompt groups of a micro-batch."""
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    accumulate: int = 1
    clip: float | None = None
    cache_bytes: int | None = None
    """Most bytes that the rollout engine gives keys, values and logits; None: no limit."""
    sequences: int | None = None
    """Of a step's rollout; None: as many as its groups have completions."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One rank's bytes, and what it sends and receives in an optimiser step."""

    state: dict[str, int]
    """Parameters, gradients, optimiser and reference, which stay from step to step."""
    phases: dict[str, dict[str, int]]
    """Bytes by part when each phase of the step holds most."""
    head: int
    """Most bytes that the head takes by itself."""
    rollout_traffic: list[Traffic]
    step_traffic: list[Traffic]
    parameters: int
    """Elements of the whole policy."""
    offloaded: int
    """Bytes of the reference's shards in CPU memory, which count nowhere else."""

    @property
    def peak(self) -> int:
        """Most bytes of any phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def training_peak(self) -> int:
        """Most bytes of any phase but the rollout."""
        return max(sum(parts.values()) for name, parts in self.phases.items() if name != ROLLOUT)


@dataclass(kw_only=True)
class _Trainer:
    """What the module asks its trainer for."""

    world_size: int
    accumulate_grad_batches: int
    max_steps: int = 1000
    datamodule: Any = None


class _Module(AgroModule):
    """The trainer's module on parameters without data."""

    def place(self, mesh: DeviceMesh | None, workload: Workload) -> None:
        """Makes it rank 0 of the mesh, or a process of its own."""
        self._device_mesh, self._gpu = mesh, workload.gpu
        self._meshes = None if mesh is None else plan_meshes(mesh, self.sharding.replicate)
        self.trainer = _Trainer(  # type: ignore[assignment]
            world_size=workload.ranks, accumulate_grad_batches=workload.accumulate
        )
        self.policy_settings = replace(
            self.policy_settings,
            packing="shared" if self.policy_settings.packing == "auto" else self.policy_settings.packing,
            attention="flex" if workload.gpu and self.policy_settings.attention != "dense" else "dense",
        )

    def configure_model(self) -> None:
        self.policy = self._build(self.policy_settings, frozen=False)
        kind = self.reference_kind
        if kind == "auto":
            kind = "adapter_off" if self.policy_settings.lora else "frozen"
        reference: Reference
        if kind == "frozen":
            held = self.policy_settings
            if self._device_mesh is not None:
                held = reference_settings(held)
            reference = FrozenReference(self._build(held, frozen=True))
        elif kind == "adapter_off":
            reference = AdapterOffReference(self.policy)
        else:
            reference = CachedReference("simulated")
        self._reference = (reference,)

    def _build(self, settings: PolicySettings, *, frozen: bool) -> Policy:
        if self._meshes is not None:
            return empty_policy(
                settings,
                self.sharding,
                self._meshes,
                torch.device("cpu"),
                temperature=self.temperature,
                frozen=frozen,
            )
        policy = Policy(replace(settings, weights="random"), temperature=self.temperature)
        return policy.requires_grad_(not frozen)

    def _on_gpu(self) -> bool:
        return self._gpu

    def _over_ranks(self, number: int) -> int:
        return number  # simulated ranks are alike

    def _composed(self, batch: TokenBatch, logprobs: Tensor, ref_logprobs: Tensor) -> StepResult:
        """Any objective, as far as memory goes: a scalar of the log-probs and numbers for each completion."""
        per_completion = logprobs.new_empty(batch.num_completions)
        return StepResult(
            loss=(logprobs - ref_logprobs).sum(),
            objective=logprobs.new_empty(()),
            logprobs=logprobs.detach(),
            ref_logprobs=ref_logprobs,
            log_ratios=per_completion,
            regularized_rewards=per_completion,
            advantages=per_completion,
        )

    def reference_logprobs(self, batch: TokenBatch) -> Tensor:
        if isinstance(self.reference, CachedReference):
            return torch.empty(batch.targets.numel())
        return super().reference_logprobs(batch)


def simulate(module: AgroModule, workload: Workload) -> Estimate:
    """Runs one optimiser step of rank 0 on tensors without data.

    Args:
        module: gives the settings; it is not touched.
        workload: ranks, lengths and sizes.

    Raises:
        ValueError: sizes that do not divide each other, or a model that cannot be sharded so.
        OSError: the model's config cannot be loaded.
    """
    with contextlib.ExitStack() as stack:
        mesh = None
        if workload.ranks > 1:
            mesh = stack.enter_context(fake_ranks(workload.ranks, workload.tensor_parallel))
        tracker = MemoryTracker(lambda func, args: head_workspace(func, args, gpu=workload.gpu))
        batch = full_batch(workload)
        double = _double(module, mesh, workload)
        stack.enter_context(fake_tensors(tracker, workload.tensor_parallel))
        double.configure_model()
        return _Run(double, tracker, workload, batch).estimate()


def _double(module: AgroModule, mesh: DeviceMesh | None, workload: Workload) -> _Module:
    double = _Module(
        policy=module.policy_settings,
        objective=module.objective,
        optimizer=module.optimizer_settings,
        reference=cast(ReferenceKind, module.reference_kind),
        reference_id=module.cached_reference_id,
        max_tokens=module.max_tokens,
        temperature=module.temperature,
        sharding=module.sharding,
    )
    double.place(mesh, workload)
    return double


def full_batch(workload: Workload) -> TokenBatch:
    """A micro-batch at full length; the ids do not matter."""
    completion = Completion(
        completion="", completion_ids=(0,) * workload.completion_tokens, reward=0.0, policy_version=0
    )
    groups = [
        PromptGroup(
            prompt=Prompt(prompt_id=str(index), prompt="", prompt_ids=(0,) * workload.prompt_tokens),
            completions=(completion,) * workload.group_size,
        )
        for index in range(workload.groups)
    ]
    return pack_groups(groups, num_groups=workload.groups * workload.accumulate)


@dataclass
class _Run:
    """The phases of a step, in the order in which a run goes through them once it is under way."""

    module: _Module
    tracker: MemoryTracker
    workload: Workload
    batch: TokenBatch
    state: dict[str, int] = field(default_factory=dict)
    lowbit: Tensor | None = None
    """Stands for the state of an optimiser of few bits."""

    def estimate(self) -> Estimate:
        module, tracker = self.module, self.tracker
        policy = module.policy
        assert policy is not None
        held = [policy.parameters(), policy.buffers()]
        tracker.assign(PARAMETERS, [t for group in held for t in group])
        reference = module.reference
        if isinstance(reference, FrozenReference):
            offloaded = self.workload.gpu and module.sharding.offload_reference and module.device_mesh
            tracker.assign(ELSEWHERE if offloaded else REFERENCE, reference.policy.parameters())
            tracker.assign(REFERENCE, reference.policy.buffers())
        configured: Any = module.configure_optimizers()
        optimizer: torch.optim.Optimizer = configured["optimizer"]
        made = [value for state in optimizer.state.values() for value in state.values()]  # with the optimiser
        tracker.assign(OPTIMIZER, [value for value in made if isinstance(value, Tensor)])
        with tracker:
            self._first_state(optimizer)
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._has_gradient)
            with tracker.phase(ROLLOUT, GATHERED), policy.generating():
                pass
            self._pass(optimizer)
            with tracker.phase(STEP, OPTIMIZER):
                self._step(optimizer)
        return self._results(policy)

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.tracker.assign(GRADIENTS, [parameter.grad])

    def _first_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the optimiser's state and leaves gradients, as the step before would."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with self.tracker.phase("before", OPTIMIZER):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            size = lowbit_bytes(type(optimizer), [parameter.numel() for parameter in parameters])
            if size is None:
                optimizer.step()
            else:  # its step is compiled, or written in CUDA
                self.lowbit = torch.empty(size, dtype=torch.uint8)
            self.tracker.assign(GRADIENTS, [p.grad for p in parameters if p.grad is not None])
        self.state = {part: self.tracker.now[part] for part in (PARAMETERS, GRADIENTS, OPTIMIZER, REFERENCE)}

    def _pass(self, optimizer: torch.optim.Optimizer) -> None:
        """Forward and backward of all micro-batches, with Lightning's moment of freeing gradients."""
        for part in range(self.workload.accumulate):
            with self.tracker.phase(FORWARD):
                loss = self.module.training_step(self.batch, part) / self.workload.accumulate
            if part == 0:
                optimizer.zero_grad()
            with self.tracker.phase(BACKWARD):
                self.module.backward(loss)
                del loss

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self.module.on_before_optimizer_step(optimizer)
        self.module.configure_gradient_clipping(optimizer, self.workload.clip, "norm")
        if self.lowbit is None:
            optimizer.step()

    def _results(self, policy: Policy) -> Estimate:
        phases = {name: self.tracker.peak(name) for name in (ROLLOUT, FORWARD, BACKWARD, STEP)}
        phases[ROLLOUT][KV_CACHE] += self._cache_bytes(policy)
        return Estimate(
            state=self.state,
            phases=phases,
            head=self.tracker.highest(HEAD),
            offloaded=self.tracker.now[ELSEWHERE],
            rollout_traffic=self.tracker.traffic([ROLLOUT]),
            step_traffic=self.tracker.traffic([FORWARD, BACKWARD, STEP]),
            parameters=sum(parameter.numel() for parameter in policy.parameters()),
        )

    def _cache_bytes(self, policy: Policy) -> int:
        """Keys, values and logits of a rollout's rows, all in flight at full length up to the limit."""
        load, config = self.workload, policy.base.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = policy.compute_dtype.itemsize
        token = 2 * config.num_hidden_layers * heads // load.tensor_parallel * width * item
        row = (load.prompt_tokens + load.completion_tokens) * token + 20 * policy.vocab_size
        sequences = load.sequences or load.groups * load.accumulate * load.group_size
        wanted = sequences * row
        return wanted if load.cache_bytes is None else min(wanted, load.cache_bytes)
