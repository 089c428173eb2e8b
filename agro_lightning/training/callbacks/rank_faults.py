"""Which rank is to blame where a job of several ranks fails."""

import logging
import re
import time
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from agro_lightning.primitives.compat import default_store

log = logging.getLogger(__name__)

LOST = re.compile(r"gloo/|NCCL|ProcessGroup|TCPStore|c10d")
"""Names in what torch raises where another rank does not answer; other errors are a rank's own."""


class NameLostRank(Callback):
    """Where a rank fails because another does not answer, names those that ended without a word.

    A rank that fails by itself says so to the others and blames nobody: its own error tells what happened.

    Args:
        wait_seconds: how long the others have to report their own failure.
    """

    def __init__(self, wait_seconds: float = 3.0) -> None:
        self.wait_seconds = wait_seconds

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SystemExit) or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        try:
            self._report(default_store(), exception)
        except (RuntimeError, ValueError) as error:  # also torch's DistStoreError
            if is_lost_connection(exception):
                log.error(
                    "rank %d: the processes' common store is gone (%s): rank 0's node, or the launcher's",
                    dist.get_rank(),
                    str(error).splitlines()[0],
                )

    def _report(self, store: Any, exception: BaseException) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        keys = [f"agro_lightning/failed/{other}" for other in range(ranks)]
        waited = is_lost_connection(exception)
        store.set(keys[rank], "waited" if waited else type(exception).__name__)
        if not waited:
            return
        until = time.monotonic() + self.wait_seconds
        silent = [other for other in range(ranks) if other != rank]
        while silent and time.monotonic() < until:
            silent = [other for other in silent if not store.check([keys[other]])]
            time.sleep(0.1)
        said = [store.get(keys[other]).decode() if other not in silent else "" for other in range(ranks)]
        failed = [
            f"rank {other} ({said[other]})" for other in range(ranks) if said[other] not in ("", "waited")
        ]
        if failed:
            log.error("rank %d stopped because of %s, whose own error is above", rank, ", ".join(failed))
        elif silent:
            log.error(
                "rank %d stopped with %s because of rank %s, which gave no sign of life: killed, out of "
                "memory, or its machine is gone. --ckpt_path last goes on from the last complete checkpoint",
                rank,
                type(exception).__name__,
                ", ".join(map(str, silent)),
            )


def is_lost_connection(exception: BaseException) -> bool:
    """Whether it was raised because another rank does not answer."""
    return isinstance(exception, dist.DistError) or bool(
        type(exception) is RuntimeError and LOST.search(str(exception))
    )
