"""Following a run: its newest weights, and how far it has got with the groups that were made for it."""

import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from agro_lightning.data.stream import StreamProgress, read_progress
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout.output_files import CommittedGroups
from agro_lightning.rollout.weight_sync import (
    POLL_SECONDS,
    WeightsVersion,
    load_policy,
    load_weights,
    newest_weights,
    wait_for_weights,
)

LOOK_SECONDS = 0.05
"""Between two looks at the run's folder, while tokens are being decoded."""


class FollowedRun:
    """A run on this node or another, seen through its folder and the folder that is filled for it.

    Args:
        run_dir: the run's folder, where it publishes weights.
        folder: where groups are appended.
        max_ahead: most groups that are being made or wait there for the run; None: twice what the run uses in
            a step, and what every worker would like to be making.
        per_file: groups of one file; None: one, or more where a step of the run would be more than 64 files.
        requests: completions that a worker would like to be making at the same time; None: 8 groups.
        n: completions of a group; None: the run's group_size.
        shards: workers that fill the folder.
        timeout_s: longest wait for weights, and for the run to use groups.
    """

    def __init__(
        self,
        run_dir: Path,
        folder: Path,
        *,
        max_ahead: int | None,
        per_file: int | None,
        requests: int | None,
        n: int | None,
        shards: int,
        timeout_s: float,
    ) -> None:
        self.run_dir, self.folder, self.timeout_s = run_dir, folder, timeout_s
        self.weights = wait_for_weights(run_dir, timeout_s)
        step = self.weights.facts.groups_per_step
        self.per_file = per_file or max(1, step // 64)
        self._shards = shards
        wanted = 8 if requests is None else -(-requests // (n or self.weights.facts.group_size))
        least, files = self.per_file * shards, max(1, wanted // self.per_file)
        self.max_ahead = 2 * step + files * least if max_ahead is None else max_ahead
        if self.max_ahead < step - 1 + least:
            raise ValueError(
                f"max_ahead is {max_ahead}; the run uses {step} groups a step and {shards} processes make "
                f"{self.per_file} a file, so both would wait for each other below {step - 1 + least}"
            )
        self.most_making = min(files, (self.max_ahead - step + 1) // least) * self.per_file
        """Groups that a worker makes at the same time: as many as leave no step of the run short."""
        self._newest: WeightsVersion | None = None
        self._committed = CommittedGroups(folder)
        self._committed.look()
        self._progress, self._counted_at = StreamProgress(), -LOOK_SECONDS
        self._step_seen, self._last_wait, self._looked_at = (-1, 0.0), 0.0, -LOOK_SECONDS
        self.waited = 0.0
        """Seconds spent waiting for the run to use groups."""

    def policy(self, settings: PolicySettings) -> tuple[Policy, PreTrainedTokenizerBase]:
        """The run's policy with its newest weights, and its tokenizer."""
        while True:
            try:
                return load_policy(self.weights, settings)
            except FileNotFoundError:  # newer weights took the place of these
                self.weights = wait_for_weights(self.run_dir, self.timeout_s)

    def update(self, policy: Policy) -> bool:
        """Loads the newest weights where they are not those that the policy has; says whether they were."""
        found = self._look()
        if found is None or found == self.weights:
            return False
        try:
            load_weights(found, policy)
        except FileNotFoundError:  # newer weights took the place of these
            self._looked_at = -LOOK_SECONDS
            return False
        self.weights = found
        return True

    def has_ended(self) -> bool:
        """Whether the run has published its last weights."""
        return (newest := self._look()) is not None and newest.final

    def _look(self) -> WeightsVersion | None:
        """The newest weights, looked for every LOOK_SECONDS."""
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._newest, self._looked_at = newest_weights(self.run_dir), time.monotonic()
        return self._newest

    def has_room(self, making: int) -> bool:
        """Whether another file may be begun beside `making` groups that this process is making.

        Every other process may be making as many as it ever does.
        """
        if making and making + self.per_file > self.most_making:
            return False
        if time.monotonic() - self._counted_at >= LOOK_SECONDS:
            self._progress = read_progress(self.folder)
            if self._shards > 1:
                self._committed.look()
            self._counted_at = time.monotonic()
        others = (self._shards - 1) * self.most_making
        return self._waiting + making + self.per_file + others <= self.max_ahead

    @property
    def _waiting(self) -> int:
        """Groups that the run has not finished with."""
        return self._committed.total - self._progress.finished_groups

    def made(self, name: str, groups: int) -> None:
        """Counts a file that this process has added."""
        self._committed.note(name, groups)

    def wait(self) -> None:
        """Waits a moment for the run to use groups.

        Raises:
            TimeoutError: it has used none for so long.
        """
        now = time.monotonic()
        if self._progress.step != self._step_seen[0] or now - self._last_wait > 2 * POLL_SECONDS:
            self._step_seen = (self._progress.step, now)
        if now - self._step_seen[1] >= self.timeout_s:
            raise TimeoutError(
                f"{self._waiting} groups wait in {self.folder}, and the run {self.run_dir} has stayed at "
                f"step {self._progress.step} for {self.timeout_s:g} s. Has it stopped? Start this command "
                "again once it goes on; nothing is lost"
            )
        time.sleep(POLL_SECONDS)
        self._last_wait = time.monotonic()
        self.waited += self._last_wait - now
