"""What watches a run: metrics by step, the non-finite guard, sample tables, the reward curve, the summary."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from agro_lightning.metrics_file import MetricsFile
from agro_lightning.module import AgroModule
from agro_lightning.rollout.gap import LogprobGap, check_logprob_gap
from agro_lightning.sharded_checkpoint import newest_checkpoint
from agro_lightning.types import TokenBatch

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a NaN or an infinity."""


def run_dir(trainer: L.Trainer) -> Path:
    """The folder of this run: metrics, checkpoints, samples, replay buffer."""
    return Path(trainer.default_root_dir)


def last_checkpoint(trainer: L.Trainer) -> str:
    """Path of the newest checkpoint of this run, or "none" in words."""
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    return path or "none was saved yet"


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints between optimiser steps, the last two and that of the run's end; see ModelCheckpoint."""

    def __init__(self, folder: Path, every: int, keep: int = 2):
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            save_top_k=keep,
            monitor="step",
            mode="max",
            save_last="link",
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # never within a step: the gradient of its first micro-batches would be lost
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        """Moves the link in one step: killed in between, a run would find no checkpoint and start anew."""
        if trainer.is_global_zero:
            target, aside = Path(linkpath), Path(linkpath).with_name(".last.tmp")
            aside.unlink(missing_ok=True)
            aside.symlink_to(os.path.relpath(filepath, target.parent))
            aside.replace(target)
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """What --ckpt_path last means: the newest complete one, wherever the link points."""
        assert self.dirpath is not None
        newest = newest_checkpoint(Path(self.dirpath))
        return set() if newest is None else {str(newest)}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class StepMetrics(Callback):
    """Averages a step's micro-batches and ranks, and logs them with times, throughput and memory."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []
        self._tokens = 0
        self._skipped = 0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.resume_at(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AgroModule)
        pl_module.phases.end("optimizer", pl_module.device)
        self._parts.append(pl_module.last_metrics)
        self._tokens += batch.targets.numel()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._skipped += int(pl_module.step_skipped)
        now = time.perf_counter()
        rollout = trainer.datamodule.take_rollout_metrics()  # type: ignore[attr-defined]
        elapsed, self._started = now - self._started, now
        drawn = rollout.get("seconds/draw", 0.0)
        metrics = _mean_over_ranks(self._parts, pl_module.device)
        metrics |= rollout | pl_module.phases.take()
        metrics |= {
            "gradient_norm": float(pl_module.last_gradient_norm),
            "skipped_steps": float(self._skipped),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds/step": elapsed,
            "seconds/train": elapsed - drawn,
            "tokens_per_second/train": self._tokens / max(elapsed - drawn, 1e-9),
            "peak_memory_bytes": float(_peak_memory(pl_module.device)),
        }
        if generated := rollout.get("rollout_tokens"):
            metrics["tokens_per_second/rollout"] = generated / max(rollout.get("seconds/generate", 0.0), 1e-9)
        self._parts, self._tokens = [], 0
        _check_gap(trainer, metrics)
        _log(trainer, {f"train/{name}": value for name, value in metrics.items()})
        pl_module.log_dict(
            {"reward": metrics["reward"], "tokens/s": metrics["tokens_per_second/train"]},
            prog_bar=True,
            logger=False,
            batch_size=1,
        )


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Hands a step's metrics to the loggers, and to callbacks that monitor one.

    LightningModule.log would do the same, at half a millisecond of the processor a metric.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every and trainer.global_step % every == 0:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step - 1)
            logger.save()


def _check_gap(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Stops on all ranks alike when engine and trainer disagree; the metrics are those of all ranks."""
    if "logprob_gap_mean" not in metrics:
        return
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    gap = LogprobGap(
        tokens=1,
        mean_abs=metrics["logprob_gap_mean"],
        max_abs=metrics["logprob_gap_max"],
        completion_mean_abs=math.nan,
        completion_max_abs=metrics.get("logprob_gap_completion_max", math.nan),
    )
    check_logprob_gap(gap, data.max_logprob_gap, sampling=data.sampling, engine=type(data.engine).__name__)


