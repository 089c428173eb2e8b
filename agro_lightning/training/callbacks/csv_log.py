"""metrics.csv: one row a logged step, appended, and cut back to the checkpoint when a run resumes."""

import csv
import io
import logging
import math
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from agro_lightning.primitives.atomic_files import append, atomic_path, next_free, writing

log = logging.getLogger(__name__)


def whole_rows(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, str]]:
    """The rows of a metrics.csv one by one, first the columns as a row; damaged lines are left out.

    A row is whole where it has the width of most rows, a step, and numbers. Of a damaged first line the names
    that are whole are kept, and those columns of the rows.

    Args:
        damaged: gets the numbers of the lines that were left out.
    """
    damaged = [] if damaged is None else damaged

    def lines() -> Iterator[tuple[int, list[str]]]:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
                try:
                    yield number, next(csv.reader([text]), []) if text.endswith("\n") else []
                except csv.Error:  # a cell of more than 128 KiB
                    yield number, []

    widths = Counter(len(cells) for number, cells in lines() if number > 1 and _is_row(cells))
    names = next((cells for _, cells in lines()), [])
    width = widths.most_common(1)[0][0] if widths else len(names)
    if len(names) != width:
        names = names[: min(len(names), width) - 1]
    kept = [i for i, name in enumerate(names) if "�" not in name]
    if not names or names[0] != "step":
        kept = []
    if len(kept) < width:
        damaged.append(1)
    yield {names[i]: names[i] for i in kept}
    for number, cells in lines():
        if number > 1 and kept:
            if len(cells) == width and _is_row(cells):
                yield {names[i]: cells[i] for i in kept}
            else:
                damaged.append(number)


def _is_row(cells: Sequence[str]) -> bool:
    return bool(cells) and cells[0].isascii() and cells[0].isdigit() and all(map(_is_number, cells))


def _is_number(cell: str) -> bool:
    try:
        return not cell or not math.isnan(float(cell)) or cell == "nan"
    except ValueError:
        return False


class MetricsFile(Logger):
    """Writes every metric to `<run_dir>/metrics.csv`.

    Unlike Lightning's CSVLogger it keeps what an earlier process of the same run wrote: rows up to the step
    that a run resumes from stay, later ones are written again. A row is appended; the file is copied only
    when a metric comes that it has no column for.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_at = 0
        self._changed = False

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
        """Keeps the rows up to `step`; a damaged file is put aside, and what is whole in it kept."""
        self._columns, self._row, self._changed = [], {}, False
        if not step or not self.path.exists():
            self.path.unlink(missing_ok=True)
            return
        damaged: list[int] = []
        rows = whole_rows(self.path, damaged)
        self._columns = list(next(rows))
        last: dict[str, str] = {}

        def kept() -> Iterator[dict[str, str]]:
            nonlocal last
            for row in rows:
                if int(row["step"]) <= step:
                    last = row
                    yield row

        self._copy(kept(), before=lambda: _put_aside(self.path, damaged))
        self._row = dict(last)
        self._row_at = self.path.stat().st_size - len(self._line(last)) if last else 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = int(self._row.get("step", -1)) + 1 if step is None else step
        if int(self._row.get("step", -1)) != step:
            self.save()
            self._row, self._row_at = {"step": step}, self._size()
        self._row.update((name, value) for name, value in metrics.items() if name != "epoch")
        self._changed = True

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        if not self._changed:
            return
        if new := [name for name in self._row if name not in self._columns]:
            former = self._former_rows() if self._columns else iter(())
            self._columns += new
            self._copy(former)
            self._row_at = self._size()
        line = self._line(self._row)
        with writing(self.path, len(line)):
            append(self.path, line, at=self._row_at)
        self._changed = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            self.save()
        except OSError as error:
            if status != "failed":
                raise
            log.warning("the last row of metrics.csv is lost: %s", error)  # the run's own error is told

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _line(self, row: dict[str, Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
        return text.getvalue().encode()

    def _former_rows(self) -> Iterator[dict[str, str]]:
        """The rows of the file before the present one."""
        with self.path.open(newline="") as handle:
            for row in csv.DictReader(handle):
                if row["step"] != str(self._row["step"]):
                    yield row

    def _copy(self, rows: Iterator[dict[str, str]], before: Any = None) -> None:
        """Writes the file anew with all columns, row by row; `before` runs ahead of its replacement."""
        header = self._line({name: name for name in self._columns})
        with atomic_path(self.path, needed=lambda: self._size() + len(header)) as aside:
            with aside.open("wb") as handle:
                handle.write(header)
                handle.writelines(map(self._line, rows))
            if before is not None:
                before()


def _put_aside(path: Path, damaged: list[int]) -> None:
    """Keeps a damaged file under another name, and says which lines are lost."""
    if damaged:
        kept = next_free(path.with_name("metrics-damaged.csv"))
        shutil.copyfile(path, kept)
        log.warning(
            "%s is damaged in line %s: what is whole in it was kept, and the file as it was is %s",
            path,
            ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else ""),
            kept,
        )
