"""One run of `bench.off_policy`: the trainer itself, on data of a given kind."""

import logging
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.data.sources import Live, Offline, Source
from agro_lightning.models.config import PolicySettings
from agro_lightning.objectives import Agro, Grpo, Objective, RegularizedPG, RlooFrozenKL
from agro_lightning.rewards import ExactMatch, Reward
from agro_lightning.rollout import AutoEngine, Generation, RolloutEngine, Sampling
from agro_lightning.training.callbacks.non_finite import NonFiniteError, NonFiniteGuard
from agro_lightning.training.callbacks.step_metrics import StepMetrics
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings
from agro_lightning.types import Prompt
from bench.off_policy_objectives import Topr, WeightedRegularizedPG
from bench.off_policy_task import SAMPLING, measure, single_logged

OBJECTIVES: dict[str, Callable[[float, float], Objective]] = {
    "agro": lambda beta, weight: Agro(beta, negative_weight=weight),
    "agro_taper": lambda beta, weight: Agro(beta, negative_weight=weight, taper=True),
    "rloo_frozen_kl": lambda beta, weight: RlooFrozenKL(beta),
    "grpo": lambda beta, weight: Grpo(beta),
    "grpo_no_std": lambda beta, weight: Grpo(beta, scale_rewards=False),
    "regularized_pg": lambda beta, weight: (
        RegularizedPG(beta) if weight == 1 else WeightedRegularizedPG(beta, weight)
    ),
    "topr": lambda beta, weight: Topr(beta),
}
"""From beta and the weight of negatives, which AGRO's and regularized_pg read."""
NEEDS_EVERY_LOGPROB = ("rloo_frozen_kl", "topr")
"""Trained on the weaker policy's log-probs of its whole buffer, the right answers in it included."""
LAGS = {"live": 0, "stale4": 4, "stale16": 16, "stale64": 64, "half": 0, "single_logged": 0, "stale256": 256}
"""How many updates old the weights are that generate, by kind of data; the other kinds generate nothing."""
DATA = ("live", "stale4", "stale16", "stale64", "offline_reference", "offline_other", "half", "single_logged")
KINDS = (*DATA, "half_reference", "stale256")
"""With half_reference, half live and half from the reference, which only `bench.real_offline` asks for, and
stale256, which only `bench.long_staleness` does."""
Measure = Callable[[Any, Any, Sequence[Prompt], int], dict[str, float]]
"""A policy's figures: from its module, its tokenizer, prompts, and the number of samples of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    objective: str
    data: str
    learning_rate: float
    beta: float
    negative_weight: float = 1.0
    seed: int
    steps: int
    measure_at: tuple[int, ...]
    samples: int = 2
    """Samples of each validation prompt for the KL; 0 leaves it out."""
    prompts: int = 16
    """Prompt groups of a step."""
    group_size: int = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What runs train, on which task, and how they measure it."""

    folder: Path
    """Where the buffers are."""
    policy: PolicySettings
    train: PromptSettings
    validation: PromptSettings
    sampling: Sampling
    measure: Measure
    rewards: Sequence[Reward] = (ExactMatch(),)
    warmup_steps: int = 10
    schedule: Literal["constant", "cosine"] = "cosine"
    clip: float = 0.5
    """Largest norm of the gradient."""


def arithmetic(task: Path) -> Subject:
    """The small policy and the arithmetic of `prepare`."""

    def figures(module: Any, tokenizer: Any, prompts: Sequence[Prompt], samples: int) -> dict[str, float]:
        return measure(module.policy, module.reference.policy, tokenizer, prompts, samples=samples)

    return Subject(
        folder=task,
        policy=PolicySettings(path=str(task / "policy")),
        train=PromptSettings(path=str(task / "train.jsonl")),
        validation=PromptSettings(path=str(task / "val.jsonl")),
        sampling=SAMPLING,
        measure=figures,
    )


class StaleEngine(RolloutEngine):
    """Generates with the policy's weights of `lag` updates ago: at first, with those of the start.

    Args:
        lag: updates.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._engine = AutoEngine()
        self._kept: deque[tuple[int, list[Tensor]]] = deque()
        self._parameters: list[Tensor] = []

    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the engine to the policy, whose weights it will keep copies of."""
        self._engine.attach(policy, tokenizer)
        self._parameters = [p for p in policy.parameters() if p.requires_grad]

    def update_weights(self, policy_version: int) -> int:
        """Keeps the new weights; returns the version of those that generate."""
        self._kept.append((policy_version, [p.detach().clone() for p in self._parameters]))
        while len(self._kept) > 1 and self._kept[1][0] <= policy_version - self.lag:
            self._kept.popleft()
        return self._kept[0][0]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        """Generates with the old weights."""
        with self._swapped():
            return self._engine.generate(prompts, sampling, n=n, seed=seed)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        current = [parameter.data for parameter in self._parameters]
        try:
            for parameter, old in zip(self._parameters, self._kept[0][1], strict=True):
                parameter.data = old
            yield
        finally:
            for parameter, value in zip(self._parameters, current, strict=True):
                parameter.data = value

    def close(self) -> None:
        """Frees the copies."""
        self._kept.clear()
        self._engine.close()


