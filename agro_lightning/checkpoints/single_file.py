"""Checkpoints of one process: whole or absent, durable, and loaded without running code from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from agro_lightning.checkpoints.files import (
    check_checkpoint,
    damaged,
    first_sound,
    is_sharded,
    older_checkpoints,
    read_plain,
    tensor_bytes,
    write_tensors,
)
from agro_lightning.checkpoints.sharded import load_whole
from agro_lightning.primitives.atomic_files import atomic_path

CHECKPOINT_KEY = "agro_lightning"
"""Where a checkpoint keeps what is needed to go on: settings, model config, random generators."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, syncs it, then renames it; reads tensors and plain values only."""

    def __init__(self) -> None:
        super().__init__()
        self.fall_back = False
        """Whether an older checkpoint of the folder may take the place of a damaged one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Saves so that a reader sees the old file or the whole new one, also after a power loss.

        Raises:
            DiskFullError: there is no room; the checkpoints already there stay valid.
        """
        target = Path(path)
        with (
            atomic_path(target, needed=lambda: tensor_bytes(checkpoint)) as aside,
            aside.open("wb") as handle,
        ):
            write_tensors(checkpoint, handle)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads with weights_only, whatever the caller asked for; also the shards of a run on several ranks.

        Raises:
            FileNotFoundError: no such file.
            DamagedCheckpointError: its bytes have changed, it holds objects that only code could rebuild, or
                something else than a run's state.
        """
        path = Path(path).resolve()
        sound = first_sound([path, *(older_checkpoints(path) if self.fall_back else ())], check_checkpoint)
        if is_sharded(sound):
            return load_whole(sound)
        found = read_plain(sound)
        if not isinstance(found, dict) or not {"state_dict", "global_step"} <= found.keys():
            raise damaged(sound, "it holds no state_dict and global_step of a run")
        return found
