"""Writing files that are whole or absent, whatever happens meanwhile."""

import errno
import os
import shutil
import time
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class DiskFullError(OSError):
    """No room for a file; what was there before is untouched."""


def is_disk_full(error: OSError) -> bool:
    """Whether it says that there is no room: on the disk, in the quota, or below the limit on file sizes."""
    return error.errno in _FULL


def disk_full_error(error: OSError, target: Path, needed: int) -> DiskFullError:
    """What was needed to write `target` and what is free."""
    free = shutil.disk_usage(target.parent).free
    return DiskFullError(
        error.errno,
        f"no room to write {target.name}: {needed:,} bytes are needed, {free:,} are free in {target.parent} "
        f"({error.strerror}). Files already there are untouched; free space, or write elsewhere",
    )


def sync_directory(directory: Path) -> None:
    """Makes names created, renamed or removed in `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_once(path: Path, data: bytes) -> None:
    """Writes a new immutable file: aside under a hidden name, synced, then given its name in one step.

    A reader sees the whole file or none. Nothing is ever overwritten.

    Raises:
        FileExistsError: there is a file of that name.
        DiskFullError: there is no room; nothing new is visible and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with temporary.open("xb", buffering=0) as handle:
            view = memoryview(data)
            while view:
                view = view[handle.write(view) :]
            os.fsync(handle.fileno())
        _name_once(temporary, path)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full_error(error, path, len(data)) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Writes a small text file aside and renames it: readers, and a kill, find the old text or the new."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)


def _name_once(temporary: Path, path: Path) -> None:
    """Gives the file its final name unless that is taken (a plain rename would overwrite)."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():  # file systems without hard links: the check and the rename are two steps
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)


def remove_temporaries(directory: Path, *, older_than_s: float = 3600.0) -> int:
    """Removes what writers that were killed left aside in `directory`; returns how many files."""
    removed = 0
    for leftover in directory.glob(".*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime >= older_than_s:
                leftover.unlink()
                removed += 1
        except FileNotFoundError:  # its writer ended meanwhile
            continue
    return removed