def _mean_over_ranks(parts: list[dict[str, Tensor]], device: torch.device) -> dict[str, float]:
    """Means over micro-batches and ranks, NaN left out; maxima and minima stay what they say."""
    names = list(parts[0])
    values = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).double()
    known = ~values.isnan()
    sums = torch.cat([values.nan_to_num(0.0).sum(0), known.double().sum(0)]).to(device, torch.float32)
    largest = values.nan_to_num(-math.inf).amax(0).to(device, torch.float32)
    smallest = values.nan_to_num(math.inf).amin(0).to(device, torch.float32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    total, count = sums.chunk(2)
    mean = torch.where(count > 0, total / count, torch.nan)
    out = dict(zip(names, mean.tolist(), strict=True))
    for i, name in enumerate(names):
        if count[i] > 0 and name.endswith(("_max", "_min")):
            out[name] = float((largest if name.endswith("_max") else smallest)[i])
    return {name: value for name, value in out.items() if not math.isnan(value)}


def _peak_memory(device: torch.device) -> int:
    """Most bytes that this rank has held: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class NonFiniteGuard(Callback):
    """Names and saves the prompts behind a skipped step; stops the run when too many steps in a row are
    skipped."""

    def __init__(self) -> None:
        self._batches: list[tuple[TokenBatch, Tensor]] = []
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row = state_dict["in_a_row"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AgroModule)
        self._batches.append((batch, pl_module.last_log_ratios))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        batches, self._batches = self._batches, []
        if not pl_module.step_skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        step = trainer.global_step
        suspects = [suspect for batch, log_ratios in batches for suspect in _suspects(batch, log_ratios)]
        finite = not any(suspect["non_finite"] for suspect in suspects)
        named = suspects if finite else [suspect for suspect in suspects if suspect["non_finite"]]
        folder = run_dir(trainer) / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:08d}-rank-{trainer.global_rank}.json"
        path.write_text(json.dumps(named, indent=1))
        prompts = ", ".join(dict.fromkeys(suspect["prompt_id"] for suspect in named[:5]))
        what = "the gradient of the step with" if finite else "log-probs of"
        log.warning(
            "step %d skipped on all ranks: %s prompts %s%s are not finite; saved to %s",
            step,
            what,
            prompts,
            " ..." if len(named) > 5 else "",
            path,
        )
        if self._in_a_row >= pl_module.max_skipped_steps:
            raise NonFiniteError(
                f"{self._in_a_row} steps in a row were not finite (the last one: prompts {prompts}); "
                f"last good checkpoint: {last_checkpoint(trainer)}. Lower the learning rate, or look "
                f"at {folder}"
            )


def _suspects(batch: TokenBatch, log_ratios: Tensor) -> list[dict[str, Any]]:
    """The batch's completions, with whether a log-prob of each (policy's or reference's) is NaN or
    infinite."""
    bad = ~torch.isfinite(log_ratios)
    groups, lengths = batch.group_ids.tolist(), (batch.completion_lengths + 1).tolist()
    ids = [piece.tolist() for piece in batch.targets.split(lengths)]
    return [
        {
            "prompt_id": batch.prompt_ids[groups[i]],
            "source": batch.sources[i],
            "completion_ids": ids[i],
            "reward": float(batch.rewards[i]),
            "non_finite": flag,
        }
        for i, flag in enumerate(bad.tolist())
    ]


class SampleTable(Callback):
    """Writes a few scored completions as a text table to TensorBoard and to samples.md.

    Args:
        every: steps between tables.
        rows: completions in a table.
    """

    def __init__(self, every: int = 50, rows: int = 8) -> None:
        self.every, self.rows = every, rows

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % (trainer.accumulate_grad_batches * self.every):
            return
        groups = trainer.datamodule.last_groups  # type: ignore[attr-defined]
        pairs = [(group, completion) for group in groups[: self.rows] for completion in group.completions[:2]]
        lines = ["| prompt | completion | reward | finish | source |", "|---|---|---|---|---|"]
        lines += [
            f"| {_cell(group.prompt.prompt)} | {_cell(completion.completion)} | {completion.reward:g} "
            f"| {completion.finish_reason} | {completion.source} |"
            for group, completion in pairs[: self.rows]
        ]
        table = "\n".join(lines)
        with (run_dir(trainer) / "samples.md").open("a") as handle:
            handle.write(f"## step {trainer.global_step}\n\n{table}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", table, trainer.global_step)


def _cell(text: str, width: int = 200) -> str:
    """Text that cannot break a Markdown table."""
    text = text.replace("|", "\\|").replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


class Summary(Callback):
    """Measures accuracy before and after, prints the table, writes summary.json and the reward curve."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._seconds_before = 0.0
        self._completions_before = 0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._seconds_before = state_dict["before"], state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()
        rank_zero_info(trainer.datamodule.describe())  # type: ignore[attr-defined]
        if not self._before:
            self._before = trainer.datamodule.evaluate()  # type: ignore[attr-defined]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        after = trainer.datamodule.evaluate()  # type: ignore[attr-defined]
        completions = trainer.datamodule.completions_of_all_ranks()  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._write(trainer, after, completions)

    def _write(self, trainer: L.Trainer, after: dict[str, float], completions: int) -> None:
        keys = ("greedy_accuracy", "sampled_accuracy")
        folder = run_dir(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        summary = {
            "before": {key: self._before[key] for key in keys},
            "after": {key: after[key] for key in keys},
            "steps": trainer.global_step,
            "seconds": self._elapsed(),
            "completions": completions,
            "run_dir": str(folder),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        for logger in trainer.loggers:
            logger.save()
        if (folder / "metrics.csv").exists():
            plot_rewards(folder / "metrics.csv", folder / "reward.png")
        rows = [f"{key.replace('_', ' '):<18} {self._before[key]:>8.3f} {after[key]:>8.3f}" for key in keys]
        rank_zero_info(
            "\n".join(
                [
                    "",
                    f"{'':<18} {'before':>8} {'after':>8}",
                    *rows,
                    "",
                    f"{summary['steps']} steps, {summary['completions']} completions, "
                    f"{summary['seconds']:.0f} s",
                    f"run folder   {folder}",
                    f"TensorBoard  tensorboard --logdir {folder}",
                ]
            )
        )


def plot_rewards(metrics: Path, out: Path) -> None:
    """Draws the reward of each source, and the validation accuracies, against the step."""
    import csv

    from matplotlib.figure import Figure

    with metrics.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = [
        name
        for name in (rows[0] if rows else {})
        if name.startswith("train/reward/") or name in ("val/greedy_accuracy", "val/sampled_accuracy")
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            style = "o-" if name.startswith("val/") else "-"
            axes.plot(
                *zip(*points, strict=True),
                style,
                label=name.removeprefix("train/"),
                linewidth=1.2,
                markersize=3,
            )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward, accuracy")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(out, dpi=150)
