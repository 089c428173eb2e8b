"""The policy's weights in a checkpoint, one tensor at a time: a single file, or a folder of shards."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from agro_lightning.checkpoints.safe_dcp import PlainReader, read_tensors
from agro_lightning.checkpoints.sharded import read_marker, read_rank
from agro_lightning.checkpoints.single_file import CHECKPOINT_KEY

PREFIX = "policy.lm."


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """Weights that stay on disk until they are read."""

    about: dict[str, Any]
    """What the checkpoint says of the policy: settings and the model's config."""
    shapes: dict[str, Tensor]
    """Meta tensors by the names of the transformers model."""
    mapped: dict[str, Tensor] | None
    """The tensors of a single file, memory-mapped."""
    folder: Path | None
    """The shards."""

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors, in CPU memory."""
        if self.mapped is not None:
            return {name: self.mapped[name].detach() for name in names}
        assert self.folder is not None
        wanted = {
            f"state_dict.{PREFIX}{name}": torch.empty_like(self.shapes[name], device="cpu") for name in names
        }
        read_tensors(self.folder, wanted, alone=True)
        return {name: wanted[f"state_dict.{PREFIX}{name}"] for name in names}


def open_policy(ckpt: str) -> PolicySource:
    """Opens a checkpoint; nothing but tensors and plain values is read, and no code from it is run.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is half-written, torn, or not one of agro-lightning's.
    """
    path = Path(ckpt)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {ckpt} does not exist; look into the run's folder checkpoints/")
    if path.is_dir():
        read_marker(path)
        about = read_rank(path, 0)
        shapes = {
            name.removeprefix(f"state_dict.{PREFIX}"): torch.empty(
                entry.size, dtype=entry.properties.dtype, device="meta"
            )
            for name, entry in PlainReader(path).read_metadata().state_dict_metadata.items()
            if name.startswith(f"state_dict.{PREFIX}") and isinstance(entry, TensorStorageMetadata)
        }
        return PolicySource(about=_about(about, ckpt), shapes=shapes, mapped=None, folder=path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{ckpt} cannot be read as tensors and plain values ({str(error).splitlines()[0]}); it is "
            "torn, or not made by agro-lightning. Nothing in it was run"
        ) from None
    about = _about(loaded, ckpt)
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in loaded["state_dict"].items()
        if name.startswith(PREFIX)
    }
    shapes = {name: value.to("meta") for name, value in weights.items()}
    return PolicySource(about=about, shapes=shapes, mapped=weights, folder=None)


def _about(loaded: dict[str, Any], ckpt: str) -> dict[str, Any]:
    if CHECKPOINT_KEY not in loaded:
        raise ValueError(f"{ckpt} was not written by agro-lightning (it has no {CHECKPOINT_KEY!r} entry)")
    return loaded[CHECKPOINT_KEY]
