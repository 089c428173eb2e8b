"""Reading folders of shards: torch's distributed format, without running any code that stands in them."""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from agro_lightning.checkpoints.files import damaged
from agro_lightning.primitives.compat import set_element


class _SafeUnpickler(pickle.Unpickler):
    """Rebuilds the description of tensors that torch pickles into .metadata, and nothing else."""

    _classes = {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("collections", "OrderedDict"),
        ("pathlib._local", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        found: Any = None
        if (module, name) in self._classes:
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        elif module == "torch.distributed.checkpoint.metadata" and "." in name:
            outer, _, inner = name.partition(".")  # torch writes some members by their dotted names
            if (module, outer) in self._classes:
                found = getattr(super().find_class(module, outer), inner)
        if found is None:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint of agro-lightning does"
            )
        return found


class SafeDcpReader(FileSystemReader):
    """Reads shards without running code from them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as handle:
                metadata = _SafeUnpickler(handle).load()
            storage, load_id = metadata.storage_meta or StorageMeta(), self.load_id
        except Exception as error:  # changed bytes make the unpickler raise nearly anything
            raise damaged(path, error or type(error).__name__) from None
        metadata.storage_meta, storage.load_id = storage, load_id
        return metadata


class SafeDcpPlanner(DefaultLoadPlanner):
    """Loads entries that are no tensors as plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # refuses what is not plain
        plain.seek(0)
        super().load_bytes(read_item, plain)


def read_tensors(folder: Path, state: dict[str, Any], *, alone: bool = False) -> None:
    """Fills the state from a folder of shards; `alone` without any other rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_tensors(state, storage_reader=SafeDcpReader(folder), planner=SafeDcpPlanner(), no_dist=alone)


def read_everything(folder: Path, prefix: str = "") -> dict[str, Any]:
    """What the shards hold under names with this prefix, put together in this process's CPU memory."""
    metadata = SafeDcpReader(folder).read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(prefix)
    }
    read_tensors(folder, flat, alone=True)
    state: dict[str, Any] = {}
    for name, value in flat.items():
        set_element(state, metadata.planner_data[name], value)
    return state
