"""List columns as numpy arrays."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A list column as numpy arrays."""

    values: np.ndarray
    """All values end to end; null ones read as 0 or false."""
    offsets: np.ndarray
    """Row i holds values[offsets[i]:offsets[i + 1]]; a null row holds none."""
    nulls: np.ndarray
    """For each row, whether one of its values is null."""
    present: np.ndarray
    """For each row, whether it is there at all."""

    @classmethod
    def of(cls, column: pa.ListArray) -> "Ragged":
        values = column.flatten()  # leaves out what null rows may cover
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        nulls = np.zeros(len(column), dtype=bool)
        if values.null_count:
            nulls = _rows_with(values.is_null().to_numpy(zero_copy_only=False), offsets)
            values = values.fill_null(False if pa.types.is_boolean(values.type) else 0)
        return cls(
            values=values.to_numpy(zero_copy_only=False),
            offsets=offsets,
            nulls=nulls,
            present=column.is_valid().to_numpy(zero_copy_only=False),
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def sums(self) -> np.ndarray:
        """The sum of each row's values; of flags, how many are set."""
        return np.diff(np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])[self.offsets])

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def rows_with(self, values: np.ndarray) -> np.ndarray:
        """For each row, whether the mask holds for one of its values."""
        return _rows_with(values, self.offsets)


def _rows_with(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(offsets) - 1, dtype=bool)
    rows[np.searchsorted(offsets, np.flatnonzero(values), side="right") - 1] = True
    return rows
