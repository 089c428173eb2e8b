"""One training process a run folder."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from agro_lightning.primitives.atomic_files import replace_text, writing
from agro_lightning.training.checkpointing import run_dir

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""How often the holder touches its file, which tells another node that it lives."""


class RunLock(Callback):
    """Refuses a second `fit` in a run folder while one is at work there.

    The first rank holds a lock on `.lock`, which ends with its process, and keeps `.lock.json` with its host,
    process and start. Where the file system has no locks, or the file names another host, the second process
    decides by that: a process of this host lives or not, one of another host touches the file every few
    seconds.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refused = self._hold(run_dir(trainer)) if trainer.is_global_zero else None
        refused = trainer.strategy.broadcast(refused)
        if refused:
            raise ValueError(refused)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._held.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._held.close()

    def _hold(self, folder: Path) -> str | None:
        """Takes the folder; returns why it cannot be taken, in words."""
        about, lock = folder / ".lock.json", folder / ".lock"
        with writing(lock, 0):
            folder.mkdir(parents=True, exist_ok=True)
            handle = self._held.enter_context(lock.open("a"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            return _refusal(folder, _read(about))
        except OSError as error:
            log.warning(
                "the file system of %s has no locks (%s): %s takes their place", folder, error, about.name
            )
        other = _read(about)
        if other and other["process"] != os.getpid() and _lives(other, about):
            self._held.close()
            return _refusal(folder, other)
        if other:
            log.warning("%s was left by %s which is gone", about, _words(other))
        replace_text(about, json.dumps(_myself()))
        self._held.enter_context(_beating(about))
        return None


def _myself() -> dict[str, Any]:
    now = datetime.now().isoformat(" ", timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid()), "at": now}


def _started(process: int) -> str | None:
    """When a process of this host began, in clock ticks since the host did; None where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _read(about: Path) -> dict[str, Any]:
    """What the file says; empty where it is absent or torn."""
    try:
        read = json.loads(about.read_text())
        return read if {"host", "process", "started", "at"} <= read.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _lives(other: dict[str, Any], about: Path) -> bool:
    """Whether the process that left the file is at work."""
    if other["host"] == socket.gethostname():
        return _started(other["process"]) == other["started"] is not None
    before = about.stat().st_mtime_ns
    log.info("%s names %s; waiting to see whether that is at work", about, _words(other))
    until = time.monotonic() + 3 * BEAT_SECONDS
    while time.monotonic() < until:
        time.sleep(0.2)
        with contextlib.suppress(FileNotFoundError):
            if about.stat().st_mtime_ns != before:
                return True
    return False


def _words(other: dict[str, Any]) -> str:
    if not other:
        return "another process"
    return f"process {other['process']} on {other['host']}, started {other['at']},"


def _refusal(folder: Path, other: dict[str, Any]) -> str:
    return (
        f"{folder} is in use: {_words(other)} trains there. Wait for it or stop it, or give another --run_dir"
    )


@contextlib.contextmanager
def _beating(about: Path) -> Iterator[None]:
    """Touches the file every few seconds; removes it at the end."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(about)

    thread = threading.Thread(target=beat, daemon=True, name="run lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        about.unlink(missing_ok=True)
