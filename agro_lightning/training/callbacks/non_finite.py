"""The guard against steps whose gradient is not finite."""

import json
import logging
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from agro_lightning.models.batch import TokenBatch
from agro_lightning.training.checkpointing import last_checkpoint, run_dir
from agro_lightning.training.step_callback import StepCallback

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a NaN or an infinity."""


class NonFiniteGuard(StepCallback):
    """Names and saves the prompts behind a skipped step; stops the run after too many in a row."""

    def __init__(self) -> None:
        self._batches: list[tuple[TokenBatch, Tensor]] = []
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row = state_dict["in_a_row"]

    def on_micro_batch_end(self, trainer: L.Trainer, module: "AgroModule", batch: Any) -> None:
        self._batches.append((batch, module.last_log_ratios))

    def on_step_end(self, trainer: L.Trainer, module: "AgroModule", data: "AgroDataModule") -> None:
        batches, self._batches = self._batches, []
        if not module.step_skipped:
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
        if self._in_a_row >= module.max_skipped_steps:
            raise NonFiniteError(
                f"{self._in_a_row} steps in a row were not finite (the last one: prompts {prompts}); "
                f"last good checkpoint: {last_checkpoint(trainer)}. Lower the learning rate, or look "
                f"at {folder}"
            )


def _suspects(batch: TokenBatch, log_ratios: Tensor) -> list[dict[str, Any]]:
    """The batch's completions, and whether a log-prob of each (policy's or reference's) is not finite."""
    bad = ~torch.isfinite(log_ratios)
    groups, lengths = batch.group_ids.tolist(), torch.bincount(batch.sequence_ids).tolist()
    ids = [tokens.tolist() for tokens in batch.targets.split(lengths)]
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
