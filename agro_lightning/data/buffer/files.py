"""The row files of a buffer: finding them, which are loaded, and which row number is in which file."""

import bisect
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from agro_lightning import quickstart
from agro_lightning.data.buffer.reader import SUFFIXES
from agro_lightning.data.buffer.schema import BadFileError
from agro_lightning.data.buffer.store import PackedFile, Record, RowStore


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A row file in a directory listing."""

    path: str
    label: str
    """Its path within the folder that was named, or its name: the same wherever that folder is. The whole
    path where two files would share a label."""
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """A loaded file; its rows have the numbers first..first+len(file)-1 in the buffer."""

    source: PackedFile
    label: str
    """See FoundFile."""
    first: int
    newest_version: int
    """The newest policy version of its rows; -1 where none is recorded."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def ids(self) -> np.ndarray:
        """Its rows' numbers in the buffer."""
        return np.arange(self.first, self.first + len(self))


class FileSet:
    """Loads files as they appear. Rows are numbered in the order of loading, and keep their numbers."""

    def __init__(self, paths: Sequence[str], store: RowStore, *, strict: bool, live: bool) -> None:
        """
        Args:
            paths: see find_row_files.
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
        gone = sum(len(self._files.pop(name)) for name in self._files.keys() - found.keys())
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
        newest = int(source.index["version"].max(initial=-1))
        self._files[name] = RowFile(
            source=source, label=entry.label, first=self._next_row, newest_version=newest
        )
        self._next_row += len(source)

    @property
    def num_rows(self) -> int:
        return sum(len(file) for file in self._files.values())

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
        """An index column of all rows (see PackedFile.index), in `order`."""
        return np.concatenate([np.zeros(0, np.uint8), *(file.source.index[name] for file in self.files)])

    def read(self, row: int) -> tuple[Record, str]:
        """A row, and its name: file and row number there.

        Raises:
            KeyError: there is no such row, perhaps since its file is gone.
        """
        place = bisect.bisect_right(self._firsts, row) - 1
        file = self._by_first[max(0, place)] if self._firsts else None
        if file is None or not 0 <= row - file.first < len(file):
            raise KeyError(f"row {row} is not in the buffer (any more); plan again after refresh()")
        position = row - file.first
        return file.source.read(position), f"{file.source.path}:{file.source.index['number'][position]}"

    @cached_property
    def _by_first(self) -> list[RowFile]:
        return sorted((file for file in self._files.values() if len(file)), key=lambda file: file.first)

    @cached_property
    def _firsts(self) -> list[int]:
        return [file.first for file in self._by_first]


def _check_unchanged(source: PackedFile, entry: FoundFile) -> None:
    if (entry.size, entry.mtime_ns) != (source.size, source.mtime_ns):
        raise BadFileError(
            f"{entry.path} changed after it was read; row files are immutable: put new rows in new files"
        )


def find_row_files(
    paths: Sequence[str], *, may_be_missing: bool, suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, FoundFile]:
    """Every file with such a suffix under `paths`, by its real path, so that none is found twice.

    Works on plain strings, since a live buffer of thousands of files is listed again at every step.

    Args:
        paths: files; folders, searched at any depth, without names that start with "." or "_"; globs.
        may_be_missing: a path that does not exist is skipped instead of being an error.
        suffixes: how the files' names end.

    Raises:
        BadFileError: a path does not exist, or is a file of another kind.
    """
    found: dict[str, FoundFile] = {}
    folders: dict[str, str] = {}
    for given in map(os.path.expanduser, paths):
        for path, label in _expand(given, may_be_missing, suffixes):
            try:
                state = os.lstat(path)
                linked = stat.S_ISLNK(state.st_mode)
                state = os.stat(path) if linked else state
            except FileNotFoundError:
                if os.path.islink(path):
                    raise BadFileError(f"{path} is a link to a file that does not exist; remove it") from None
                continue  # removed since it was listed
            folder, name = os.path.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            real = os.path.realpath(path) if linked else os.path.join(folders[folder], name)
            entry = FoundFile(path=path, label=label, size=state.st_size, mtime_ns=state.st_mtime_ns)
            found.setdefault(real, entry)
    labels = Counter(entry.label for entry in found.values())
    return {
        name: entry if labels[entry.label] == 1 else replace(entry, label=entry.path)
        for name, entry in found.items()
    }


def _expand(given: str, may_be_missing: bool, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(path, label) of the row files that one path names."""
    if os.path.isdir(given):
        yield from _walk(given, suffixes)
    elif os.path.exists(given):
        if not given.endswith(suffixes):
            accepted = " and ".join(suffixes)
            raise BadFileError(f"{given} is no row file; accepted are {accepted} files, and folders of them")
        yield given, os.path.basename(given)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches and not may_be_missing:
            raise BadFileError(f"no file matches {given}")
        for match in matches:
            if os.path.isdir(match):
                yield from _walk(match, suffixes)
            elif match.endswith(suffixes):
                yield match, os.path.basename(match)
    elif not may_be_missing:
        raise BadFileError(f"{given} does not exist; give {' or '.join(suffixes)} files, folders, or globs")


def _walk(folder: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a folder may be removed while it is listed
            raise BadFileError(f"{error.filename} cannot be read ({error.strerror}); allow it") from None

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        within = os.path.relpath(parent, folder)
        for name in sorted(files):
            if name.endswith(suffixes) and not name.startswith((".", "_")):
                label = name if within == os.curdir else os.path.join(within, name)
                yield os.path.join(parent, name), label


def offline_paths(paths: Sequence[str]) -> list[str]:
    """The paths, with the shipped buffer's for "quickstart"."""
    return [str(quickstart.FOLDER / "offline.parquet") if path == "quickstart" else path for path in paths]
