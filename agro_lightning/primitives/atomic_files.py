"""Writing files and folders that are whole or absent, whatever happens meanwhile."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class DiskFullError(OSError):
    """No room for a file; what was there before is untouched."""

    def __str__(self) -> str:
        return str(self.strerror)


def is_disk_full(error: OSError) -> bool:
    """Whether it says that there is no room: on the disk, in the quota, or below the limit on file sizes."""
    return error.errno in _FULL


def disk_full_error(error: OSError, target: Path, needed: int | None = None) -> DiskFullError:
    """What was needed to write `target` and what is free."""
    folder = next((parent for parent in target.absolute().parents if parent.exists()), Path("/"))
    need = "more" if needed is None else f"{needed:,} bytes"
    return DiskFullError(
        error.errno,
        f"no room to write {target.name}: {need} are needed, {free_space(folder)} ({error.strerror}). Files "
        "already there are untouched; free space, or write elsewhere",
    )


def free_space(folder: Path) -> str:
    """What is free in `folder`, in words: bytes, and where few more files fit, how many."""
    about = os.statvfs(folder)
    files = f", and {about.f_favail} files more" if about.f_files and about.f_favail < 16 else ""
    return f"{about.f_bavail * about.f_frsize:,} are free in {folder}{files}"


@contextlib.contextmanager
def atomic_path(
    path: Path, *, replace: bool = True, needed: int | Callable[[], int] | None = None
) -> Iterator[Path]:
    """Yields a hidden name beside `path` to write a file or folder at; then syncs and renames it.

    A reader, and a run that starts after a kill or a power loss, finds what was there before or the whole new
    file. Missing parent folders are made. Where the block fails, what it wrote is removed.

    Args:
        path: the final name. A folder of that name must be moved away within the block.
        replace: whether a file of that name may be there already.
        needed: bytes that are written, for the message of a full disk.

    Raises:
        FileExistsError: `replace` is False and the name is taken.
        DiskFullError: there is no room; nothing new is visible.
        OSError: the folder cannot be written to; names `path`.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with writing(path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            _sync(aside)
            if replace:
                os.replace(aside, path)
            else:
                _name_once(aside, path)
            sync_directory(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # the block's own error is the one to see
                aside.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, needed: int | Callable[[], int] | None = None) -> Iterator[None]:
    """Explains what the operating system says while `path` is written, also where a library wraps it.

    Raises:
        DiskFullError: there is no room.
        OSError: the folder cannot be written to; names `path`.
    """
    try:
        yield
    except Exception as error:
        cause = None if isinstance(error, DiskFullError) else _cause(error)
        if cause is not None and is_disk_full(cause):
            raise disk_full_error(cause, path, needed() if callable(needed) else needed) from None
        code = 0 if cause is None or cause.errno is None else cause.errno
        if code == errno.EEXIST and not path.parent.is_dir():  # a file where a folder was to be made
            code = errno.ENOTDIR
        if code not in _NOT_WRITABLE:
            raise
        raise OSError(code, f"cannot write {path}: {os.strerror(code)}; give another folder") from error


def _cause(error: BaseException | None) -> OSError | None:
    """What the operating system said: torch hides it in the context, safetensors in the words."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(code[1]), os.strerror(int(code[1])))
        error = error.__cause__ or error.__context__
    return None


def next_free(path: Path) -> Path:
    """The first of name-1.suffix, name-2.suffix and so on that is not there."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def append(path: Path, data: bytes, at: int | None = None) -> None:
    """Writes `data` at the file's end, or from `at` on, where the file then ends; all of it or nothing."""
    with path.open("r+b" if path.exists() else "xb", buffering=0) as handle:
        start = handle.seek(0, os.SEEK_END) if at is None else handle.seek(at)
        view = memoryview(data)
        try:
            while view:
                view = view[handle.write(view) :]
        finally:
            handle.truncate(start if view else start + len(data))


def sync_directory(directory: Path) -> None:
    """Makes names created, renamed or removed in `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_once(path: Path, data: bytes) -> None:
    """Writes a new immutable file, which is never overwritten.

    Raises:
        FileExistsError: there is a file of that name.
        DiskFullError: there is no room; nothing new is visible and nothing is left behind.
    """
    with atomic_path(path, replace=False, needed=len(data)) as aside:
        aside.write_bytes(data)


def replace_text(path: Path, text: str) -> None:
    """Writes a small text file: readers, and a kill, find the old text or the new."""
    with atomic_path(path, needed=len(text)) as aside:
        aside.write_text(text)


def _sync(path: Path) -> None:
    """Writes a file, or a folder with all in it, through to the disk."""
    for inner in (*(path.rglob("*") if path.is_dir() else ()), path):
        if not inner.is_symlink():
            sync_directory(inner)  # a file's descriptor is synced alike


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
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                removed += 1
        except FileNotFoundError:  # its writer ended meanwhile
            continue
    return removed
