"""Every step's metrics: put together from micro-batches and ranks, checked, and logged."""

import math
import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from agro_lightning.distributed.fsdp import data_rank
from agro_lightning.rollout.logprob_gap import check_logprob_gap
from agro_lightning.training.callbacks.csv_log import MetricsFile
from agro_lightning.training.callbacks.non_finite import NonFiniteGuard as NonFiniteGuard  # its name in 0.1
from agro_lightning.training.compat import drop_events_from
from agro_lightning.training.metrics import MetricSum, combined, plain_sums
from agro_lightning.training.step_callback import StepCallback, data_of

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule


class StepMetrics(StepCallback):
    """Puts a step's micro-batches and ranks together, and logs them with times, throughput and memory."""

    def __init__(self) -> None:
        self._parts: list[dict[str, MetricSum]] = []
        self._tokens = 0
        self._skipped = 0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops what a killed process logged after the checkpoint: it will come again."""
        self._started = time.perf_counter()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.resume_at(trainer.global_step)
            elif isinstance(logger, TensorBoardLogger) and trainer.global_step and trainer.is_global_zero:
                drop_events_from(logger, trainer.global_step)

    def on_micro_batch_end(self, trainer: L.Trainer, module: "AgroModule", batch: Any) -> None:
        module.timer.end("optimizer", module.device)
        self._parts.append(module.last_metrics)
        self._tokens += int(batch.completion_lengths.sum()) + batch.num_sequences
        data_of(trainer).completions_used += batch.num_completions

    def on_step_end(self, trainer: L.Trainer, module: "AgroModule", data: "AgroDataModule") -> None:
        self._skipped += int(module.step_skipped)
        metrics = over_ranks(data_rank(module.device_mesh).gather(self._take(module, data)))
        metrics["seconds/train"] = metrics["seconds/step"] - metrics.get("seconds/draw", 0.0)
        metrics["tokens_per_second/train"] = metrics.pop("tokens") / max(metrics["seconds/train"], 1e-9)
        if generated := metrics.get("rollout_tokens"):
            metrics["tokens_per_second/rollout"] = generated / max(metrics["seconds/generate"], 1e-9)
        metrics |= {
            "gradient_norm": float(module.last_gradient_norm),
            "skipped_steps": float(self._skipped),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if "logprob_gap_mean" in metrics:  # of all ranks: they stop alike
            check_logprob_gap(
                metrics["logprob_gap_mean"],
                data.max_logprob_gap,
                max_abs=metrics["logprob_gap_max"],
                completion_max_abs=metrics.get("logprob_gap_completion_max", math.nan),
                sampling=data.sampling,
                engine=type(data.engine).__name__,
            )
        _log(trainer, {f"train/{name}": value for name, value in metrics.items()})
        module.log_dict(
            {"reward": metrics.get("reward", math.nan), "tokens/s": metrics["tokens_per_second/train"]},
            prog_bar=True,
            logger=False,
            batch_size=1,
        )

    def _take(
        self, module: "AgroModule", data: "AgroDataModule"
    ) -> tuple[list[dict[str, MetricSum]], dict[str, float]]:
        """This rank's sums by micro-batch, and its seconds and counts; the next step starts from none."""
        now = time.perf_counter()
        amounts = data.live.take_metrics()
        for name, seconds in module.timer.take().items():  # the reference runs while drawing, too
            amounts[name] = amounts.get(name, 0.0) + seconds
        amounts |= {
            "tokens": float(self._tokens),
            "seconds/step": now - self._started,
            "peak_memory_bytes": float(_peak_memory(module.device)),
        }
        sums = [plain_sums(part) for part in self._parts]
        self._parts, self._tokens, self._started = [], 0, now
        return sums, amounts


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


def over_ranks(ranks: list[tuple[list[dict[str, MetricSum]], dict[str, float]]]) -> dict[str, float]:
    """A step's metrics from what each rank summed in its micro-batches and counted besides.

    Counts add up over ranks. Seconds and memory are the slowest and the fullest rank's. What every rank
    counts in the same folder (streams) is taken once.
    """
    parts = [part for sums, _ in ranks for part in sums]
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
