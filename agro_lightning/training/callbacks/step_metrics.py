"""What watches every step of a run: its metrics, and the guard against steps that are not finite."""

import json
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto import event_pb2
from torch import Tensor

from agro_lightning.distributed.fsdp import DataRank, data_rank
from agro_lightning.models.batch import TokenBatch
from agro_lightning.rollout.logprob_gap import LogprobGap, check_logprob_gap
from agro_lightning.training.callbacks.csv_log import MetricsFile
from agro_lightning.training.checkpointing import last_checkpoint, run_dir
from agro_lightning.training.metrics import Tally, combined, plain_tallies

if TYPE_CHECKING:
    from agro_lightning.training.module import AgroModule

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a NaN or an infinity."""


class StepMetrics(Callback):
    """Puts a step's micro-batches and ranks together, and logs them with times, throughput and memory."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tally]] = []
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
            elif isinstance(logger, TensorBoardLogger) and trainer.global_step and trainer.is_global_zero:
                _forget_from(logger, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "AgroModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.phases.end("optimizer", pl_module.device)
        self._parts.append(pl_module.last_metrics)
        self._tokens += batch.targets.numel()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._skipped += int(pl_module.step_skipped)
        now = time.perf_counter()
        amounts = trainer.datamodule.take_rollout_metrics()  # type: ignore[attr-defined]
        for name, seconds in pl_module.phases.take().items():  # the reference runs while drawing, too
            amounts[name] = amounts.get(name, 0.0) + seconds
        amounts |= {
            "tokens": float(self._tokens),
            "seconds/step": now - self._started,
            "peak_memory_bytes": float(_peak_memory(pl_module.device)),
        }
        tallies = [plain_tallies(part) for part in self._parts]
        self._parts, self._tokens, self._started = [], 0, now
        metrics = over_ranks(_gather((tallies, amounts), data_rank(pl_module.device_mesh)))
        metrics["seconds/train"] = metrics["seconds/step"] - metrics.get("seconds/draw", 0.0)
        metrics["tokens_per_second/train"] = metrics.pop("tokens") / max(metrics["seconds/train"], 1e-9)
        if generated := metrics.get("rollout_tokens"):
            metrics["tokens_per_second/rollout"] = generated / max(metrics["seconds/generate"], 1e-9)
        metrics |= {
            "gradient_norm": float(pl_module.last_gradient_norm),
            "skipped_steps": float(self._skipped),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        _check_gap(trainer, metrics)
        _log(trainer, {f"train/{name}": value for name, value in metrics.items()})
        pl_module.log_dict(
            {"reward": metrics.get("reward", math.nan), "tokens/s": metrics["tokens_per_second/train"]},
            prog_bar=True,
            logger=False,
            batch_size=1,
        )


def _forget_from(logger: TensorBoardLogger, step: int) -> None:
    """Lets TensorBoard drop what a killed process logged after the checkpoint, as its `purge_step` does."""
    proto: Any = event_pb2  # its classes are made when it is imported
    restart = proto.Event(step=step, session_log=proto.SessionLog(status=proto.SessionLog.START))
    logger.experiment._get_file_writer().add_event(restart)


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


def _gather(own: Any, place: DataRank) -> list[Any]:
    """Every data rank's, in order."""
    if place.size == 1:
        return [own]
    gathered: list[Any] = [None] * place.size
    dist.all_gather_object(gathered, own, group=place.group)
    return gathered


def over_ranks(ranks: list[tuple[list[dict[str, Tally]], dict[str, float]]]) -> dict[str, float]:
    """A step's metrics from what each rank tallied in its micro-batches and counted besides.

    Counts add up over ranks. Of seconds and memory the largest stands, and of what every rank counts in the
    same folder (streams).
    """
    parts = [part for tallies, _ in ranks for part in tallies]
    metrics = {name: combined(name, [part[name] for part in parts]) for name in parts[0]}
    metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
    for name in dict.fromkeys(name for _, amounts in ranks for name in amounts):
        values = [amounts[name] for _, amounts in ranks if name in amounts]
        shared = name.startswith(("seconds/", "peak_memory", "stream_"))
        metrics[name] = max(values) if shared else sum(values)
    return metrics


def _peak_memory(device: torch.device) -> int:
    """Most bytes that this rank has held: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class NonFiniteGuard(Callback):
    """Names and saves the prompts behind a skipped step; stops the run after too many in a row."""

    def __init__(self) -> None:
        self._batches: list[tuple[TokenBatch, Tensor]] = []
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row = state_dict["in_a_row"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "AgroModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
    """The batch's completions, and whether a log-prob of each (policy's or reference's) is not finite."""
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
