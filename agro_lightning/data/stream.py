"""Reader for rollouts that other processes append: each group is used by exactly `max_uses` steps."""

import base64
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.files import RowFile
from agro_lightning.data.buffer.group_plan import runs
from agro_lightning.data.sources import Stream
from agro_lightning.primitives.atomic_files import replace_text

PROGRESS_FILE = "_progress.json"
"""Written into the folder by the run, for the processes that fill it."""
POLL_SECONDS = 0.2
"""Between two looks at the folder, at most; else a tenth of the time waited so far."""
SHORTEST_POLL_SECONDS = 0.01
AGREE_SECONDS = 10.0
"""Ranks agree on what is there at least so often, so that no collective call waits long."""


@dataclass(slots=True, kw_only=True)
class StreamGroup:
    """A committed group that may still be used: neighbouring rows of one prompt in a file."""

    label: str
    place: int
    """Position of its first row in the file; with the label, its name on every rank and in checkpoints."""
    rows: list[int]
    """Row numbers in this rank's buffer."""
    numbers: np.ndarray
    """Their row numbers in the file."""
    version: int
    """The policy version that it was sampled from."""
    uses: int

    @property
    def key(self) -> tuple[str, int]:
        return self.label, self.place


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamProgress:
    """How far a run has got with a stream; what `rollout --follow` waits by."""

    step: int = 0
    """The optimiser step that the run is at."""
    finished_groups: int = 0
    """Groups that it will not use again: used max_uses times, or expired."""
    expired_groups: int = 0
    """Of these, the ones that grew older than max_staleness first."""


def stream_dir(source: Stream, run_dir: Path) -> Path:
    """Where the groups of a source appear."""
    return Path(source.path).expanduser() if source.path else run_dir / "stream"


def read_progress(folder: Path) -> StreamProgress:
    """What the run wrote last; all zeros before its first step.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = folder / PROGRESS_FILE
    try:
        return StreamProgress(**json.loads(path.read_text()))
    except FileNotFoundError:
        return StreamProgress()
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged; remove it, and the run writes it at its next step") from None


class UseCounts:
    """Counts uses by file and row number, so that they hold whatever order the files are loaded in.

    The state belongs in the trainer's checkpoint, next to the weights that the uses produced: a restart then
    counts exactly the uses that those weights have seen.
    """

    def __init__(self, max_uses: int) -> None:
        """
        Args:
            max_uses: how often a row may be used, 1 to 255.
        """
        if not 1 <= max_uses <= 255:
            raise ValueError(f"max_uses is {max_uses}; it must be 1 to 255")
        self.max_uses = max_uses
        self._uses: dict[str, np.ndarray] = {}

    def record(self, label: str, numbers: np.ndarray) -> None:
        """Counts one use of each of these distinct rows of a file.

        Raises:
            ValueError: a row would have been used more than max_uses times; nothing is counted then.
        """
        uses = self.uses(label)
        new = np.pad(uses, (0, max(0, int(numbers.max()) + 1 - len(uses)))).astype(np.int64)
        new[numbers] += 1
        worst = int(numbers[np.argmax(new[numbers])])
        if new[worst] > self.max_uses:
            times = f"{new[worst]} times; max_uses is {self.max_uses}"
            raise ValueError(f"row {worst} of {label} would be used {times}")
        self._uses[label] = new.astype(np.uint8)

    def uses(self, label: str) -> np.ndarray:
        """Uses by row number in the file with that label, up to the last row that was used."""
        return self._uses.get(label, np.zeros(0, np.uint8))

    def state_dict(self) -> dict[str, Any]:
        """Plain strings and numbers, for a checkpoint or JSON."""
        counts = {
            label: base64.b85encode(zlib.compress(uses.tobytes())).decode()
            for label, uses in sorted(self._uses.items())
        }
        return {"max_uses": self.max_uses, "uses": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the counts; max_uses stays this run's."""
        self._uses = {
            label: np.frombuffer(zlib.decompress(base64.b85decode(packed)), np.uint8)
            for label, packed in state["uses"].items()
        }


