"""Checkpoints of one process: whole or absent, durable, and loaded without running code from them."""

import contextlib
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO

from agro_lightning.checkpoints.sharded import is_sharded, load_whole, missing_checkpoint
from agro_lightning.primitives.atomic_files import disk_full_error, sync_directory

CHECKPOINT_KEY = "agro_lightning"
"""Where a checkpoint keeps what is needed to go on: settings, model config, random generators."""


def rng_state() -> dict[str, Any]:
    """This process's random generators, as tensors and plain values."""
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def gather_rng() -> list[dict[str, Any]]:
    """The random generators of every rank, in the order of ranks."""
    mine = rng_state()
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def set_rng(states: list[dict[str, Any]]) -> None:
    """Restores this rank's generators; at another number of ranks they stay as the run's seed made them."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if len(states) != world:
        return
    state = states[dist.get_rank() if world > 1 else 0]
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextlib.contextmanager
def plain_values_only(path: Any) -> Iterator[None]:
    """Explains why a checkpoint cannot be loaded with weights_only.

    Raises:
        ValueError: the file holds objects that only code could rebuild, or is no checkpoint at all.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read as tensors and plain values ({str(error).splitlines()[0]}); "
            "it is torn, or not made by agro-lightning. Nothing in it was run. Give another --ckpt_path"
        ) from None


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, syncs it, then renames it; reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Saves so that a reader sees the old file or the whole new one, also after a power loss.

        Raises:
            DiskFullError: there is no room; the checkpoints already there stay valid.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with aside.open("wb") as handle:
                torch.save(checkpoint, handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(aside, target)
        except (OSError, RuntimeError) as error:  # torch wraps a failed write into RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError) and (
                full := disk_full_error(cause, target, _tensor_bytes(checkpoint))
            ):
                raise full from None
            raise
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(target.parent)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads with weights_only, whatever the caller asked for; also the shards of a run on several ranks.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file holds objects that only code could rebuild, or is no checkpoint at all.
        """
        if is_sharded(Path(path)):
            return load_whole(Path(path))
        if not Path(path).exists():
            raise FileNotFoundError(missing_checkpoint(Path(path)))
        with plain_values_only(path):
            return super().load_checkpoint(path, map_location, weights_only=True)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0
