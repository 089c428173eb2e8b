"""A run's folder and its checkpoints: every so many steps, the last two kept, whole or absent."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from agro_lightning.checkpoints.files import newest_checkpoint
from agro_lightning.training.compat import LinkedCheckpoint
from agro_lightning.training.step_callback import ends_step
from agro_lightning.training.strategy import Sharded


def run_dir(trainer: L.Trainer) -> Path:
    """The folder of this run: metrics, checkpoints, samples, replay buffer."""
    return Path(trainer.default_root_dir)


def check_start(folder: Path, ckpt_path: str | None, *, fitting: bool, may_be_new: bool) -> None:
    """Looks at the run's folder before anything is loaded.

    A new run must not write over a former one, and one that should go on must not start anew in silence.

    Args:
        folder: of the run.
        ckpt_path: as given.
        fitting: whether this is `fit`.
        may_be_new: whether the folder was named by somebody, so that its first start is one with `last` too.

    Raises:
        ValueError: the folder cannot be written to; no checkpoint is named, and there are some; or the last
            one is named, and there is none.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if fitting and not (there.is_dir() and os.access(there, os.W_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise ValueError(f"the run folder {folder} cannot be made: {there} {what}; give another --run_dir")
    newest = newest_checkpoint(folder / "checkpoints")
    if fitting and ckpt_path is None and newest is not None:
        raise ValueError(
            f"{folder} holds a run already (its newest checkpoint is {newest.name}): go on with it by "
            "--ckpt_path last, or give another --run_dir"
        )
    if ckpt_path == "last" and newest is None:
        if not (fitting and may_be_new):
            raise ValueError(
                f"--ckpt_path last means the newest checkpoint of --run_dir, and {folder} holds none; "
                "give the folder of the run, or the checkpoint's path"
            )
        rank_zero_info(f"{folder} holds no checkpoint yet: the run starts from its beginning")
        warnings.filterwarnings("ignore", message=r".*there is no last checkpoint available")  # just said


def last_checkpoint(trainer: L.Trainer) -> str:
    """Path of the newest checkpoint of this run, or "none" in words."""
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    return path or "none was saved yet"


def _move_link(link: Path, target: Path) -> None:
    """In one step: killed in between, a run would find no checkpoint and start anew."""
    aside = link.with_name(".last.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent))
    aside.replace(link)


class RunCheckpoint(LinkedCheckpoint):
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
            enable_version_counter=False,  # a run that goes on would leave last.ckpt where it was
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(
            trainer, batch_idx
        ):  # within a step the gradient of its first micro-batches would be lost
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what is kept, under the folder's present name: a run that was moved keeps two, too."""
        assert self.dirpath is not None
        folder = Path(self.dirpath)

        def here(path: str) -> str:
            moved = folder / Path(path).name
            return str(moved) if path and moved.exists() else ""

        kept = {here(path): step for path, step in state_dict["best_k_models"].items() if here(path)}
        paths = {
            name: here(state_dict[name])
            for name in ("best_model_path", "last_model_path", "kth_best_model_path")
        }
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})

    def link_last(self, trainer: L.Trainer, link: Path, target: Path) -> None:
        """Lets the link point to the checkpoint once that is complete."""
        move = partial(_move_link, link, target)
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.saver.afterwards(move)
        elif trainer.is_global_zero:
            move()

    def find_last(self, trainer: L.Trainer) -> Path | None:
        """The complete checkpoint of most steps, wherever the link points; the one before where it is
        damaged."""
        assert self.dirpath is not None
        strategy: Any = trainer.strategy
        (strategy if isinstance(strategy, Sharded) else strategy.checkpoint_io).fall_back = True
        return newest_checkpoint(Path(self.dirpath))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save_now(trainer)
