"""A server that the trainer starts, watches, and takes down with itself."""

import os
import signal
import subprocess
import time
import weakref
from pathlib import Path

import httpx

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 20.0
"""How long a server may take to stop before it is killed."""


class ServerProcess:
    """A process that serves HTTP, with its children; it ends with this object or this process at the latest.

    Args:
        command: program and arguments.
        environment: all of its environment variables.
        address: where it serves; /health answers 200 when it is ready.
        log: file that its output goes to.
        timeout_s: longest wait for it to be ready.

    Raises:
        RuntimeError: it ended, or was not ready in time; with the end of its log.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], *, address: str, log: Path, timeout_s: float
    ) -> None:
        self.address, self.log = address, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._end = weakref.finalize(self, _end_session, self._process)
        deadline = time.monotonic() + timeout_s
        while not self._ready():
            self.check()
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server was not ready after {timeout_s:g} s. {self._log_end()}")
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raises RuntimeError with the end of the log where the server has ended."""
        if self._process.poll() is not None:
            self._end()
            raise RuntimeError(f"the server ended with code {self._process.returncode}. {self._log_end()}")

    def stop(self) -> None:
        """Ends the server and its children."""
        self._end()

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return f"The end of {self.log}:\n" + "\n".join(lines)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of the session that the server leads: politely, then for certain."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(_PATIENCE_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