class StreamReader:
    """Draws groups from a folder that is being filled, oldest first, and counts every use.

    The counts are part of the checkpoint, next to the weights that the uses produced. After a kill the run
    goes back to both, so that each group is used `max_uses` times in the life that the weights remember.
    Files are never removed.

    Args:
        source: the settings.
        folder: where the groups appear.
        buffer: opened on the folder, live.
        reports: whether this process writes the folder's progress file and waits for new files: on rank 0.
        agree: returns rank 0's value on every rank.
    """

    def __init__(
        self,
        source: Stream,
        folder: Path,
        buffer: RolloutBuffer,
        *,
        reports: bool,
        agree: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.source, self.folder, self.buffer = source, folder, buffer
        self.counts = UseCounts(source.max_uses)
        self._reports, self._agree = reports, agree
        self._labels: set[str] = set()
        self._groups = 0
        self._open: dict[tuple[str, int], StreamGroup] = {}
        self._current: list[tuple[str, int]] = []

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Uses by row, and the groups that are being trained on."""
        return {"ledger": self.counts.state_dict(), "current": [list(key) for key in self._current]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the uses; call before anything is drawn."""
        self.counts.load_state_dict(state["ledger"])
        self._current = [(label, place) for label, place in state["current"]]

    # ------------------------------------------------------------------ drawing

    def draw(self, step: int, count: int, uses: int) -> list[list[int]]:
        """Chooses groups for the next `uses` optimiser steps; `use` counts each of them.

        Args:
            step: optimiser steps taken so far.
            count: groups wanted.
            uses: how often the run is about to use them.

        Returns:
            For each group its row numbers in `buffer`; the same groups on every rank.

        Raises:
            TimeoutError: too few usable groups appeared within source.timeout_s.
        """
        fresh = self._usable(step, uses)
        self._report(step)
        if len(fresh) < count:
            fresh = self._wait(step, count, uses)
            self._report(step)
        chosen = fresh[:count]
        self._current = [group.key for group in chosen]
        return [group.rows for group in chosen]

    def use(self, step: int) -> None:
        """Counts that `step` trains on the groups that were drawn last.

        Raises:
            FileNotFoundError: a file that holds some of them was removed.
        """
        if not self._current:
            return
        if any(key not in self._open for key in self._current):  # drawn before a restart
            self._refresh()
        for key in self._current:
            group = self._open.get(key)
            if group is None:
                raise FileNotFoundError(
                    f"{key[0]} is gone from {self.folder}; the checkpoint is training on it"
                )
            self.counts.record(group.label, group.numbers)
            group.uses += 1
            if group.uses >= self.source.max_uses:
                del self._open[key]
        self._report(step)

    def _usable(self, step: int, uses: int) -> list[StreamGroup]:
        """Groups that are new enough and may be used so often: those that were begun, then the oldest."""
        self._refresh()
        limit = self.source.max_staleness
        oldest = None if limit is None else step - limit
        fresh = [
            group
            for group in self._open.values()
            if group.uses + uses <= self.source.max_uses and (oldest is None or group.version >= oldest)
        ]
        return sorted(fresh, key=lambda group: (-group.uses, group.version, group.label, group.place))

    def _wait(self, step: int, count: int, uses: int) -> list[StreamGroup]:
        deadline = time.monotonic() + self.source.timeout_s
        while len(fresh := self._usable(step, uses)) < count:
            if self._agree(time.monotonic() >= deadline):
                raise TimeoutError(self._too_few(step, count, len(fresh)))
            self._pause(count - len(fresh), deadline)
        return fresh

    def _pause(self, missing: int, deadline: float) -> None:
        """Waits on rank 0 until there may be enough; the others wait for rank 0 in the next agreement."""
        if not self._reports:
            return
        started, before = time.monotonic(), self.buffer.num_rows
        until = min(deadline, started + AGREE_SECONDS)
        while (now := time.monotonic()) < until:
            time.sleep(min(POLL_SECONDS, max(SHORTEST_POLL_SECONDS, (now - started) / 10)))
            if self.buffer.refresh() and self.buffer.num_rows - before >= 2 * missing:
                return

    def _too_few(self, step: int, count: int, found: int) -> str:
        expired = self._expired(step)
        newest = max((group.version for group in self._open.values()), default=None)
        return (
            f"source {self.source.name}: {self.folder} has {found} usable groups, step {step} needs {count}, "
            f"and no more came within {self.source.timeout_s:g} s. It holds {self._groups} groups in "
            f"{len(self._labels)} files; {expired} unused ones are older than max_staleness "
            f"{self.source.max_staleness} (newest unused: version {newest}). Is `rollout --follow` running "
            "on this run, and does this run publish its weights (callback PublishWeights)?"
        )

    def metrics(self, step: int) -> dict[str, float]:
        """Groups of the folder by what can become of them."""
        expired, name = self._expired(step), self.source.name
        return {
            f"stream_unused_groups/{name}": float(len(self._open) - expired),
            f"stream_expired_groups/{name}": float(expired),
        }

    # ------------------------------------------------------------------ files

    def _refresh(self) -> None:
        """Loads new files, the same on every rank, and finds their groups."""
        self.buffer.refresh()
        labels = self._agree(sorted(file.label for file in self.buffer.files))
        missing = set(labels) - {file.label for file in self.buffer.files}
        deadline = time.monotonic() + self.source.timeout_s
        while missing:  # another node's view of the folder may lag behind
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{sorted(missing)[0]} is in {self.folder} on rank 0, but not on this rank"
                )
            time.sleep(POLL_SECONDS)
            self.buffer.refresh()
            missing -= {file.label for file in self.buffer.files}
        agreed = set(labels) - self._labels
        for file in self.buffer.files:
            if file.label in agreed:
                self._add(file)
        self._labels |= agreed

    def _add(self, file: RowFile) -> None:
        index = file.source.index
        keys, numbers, versions = index["prompt_key"], index["number"], index["version"]
        uses = self.counts.uses(file.label)
        starts = runs(keys)
        for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(keys)], strict=True):
            if end - first < 2:
                continue  # the buffer counts it as group_of_one, or refuses it
            self._groups += 1
            number = int(numbers[first])
            used = int(uses[number]) if number < len(uses) else 0
            if used >= self.source.max_uses:
                continue
            group = StreamGroup(
                label=file.label,
                place=first,
                rows=list(range(file.first + first, file.first + end)),
                numbers=numbers[first:end],
                version=int(versions[first:end].min()),
                uses=used,
            )
            self._open[group.key] = group

    # ------------------------------------------------------------------ progress

    def _expired(self, step: int) -> int:
        limit = self.source.max_staleness
        if limit is None:
            return 0
        return sum(group.version < step - limit for group in self._open.values())

    def _report(self, step: int) -> None:
        """Tells the processes that fill the folder how much of it is done with."""
        if not self._reports:
            return
        expired = self._expired(step)
        progress = {
            "step": step,
            "finished_groups": self._groups - len(self._open) + expired,
            "expired_groups": expired,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / PROGRESS_FILE, json.dumps(progress))
