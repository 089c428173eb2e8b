"""The row files of a buffer: which are loaded, and which row number lies in which file."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from agro_lightning.data.buffer.discover import FoundFile, find_row_files
from agro_lightning.data.buffer.row_store import RowStore, SourceFile
from agro_lightning.data.buffer.schema import BadFileError
from agro_lightning.data.buffer.store import INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """A loaded file; its rows have the numbers first..first+len(source.rows)-1 in the buffer."""

    source: SourceFile
    label: str
    """See discover.FoundFile."""
    first: int
    newest_version: int
    """The newest policy version of its rows; -1 where none is recorded."""

    @property
    def ids(self) -> np.ndarray:
        """Its rows' numbers in the buffer."""
        return np.arange(self.first, self.first + len(self.source.rows))


class FileSet:
    """Loads files as they appear. Rows are numbered in the order of loading, and keep their numbers."""

    def __init__(self, paths: Sequence[str], store: RowStore, *, strict: bool, live: bool) -> None:
        """
        Args:
            paths: see discover.find_row_files.
            store: packs the files.
            strict: a file that cannot be used is an error instead of being skipped.
            live: paths may be missing.
        """
        self._paths = paths
        self._store = store
        self._strict = strict
        self._live = live
        self._files: dict[str, RowFile] = {}
        self._skipped: dict[str, tuple[tuple[int, int], str]] = {}
        self._next_row = 0

    def refresh(self, accept: Callable[[str], bool] | None) -> int:
        """Loads new files and forgets those that are gone; returns how many rows came and went.

        Raises:
            BadFileError, BadRowError: a new file cannot be used, or a loaded one has changed.
        """
        found = find_row_files(self._paths, may_be_missing=self._live)
        gone = sum(len(self._files.pop(name).source.rows) for name in self._files.keys() - found.keys())
        before = self._next_row
        try:
            for name, entry in sorted(found.items(), key=lambda item: item[1].label):
                if name in self._files:
                    _check_unchanged(self._files[name].source, entry)
                elif accept is None or accept(entry.label):
                    self._load(name, entry)
        finally:  # files before a bad one are loaded all the same
            for name in ("files", "order", "_by_first", "_firsts"):
                self.__dict__.pop(name, None)
        return self._next_row - before + gone

    def _load(self, name: str, entry: FoundFile) -> None:
        state = (entry.size, entry.mtime_ns)
        if name in self._skipped and self._skipped[name][0] == state:
            return
        self._skipped.pop(name, None)
        try:
            source = self._store.load(Path(entry.path))
        except FileNotFoundError:  # removed since it was listed
            return
        except BadFileError as error:
            if self._strict:
                raise
            self._skipped[name] = (state, str(error))
            return
        newest = int(source.rows.column("policy_versions").max(initial=-1))
        self._files[name] = RowFile(
            source=source, label=entry.label, first=self._next_row, newest_version=newest
        )
        self._next_row += len(source.rows)

    @property
    def num_rows(self) -> int:
        return sum(len(file.source.rows) for file in self._files.values())

    @property
    def skipped(self) -> dict[str, str]:
        """Files that could not be used, and why."""
        return {name: message for name, (_, message) in self._skipped.items()}

    @cached_property
    def files(self) -> list[RowFile]:
        """The loaded files, oldest first: by their newest policy version, then by label."""
        return sorted(self._files.values(), key=lambda file: (file.newest_version, file.label))

    @cached_property
    def order(self) -> np.ndarray:
        """All row numbers, oldest first."""
        kind = np.int32 if self._next_row < 1 << 31 else np.int64
        return np.concatenate([np.zeros(0, kind), *(file.ids.astype(kind) for file in self.files)])

    def column(self, name: str) -> np.ndarray:
        """An index column of all rows, in `order`."""
        values = np.empty(self.num_rows, INDEX[name])
        start = 0
        for file in self.files:
            end = start + len(file.source.rows)
            values[start:end] = file.source.rows.column(name)
            start = end
        return values

    def locate(self, row: int) -> tuple[RowFile, int]:
        """The file that holds a row, and its place among that file's rows.

        Raises:
            KeyError: there is no such row, perhaps since its file is gone.
        """
        index = bisect.bisect_right(self._firsts, row) - 1
        if index >= 0:
            file = self._by_first[index]
            if row - file.first < len(file.source.rows):
                return file, row - file.first
        raise KeyError(f"row {row} is not in the buffer (any more); plan again after refresh()")

    def by_file(self, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[RowFile, np.ndarray]]:
        """Each file that has some of these rows, with their places among its rows."""
        wanted = np.sort(np.asarray(rows, np.int64))
        while len(wanted):
            file, _ = self.locate(int(wanted[0]))
            end = int(np.searchsorted(wanted, file.first + len(file.source.rows)))
            yield file, wanted[:end] - file.first
            wanted = wanted[end:]

    @cached_property
    def _by_first(self) -> list[RowFile]:
        filled = [file for file in self._files.values() if len(file.source.rows)]
        return sorted(filled, key=lambda file: file.first)

    @cached_property
    def _firsts(self) -> list[int]:
        return [file.first for file in self._by_first]


def _check_unchanged(source: SourceFile, entry: FoundFile) -> None:
    if (entry.size, entry.mtime_ns) != (source.size, source.mtime_ns):
        raise BadFileError(
            f"{entry.path} changed after it was read; row files are immutable: put new rows in new files"
        )
