"""What a run trained on, row by row: a log beside the run that proves how often each row was used."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Spans = Mapping[str, Sequence[tuple[int, int]]]
"""Rows by file label, as (first row number, one past the last)."""


class UseLog:
    """Appends the rows that each optimiser step trains on, before the step is taken.

    A run that was killed goes back to its last checkpoint, and takes some steps again, maybe on other rows.
    Its log says so ("resume"), and `read_uses` counts only what led to the weights that the run now has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self, step: int) -> None:
        """Says that steps from `step` on, if there are any in the log, did not happen."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(
            "ab"
        ) as handle:  # a line that a kill cut short belongs to a step that was not taken
            handle.truncate(_whole_lines(self.path))
        self._append({"resume": step})

    def record(self, step: int, rows: Spans) -> None:
        """Says that `step` trains once on each of these rows."""
        self._append({"step": step, "rows": {label: [list(span) for span in rows[label]] for label in rows}})

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def read_uses(path: Path) -> dict[str, np.ndarray]:
    """How often each row was used by the steps that led to the run's present weights, by file label.

    Returns:
        For each label, uses by row number up to the last row that was used.

    Raises:
        ValueError: a line is not what UseLog writes.
    """
    steps: list[tuple[int, dict[str, list[list[int]]]]] = []
    for number, entry in _entries(path):
        if "resume" in entry:
            steps = [taken for taken in steps if taken[0] < entry["resume"]]
        elif "step" in entry and (not steps or steps[-1][0] < entry["step"]):
            steps.append((entry["step"], entry["rows"]))
        else:
            raise ValueError(f"{path}:{number}: step {entry.get('step')} does not follow step {steps[-1][0]}")
    uses: dict[str, np.ndarray] = {}
    for _, rows in steps:
        for label, spans in rows.items():
            for first, end in spans:
                known = uses.get(label, np.zeros(0, np.int64))
                known = np.pad(known, (0, max(0, end - len(known))))
                known[first:end] += 1
                uses[label] = known
    return uses


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes()[: _whole_lines(path)].splitlines(), start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no line of a use log ({error})") from None


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
