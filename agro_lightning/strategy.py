"""The Lightning strategy for several ranks: FSDP and tensor parallelism, with explicit sizes."""

from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import ModelParallelStrategy


class Sharded(ModelParallelStrategy):
    """Shards policy, gradients, optimiser and reference over ranks; started by torchrun, srun or Lightning itself.

    Args:
        tensor_parallel_size: ranks that share every layer; they get the same data.
        data_parallel_size: ranks that get different data; "auto" is all ranks / tensor_parallel_size.
        timeout_seconds: how long a rank waits for the others before the job ends with an error.
    """

    def __init__(self, tensor_parallel_size: int = 1, data_parallel_size: int | Literal["auto"] = "auto",
                 timeout_seconds: float = 1800.0):
        super().__init__(data_parallel_size=data_parallel_size, tensor_parallel_size=tensor_parallel_size,
                         timeout=timedelta(seconds=timeout_seconds))

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            ranks = self.num_nodes * self.num_processes
            if ranks % self._tensor_parallel_size:  # type: ignore[operator] - an int here
                raise ValueError(f"tensor_parallel_size is {self._tensor_parallel_size}; it must divide the number of "
                                 f"ranks, {ranks}")
            self._data_parallel_size = ranks // self._tensor_parallel_size  # type: ignore[operator]
        super().setup_environment()
