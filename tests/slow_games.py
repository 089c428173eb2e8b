"""Games that stop between two turns of an episode, where a run is to be killed there."""

import os
import time
from pathlib import Path

from agro_lightning.environments import GuessNumber

PAUSE = "AGRO_TEST_PAUSE"
"""Names the run's folder; without it nobody waits."""


def pause_between_turns() -> None:
    """Once the run has its third checkpoint, says that an episode is between two turns, and stays there."""
    folder = os.environ.get(PAUSE)
    if folder and (Path(folder) / "checkpoints" / "step-00000003.ckpt").exists():
        (Path(folder) / "between-turns").touch()
        time.sleep(600)


class PausingGame(GuessNumber):
    """GuessNumber, whose answer to a first guess may never come."""

    def respond(self, text: str) -> str | None:
        answer = super().respond(text)
        if answer:
            pause_between_turns()
        return answer