class Watch(Callback):
    """Measures accuracy and KL after some steps, and notes the staleness that the trainer logs."""

    def __init__(self, run: Run, measure: Measure, others: Mapping[str, Sequence[Prompt]]) -> None:
        self.steps, self.samples, self.others = frozenset(run.measure_at), run.samples, others
        self.measure = measure
        self.points: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wanted = ("train/staleness_min", "train/staleness_max")
        logged = trainer.callback_metrics
        self.logged.append({name: float(logged[name]) for name in wanted if name in logged})
        if trainer.global_step in self.steps:
            self.points.append({"step": trainer.global_step} | self.figures(trainer, pl_module))

    def figures(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        """What is measured of the policy as it is, on the validation prompts and on the others."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = self.measure(module, data.tokenizer, list(data.val_prompts), self.samples)
        for name, prompts in self.others.items():
            figures = self.measure(module, data.tokenizer, prompts, self.samples)
            found |= {f"{name}/{metric}": value for metric, value in figures.items()}
        return found


def sources_of(run: Run, task: Path) -> list[Source]:
    """Where the run's groups come from."""
    scored = "other_scored" if run.objective in NEEDS_EVERY_LOGPROB else "other"
    other = Offline(paths=[str(task / scored)], repeat=True, name="other")
    reference = Offline(paths=[str(task / "reference")], repeat=True, name="reference")
    if run.data in ("offline_reference", "half_reference"):
        return [reference] if run.data == "offline_reference" else [Live(), reference]
    if run.data == "offline_other":
        return [other]
    if run.data == "single_logged":
        logged = single_logged(task, scored=run.objective in NEEDS_EVERY_LOGPROB)
        return [Live(weight=run.group_size - 1), Offline(paths=[str(logged)], name="logged")]
    return [Live(), other] if run.data == "half" else [Live()]


def data_of(run: Run, subject: Subject) -> AgroDataModule:
    """The run's data module."""
    if run.data not in KINDS:
        raise ValueError(f"data is {run.data!r}; accepted are {', '.join(KINDS)}")
    lag = LAGS.get(run.data, 0)
    engine: RolloutEngine = StaleEngine(lag) if lag else AutoEngine()
    return AgroDataModule(
        train=subject.train,
        validation=subject.validation,
        sources=sources_of(run, subject.folder),
        rewards=subject.rewards,
        batch_size=run.prompts,
        group_size=run.group_size,
        sampling=subject.sampling,
        engine=engine,
        mixing="within_group" if run.data == "single_logged" else "per_group",
        zero_reward_rollouts=0,
        seed=run.seed,
    )


@contextmanager
def quietly() -> Iterator[None]:
    """One thread, and nothing on the screen but what is wrong; afterwards everything is as it was."""
    names = "lightning.pytorch", "lightning.fabric", "agro_lightning"
    loggers = [logging.getLogger(name) for name in names]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    torch.set_num_threads(1)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def train(
    run: Run, task: Path, others: Mapping[str, Sequence[Prompt]] = MappingProxyType({})
) -> dict[str, Any]:
    """Makes the run on the task in the folder that `prepare` filled; see :func:`train_subject`."""
    return train_subject(run, arithmetic(task), others)


@quietly()
def train_subject(
    run: Run, subject: Subject, others: Mapping[str, Sequence[Prompt]] = MappingProxyType({})
) -> dict[str, Any]:
    """Makes the run.

    Args:
        run: its settings.
        subject: the policy and its task.
        others: prompts, besides the validation prompts, to measure on, by name; figures get it as a prefix.

    Returns:
        The run's settings; `points`, the figures after some steps; the `staleness_min` and
        `staleness_max` that the trainer logged of each step; `seconds` and `processor_seconds`; and
        `stopped`, why it ended early.
    """
    started, processor = time.perf_counter(), time.process_time()
    L.seed_everything(run.seed, verbose=False)
    module = AgroModule(
        policy=subject.policy,
        objective=OBJECTIVES[run.objective](run.beta, run.negative_weight),
        optimizer=OptimizerSettings(
            learning_rate=run.learning_rate, warmup_steps=subject.warmup_steps, schedule=subject.schedule
        ),
    )
    watch, stopped = Watch(run, subject.measure, others), None
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=run.steps,
            max_epochs=-1,
            gradient_clip_val=subject.clip,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[StepMetrics(), NonFiniteGuard(), watch],
        )
        try:
            trainer.fit(module, datamodule=data_of(run, subject))
        except NonFiniteError as error:
            stopped = str(error)
            lasting = watch.figures(trainer, module)  # skipped steps change nothing
            done = {point["step"] for point in watch.points}
            watch.points += [{"step": step} | lasting for step in run.measure_at if step not in done]
    return {
        "run": asdict(run),
        "points": watch.points,
        "staleness_min": [logged.get("train/staleness_min") for logged in watch.logged],
        "staleness_max": [logged.get("train/staleness_max") for logged in watch.logged],
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "stopped": stopped,
    }
