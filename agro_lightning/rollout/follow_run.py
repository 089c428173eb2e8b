"""Following a run: its newest weights, and how far it has got with the groups that were made for it."""

import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from agro_lightning.data.stream import read_progress
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout.output_files import CommittedGroups
from agro_lightning.rollout.weight_sync import (
    POLL_SECONDS,
    load_policy,
    load_weights,
    newest_weights,
    wait_for_weights,
)


class FollowedRun:
    """A run on this node or another, seen through its folder and the folder that is filled for it.

    Args:
        run_dir: the run's folder, where it publishes weights.
        folder: where groups are appended.
        max_ahead: most groups that may wait there for the run; None: twice what the run uses in a step, and
            one file of every worker.
        per_file: groups that one file may hold.
        shards: workers that fill the folder.
        timeout_s: longest wait for weights, and for the run to use groups.
    """

    def __init__(
        self,
        run_dir: Path,
        folder: Path,
        *,
        max_ahead: int | None,
        per_file: int,
        shards: int,
        timeout_s: float,
    ) -> None:
        self.run_dir, self.folder, self.timeout_s = run_dir, folder, timeout_s
        self.weights = wait_for_weights(run_dir, timeout_s)
        in_flight = per_file * shards
        step = self.weights.facts.groups_per_step
        self.max_ahead = 2 * step + in_flight if max_ahead is None else max_ahead
        if self.max_ahead < step - 1 + in_flight:
            raise ValueError(
                f"max_ahead is {max_ahead}; the run uses {step} groups a step and {shards} processes make "
                f"{per_file} a file, so both would wait for each other below {step - 1 + in_flight}"
            )
        # every other process may be making a file already, when this one looks
        self._most_before = self.max_ahead - in_flight
        self._committed = CommittedGroups(folder)
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
        while (found := newest_weights(self.run_dir)) not in (None, self.weights):
            assert found is not None
            try:
                load_weights(found, policy)
            except FileNotFoundError:
                continue
            self.weights = found
            return True
        return False

    def wait_for_room(self) -> bool:
        """Waits until another file would not run too far ahead of the run; False when the run has ended.

        Raises:
            TimeoutError: the run has not used groups for so long.
        """
        started = time.monotonic()
        before, since = -1, started
        while not self._has_ended():
            progress = read_progress(self.folder)
            waiting = self._committed.count() - progress.finished_groups
            if waiting <= self._most_before:
                self.waited += time.monotonic() - started
                return True
            if progress.step != before:
                before, since = progress.step, time.monotonic()
            if time.monotonic() - since >= self.timeout_s:
                raise TimeoutError(
                    f"{waiting} groups wait in {self.folder}, and the run {self.run_dir} has stayed at step "
                    f"{progress.step} for {self.timeout_s:g} s. Has it stopped? Start this command again "
                    "once it goes on; nothing is lost"
                )
            time.sleep(POLL_SECONDS)
        return False

    def _has_ended(self) -> bool:
        newest = newest_weights(self.run_dir)
        return newest is not None and newest.final
