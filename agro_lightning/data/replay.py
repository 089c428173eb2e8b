"""The folder of a run's own past rollouts: one immutable file a rollout, named after its step."""

import re
import time
from collections.abc import Sequence
from pathlib import Path, PurePath

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.primitives.atomic_files import sync_directory
from agro_lightning.types import PromptGroup


class ReplayFolder:
    """Writes the replay buffer's files, and takes away those that a run no longer needs.

    Args:
        path: the folder; made with the first rollout.
    """

    def __init__(self, path: Path):
        self.path = path
        self._surplus: list[Path] = []

    def append(
        self, groups: Sequence[PromptGroup], *, step: int, rank: int, part: int, tokenizer_id: str
    ) -> None:
        """Adds the rollout of one step and rank; `part` tells several of one step apart."""
        append_rollouts(self.path, groups, name=rollout_name(step, rank, part), tokenizer_id=tokenizer_id)

    def evict(self, buffer: RolloutBuffer, capacity: int) -> None:
        """Deletes files whose rows are all beyond the capacity, one checkpoint late: the run may be resumed
        from the checkpoint before.

        Args:
            buffer: the folder, opened.
            capacity: completions to keep.
        """
        for path in self._surplus:
            path.unlink(missing_ok=True)
        if self._surplus:
            sync_directory(self.path)
        newer, surplus = 0, []
        for file in reversed(buffer.files):
            if newer >= capacity and file.source.path not in self._surplus:
                surplus.append(file.source.path)
            newer += len(file)
        self._surplus = surplus[::-1]  # oldest first, so that a kill leaves the newest ones

    def archive_from(self, step: int) -> str | None:
        """Moves rollouts of this step and later ones out of sight: a resumed run makes them again.

        Returns:
            A message that says so; None when there were none.
        """
        later = [path for path in sorted(self.path.glob("step-*.parquet")) if step_of(path.name) >= step]
        if not later:
            return None
        aside = self.path / f"_set_aside_at_step_{step:08d}_{time.time_ns()}"
        aside.mkdir(parents=True)
        for path in later:
            path.rename(aside / path.name)
        return f"{len(later)} replay files from after step {step} were moved to {aside}"


def rollout_name(step: int, rank: int, part: int) -> str:
    """The name of the replay file of one step and rank; `part` tells several of one step apart."""
    return f"step-{step:08d}-rank-{rank:05d}-part-{part:05d}"


def step_of(label: str) -> int:
    """The step in a name made by rollout_name.

    Raises:
        ValueError: the file was not made by a run.
    """
    match = re.match(r"step-(\d+)-rank-", PurePath(label).name)
    if match is None:
        raise ValueError(f"{label} does not belong in a replay folder; keep other files in an Offline source")
    return int(match[1])
