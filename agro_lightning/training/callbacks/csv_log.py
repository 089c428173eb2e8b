"""metrics.csv: one row a logged step, appended, and cut back to the checkpoint when a run resumes."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger


class MetricsFile(Logger):
    """Writes every metric to `<run_dir>/metrics.csv`.

    Unlike Lightning's CSVLogger it keeps what an earlier process of the same run wrote: rows up to the step
    that a run resumes from stay, later ones are written again.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = ["step"]
        self._written = 0
        self._columns_written = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Reads the rows up to `step` back and forgets later ones."""
        self._rows, self._columns, self._written, self._columns_written = [], ["step"], 0, 0
        if step and self.path.exists():
            with self.path.open(newline="") as handle:
                reader = csv.DictReader(handle)
                self._columns = list(reader.fieldnames or ["step"])
                self._rows = [row for row in reader if row["step"].isdigit() and int(row["step"]) <= step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = len(self._rows) if step is None else step
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}
        self._columns += [name for name in metrics if name not in self._columns]
        if self._rows and int(self._rows[-1]["step"]) == step:
            self._rows[-1].update(metrics)
            self._written = min(self._written, len(self._rows) - 1)
            self._columns_written = 0  # a written row changed: write the file anew
        else:
            self._rows.append({"step": step, **metrics})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings stand in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        if self._columns_written == len(self._columns):
            with self.path.open("a", newline="") as handle:
                csv.DictWriter(handle, self._columns).writerows(self._rows[self._written :])
        elif self._rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(".metrics.csv.partial")
            with aside.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, self._columns)
                writer.writeheader()
                writer.writerows(self._rows)
            os.replace(aside, self.path)
        self._written, self._columns_written = len(self._rows), len(self._columns)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
