"""How often each row was used, so that no row is trained on more often than configured."""

import base64
import zlib
from typing import Any

import numpy as np

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.files import RowFile


class UseLedger:
    """Counts uses by file and row number, so that they hold whatever order the files are loaded in.

    Its state belongs in the trainer's checkpoint, next to the weights that the uses produced: a restart then
    counts exactly the uses that those weights have seen.
    """

    def __init__(self, max_uses: int) -> None:
        """
        Args:
            max_uses: how often a row may be used, 1 to 255.
        """
        if not 1 <= max_uses <= 255:
            raise ValueError(f"max_uses is {max_uses}; it must be 1 to 255")
        self.max_uses = max_uses
        self._uses: dict[str, np.ndarray] = {}

    def available(self, buffer: RolloutBuffer) -> np.ndarray:
        """The rows of a buffer that may be used once more, for RolloutBuffer.select."""
        left = [self._left(file) for file in buffer.files]
        return np.concatenate([np.zeros(0, np.int64), *left])

    def record(self, buffer: RolloutBuffer, rows: np.ndarray | list[int]) -> None:
        """Counts one use of each of these rows, twice where one stands twice.

        Raises:
            ValueError: a row would have been used more than max_uses times; nothing is counted then.
        """
        counted: dict[str, np.ndarray] = {}
        for file, places in buffer.by_file(rows):
            all_numbers = file.source.rows.column("numbers")
            new = self._uses_up_to(file.label, int(all_numbers.max())).astype(np.int64)
            numbers = all_numbers[places]
            np.add.at(new, numbers, 1)
            worst = int(numbers[np.argmax(new[numbers])])
            if new[worst] > self.max_uses:
                times = f"{new[worst]} times; max_uses is {self.max_uses}"
                raise ValueError(f"row {file.source.path}:{worst} would be used {times}")
            counted[file.label] = new.astype(np.uint8)
        self._uses.update(counted)

    def uses(self, label: str) -> np.ndarray:
        """Uses by row number in the file with that label (see discover.FoundFile); empty if it has none."""
        return self._uses.get(label, np.zeros(0, np.uint8))

    def forget(self, labels: set[str]) -> None:
        """Drops the counts of files that were removed for good."""
        for label in labels & self._uses.keys():
            del self._uses[label]

    def state_dict(self) -> dict[str, Any]:
        """Plain strings and numbers, for a checkpoint or JSON."""
        counts = {
            label: base64.b85encode(zlib.compress(uses.tobytes())).decode()
            for label, uses in sorted(self._uses.items())
        }
        return {"max_uses": self.max_uses, "uses": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the counts; max_uses stays this run's."""
        self._uses = {
            label: np.frombuffer(zlib.decompress(base64.b85decode(packed)), np.uint8)
            for label, packed in state["uses"].items()
        }

    def _left(self, file: RowFile) -> np.ndarray:
        if file.label not in self._uses:
            return file.ids
        numbers = file.source.rows.column("numbers")
        return file.ids[self._uses_up_to(file.label, int(numbers.max(initial=0)))[numbers] < self.max_uses]

    def _uses_up_to(self, label: str, number: int) -> np.ndarray:
        """Uses by row number, with zeros up to `number` at least."""
        uses = self.uses(label)
        return np.pad(uses, (0, max(0, number + 1 - len(uses))))
