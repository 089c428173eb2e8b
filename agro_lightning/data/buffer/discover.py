"""Finding row files under the paths that a user names."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agro_lightning import quickstart
from agro_lightning.data.buffer.reader import SUFFIXES
from agro_lightning.data.buffer.schema import BadFileError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A row file as a directory listing shows it."""

    path: str
    label: str
    """Its path within the folder that was named, or its name: the same wherever that folder lies. The whole
    path where two files would share a label."""
    size: int
    mtime_ns: int


def find_row_files(paths: Sequence[str], *, may_be_missing: bool) -> dict[str, FoundFile]:
    """Every Parquet and JSONL file under `paths`, by its real path, so that none is found twice.

    Works on plain strings, since a live buffer of thousands of files is listed again at every step.

    Args:
        paths: files; folders, searched at any depth, without names that start with "." or "_"; globs.
        may_be_missing: a path that does not exist is skipped instead of being an error.

    Raises:
        BadFileError: a path does not exist, or is a file of another kind.
    """
    found: dict[str, FoundFile] = {}
    folders: dict[str, str] = {}
    for given in paths:
        for path, label in _expand(given, may_be_missing):
            try:
                state = os.lstat(path)
                linked = stat.S_ISLNK(state.st_mode)
                state = os.stat(path) if linked else state
            except FileNotFoundError:
                if os.path.islink(path):
                    raise BadFileError(f"{path} is a link to a file that does not exist; remove it") from None
                continue  # removed since it was listed
            name = os.path.realpath(path) if linked else _real_name(path, folders)
            entry = FoundFile(path=path, label=label, size=state.st_size, mtime_ns=state.st_mtime_ns)
            found.setdefault(name, entry)
    labels = Counter(entry.label for entry in found.values())
    return {
        name: entry if labels[entry.label] == 1 else replace(entry, label=entry.path)
        for name, entry in found.items()
    }


def _real_name(path: str, folders: dict[str, str]) -> str:
    """As os.path.realpath of what is no link itself; `folders` remembers what is known of folders."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _expand(given: str, may_be_missing: bool) -> Iterator[tuple[str, str]]:
    if os.path.isdir(given):
        yield from _walk(given)
    elif os.path.exists(given):
        if not given.endswith(SUFFIXES):
            accepted = " and ".join(SUFFIXES)
            raise BadFileError(f"{given} is no row file; accepted are {accepted} files, and folders of them")
        yield given, os.path.basename(given)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches and not may_be_missing:
            raise BadFileError(f"no file matches {given}")
        for match in matches:
            if os.path.isdir(match):
                yield from _walk(match)
            elif match.endswith(SUFFIXES):
                yield match, os.path.basename(match)
    elif not may_be_missing:
        raise BadFileError(f"{given} does not exist; give {' or '.join(SUFFIXES)} files, folders, or globs")


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder may be removed while it is listed
        raise BadFileError(f"{error.filename} cannot be read ({error.strerror}); allow it") from None


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        within = os.path.relpath(parent, folder)
        for name in sorted(files):
            if name.endswith(SUFFIXES) and not name.startswith((".", "_")):
                label = name if within == os.curdir else os.path.join(within, name)
                yield os.path.join(parent, name), label


def offline_paths(paths: Sequence[str]) -> list[str]:
    """The paths, with the shipped buffer's for "quickstart"."""
    return [str(quickstart.FOLDER / "offline.parquet") if path == "quickstart" else path for path in paths]
