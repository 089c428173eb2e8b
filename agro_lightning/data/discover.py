"""Finding row files under the paths that a user names."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agro_lightning.data.reader import SUFFIXES
from agro_lightning.data.schema import BadFileError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A row file as a directory listing shows it."""

    path: Path
    label: str
    """Its path within the folder that was named, or its name: the same wherever that folder lies. The whole
    path where two files would share a label."""
    size: int
    mtime_ns: int


def find_row_files(paths: Sequence[str], *, may_be_missing: bool) -> dict[str, FoundFile]:
    """Every Parquet and JSONL file under `paths`, by its real path, so that none is found twice.

    Args:
        paths: files; folders, searched at any depth, without names that start with "." or "_"; globs.
        may_be_missing: a path that does not exist is skipped instead of being an error.

    Raises:
        BadFileError: a path does not exist, or is a file of another kind.
    """
    found: dict[str, FoundFile] = {}
    for given in paths:
        for path, label in _expand(given, may_be_missing):
            try:
                stat = path.stat()
            except FileNotFoundError:
                if path.is_symlink():
                    raise BadFileError(f"{path} is a link to a file that does not exist; remove it") from None
                continue  # removed since it was listed
            entry = FoundFile(path=path, label=label, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
            found.setdefault(os.path.realpath(path), entry)
    labels = Counter(entry.label for entry in found.values())
    return {
        real: entry if labels[entry.label] == 1 else _with_whole_path(entry) for real, entry in found.items()
    }


def _with_whole_path(entry: FoundFile) -> FoundFile:
    return FoundFile(path=entry.path, label=str(entry.path), size=entry.size, mtime_ns=entry.mtime_ns)


def _expand(given: str, may_be_missing: bool) -> Iterator[tuple[Path, str]]:
    path = Path(given)
    if path.is_dir():
        yield from _walk(path)
    elif path.exists():
        if path.suffix not in SUFFIXES:
            raise BadFileError(
                f"{given} is no row file; accepted are {' and '.join(SUFFIXES)} files, and folders"
            )
        yield path, path.name
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches and not may_be_missing:
            raise BadFileError(f"no file matches {given}")
        for match in map(Path, matches):
            if match.is_dir():
                yield from _walk(match)
            elif match.suffix in SUFFIXES:
                yield match, match.name
    elif not may_be_missing:
        raise BadFileError(
            f"{given} does not exist; give .parquet or .jsonl files, folders that hold some, or globs"
        )


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(files):
            if name.endswith(SUFFIXES) and not name.startswith((".", "_")):
                path = Path(parent, name)
                yield path, path.relative_to(folder).as_posix()
