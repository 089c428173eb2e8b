"""Where the seconds of a training step go."""

import time

import torch


class StepTimer:
    """Seconds by phase; a phase is named when it ends, and phases of one name add up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def start(self, device: torch.device) -> None:
        """Begins a phase; the time since the last one ended belongs to none."""
        self._since = self._now(device)

    def end(self, name: str, device: torch.device) -> None:
        """Ends the phase, and begins the next one."""
        now = self._now(device)
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """`seconds/<name>` of all phases since the last call."""
        taken, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in taken.items()}

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels run behind the launching code
        return time.perf_counter()
