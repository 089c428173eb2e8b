"""Reading folders of shards: torch's distributed format, without running any code that stands in them."""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors


class _PlainUnpickler(pickle.Unpickler):
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


class PlainReader(FileSystemReader):
    """Reads shards without running code from them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as handle:
                metadata = _PlainUnpickler(handle).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); it is torn, or not made by agro-lightning. Nothing in "
                "it was run"
            ) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainPlanner(DefaultLoadPlanner):
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
        load_tensors(state, storage_reader=PlainReader(folder), planner=PlainPlanner(), no_dist=alone)


def read_everything(folder: Path) -> dict[str, Any]:
    """All that the shards hold, put together in this process's CPU memory."""
    metadata = PlainReader(folder).read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.state_dict_metadata.items()
    }
    read_tensors(folder, flat, alone=True)
    state: dict[str, Any] = {}
    for name, path in metadata.planner_data.items():
        set_element(state, path, flat[name])
    return state
