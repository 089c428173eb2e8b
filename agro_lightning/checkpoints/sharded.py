"""Sharded checkpoints: a folder that every rank writes its part of in the background, whole or absent.

Tensors are in torch's distributed format, what else a rank must remember in a file of its own. The folder is
written under another name, marked as complete once every rank is done, and only then given its name.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from agro_lightning.checkpoints.files import (
    MARKER,
    check_archive,
    check_shards,
    file_digest,
    is_sharded,
    read_marker,
    read_plain,
    tensor_bytes,
    write_tensors,
)
from agro_lightning.checkpoints.safe_dcp import read_everything, read_tensors
from agro_lightning.distributed.fsdp import DataRank
from agro_lightning.primitives.atomic_files import disk_full_error, is_disk_full, sync_directory
from agro_lightning.primitives.compat import tree_map_only
from agro_lightning.primitives.dtensor import fill


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


class ShardedSaver:
    """Writes checkpoints in a background thread, one at a time; errors surface at the next call.

    Args:
        place: this process among those that get different data.
        asynchronous: return once tensors are copied to CPU memory, rather than once they are on disk.
        timeout: how long ranks wait for each other.
    """

    def __init__(self, place: DataRank, *, asynchronous: bool, timeout: timedelta):
        self._place, self._asynchronous = place, asynchronous
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        # of its own: its collectives run in another thread than those of training
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._writing = False
        self._later: list[Callable[[], None]] = []

    def save(self, tensors: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
        """Saves tensors (sharded) and this rank's other state.

        Raises:
            DiskFullError: the previous checkpoint found no room; those before it stay valid.
        """
        self.wait()
        if self._asynchronous:
            tensors = tree_map_only(Tensor, _copy_to_cpu, tensors)
            rest = tree_map_only(Tensor, _copy_to_cpu, rest)
        self._writing = True
        self._thread = threading.Thread(
            target=self._run, args=(tensors, rest, path), daemon=True, name="checkpoint"
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is being written. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def afterwards(self, action: Callable[[], None]) -> None:
        """Runs on rank 0 once the checkpoint that is being written is complete; never where that fails."""
        if self._rank != 0:
            return
        with self._lock:
            if self._writing:
                self._later.append(action)
            else:
                action()

    def _run(self, tensors: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
        try:
            self._write(tensors, rest, path)
        except BaseException as error:  # handed to the main thread by wait()
            self._error = _explained(error, path, tensors)
        with self._lock:
            later, self._later, self._writing = self._later, [], False
            try:
                for action in later if self._error is None else ():
                    action()
            except OSError as error:
                self._error = error

    def _write(self, tensors: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
        aside = path.with_name(f".{path.name}.partial")

        def prepare() -> None:
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)

        self._together(prepare)
        save_tensors(tensors, storage_writer=FileSystemWriter(aside), process_group=self._group)

        def write_rest() -> dict[str, str]:
            with rank_file(aside, self._rank).open("wb") as handle:
                write_tensors({**rest, "data_rank": self._place.rank, "first": self._place.first}, handle)
            mine = [rank_file(aside, self._rank), *aside.glob(f"__{self._rank}_*.distcp")]
            mine += [aside / ".metadata"] if self._rank == 0 else []
            return {path.name: file_digest(path) for path in mine}

        digests = self._together(write_rest)

        def finish() -> None:
            if self._rank == 0:
                files = {name: digest for part in digests for name, digest in part.items()}
                marker = {"ranks": self._ranks, "global_step": rest.get("global_step"), "files": files}
                with (aside / MARKER).open("w") as handle:
                    json.dump(marker, handle)
                    handle.flush()
                    os.fsync(handle.fileno())
                sync_directory(aside)
                remove_folder(path)
                os.rename(aside, path)
                sync_directory(path.parent)

        self._together(finish)

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Runs on every rank and returns what each returned; what goes wrong on one is raised on all."""
        problem: Exception | None = None
        result = None
        try:
            result = action()
        except Exception as error:
            problem = error
        answers: list[Any] = [None] * self._ranks
        word = None if problem is None else str(problem)
        dist.all_gather_object(answers, (result, word), group=self._group)
        if problem is not None:
            raise problem
        for rank, (_, word) in enumerate(answers):
            if word is not None:
                raise OSError(f"rank {rank} could not write its part of a checkpoint: {word}")
        return [result for result, _ in answers]


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def _explained(error: BaseException, path: Path, tensors: dict[str, Any]) -> BaseException:
    causes = [error]
    if isinstance(error, CheckpointException):
        causes += [wrapped[0] for wrapped in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError) and is_disk_full(cause):
            return disk_full_error(
                cause,
                path,
                tensor_bytes(tensors),
            )
    return error


def remove_folder(path: Path) -> None:
    """Removes a checkpoint so that a reader sees the whole of it or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        gone = path.with_name(f".{path.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone)


def check_together(path: Path) -> None:
    """Compares a checkpoint with its digests; ranks share the files, and all raise what one of them finds.

    Raises:
        FileNotFoundError: no such checkpoint.
        DamagedCheckpointError: a file is missing or differs.
    """
    problem: Exception | None = None
    try:
        if is_sharded(path):
            check_shards(path, part=dist.get_rank(), parts=dist.get_world_size())
        elif dist.get_rank() == 0:
            check_archive(path)
    except (OSError, ValueError) as error:
        problem = error
    problems: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise problem


def load(path: Path, model: nn.Module, optimizers: list[Optimizer], place: DataRank) -> dict[str, Any]:
    """Reads this rank's part into model and optimisers, whatever the number of ranks that wrote it.

    Returns:
        The rest of the checkpoint: this rank's own where the ranks are as many as they were, else one put
        together from all.
    """
    ranks = int(read_marker(path)["ranks"])
    state = {"state_dict": get_model_state_dict(model)}
    read_tensors(path, state)
    set_model_state_dict(model, state["state_dict"])
    for index, optimizer in enumerate(optimizers):
        entry = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
        read_tensors(path, entry)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=entry[f"optimizer_{index}"])
    if ranks == dist.get_world_size():
        return read_rank(path, dist.get_rank())
    return merge_ranks([read_rank(path, rank) for rank in range(ranks)], place)


@torch.no_grad()
def load_single(
    single: dict[str, Any], model: nn.Module, optimizers: list[Optimizer], place: DataRank
) -> dict[str, Any]:
    """Copies this rank's part of what one process saved into model and optimisers; returns the rest.

    Args:
        single: the checkpoint, its tensors mapped from the file: only the parts are read.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    for name, parameter in state.items():
        fill(parameter, single["state_dict"][name].__getitem__)
    set_model_state_dict(model, state)
    for optimizer, saved in zip(optimizers, single["optimizer_states"], strict=True):
        entry: Any = get_optimizer_state_dict(model, optimizer)
        names = [name for group in entry["param_groups"] for name in group["params"]]
        for position, values in saved["state"].items():
            for key, value in values.items():
                fill(entry["state"][names[position]][key], value.__getitem__)
        for group, old in zip(entry["param_groups"], saved["param_groups"], strict=True):
            group |= {key: value for key, value in old.items() if key != "params"}
        set_optimizer_state_dict(model, optimizer, optim_state_dict=entry)
    rest = {key: value for key, value in single.items() if key not in ("state_dict", "optimizer_states")}
    return merge_ranks([{**rest, "data_rank": 0, "first": True}], place)


def load_whole(path: Path) -> dict[str, Any]:
    """What one process would have saved, from the shards of any number of ranks."""
    ranks = int(read_marker(path)["ranks"])
    alone = DataRank(rank=0, size=1, group=None, first=True)
    whole = merge_ranks([read_rank(path, rank) for rank in range(ranks)], alone)
    state = read_everything(path)
    names = sorted(name for name in state if name.startswith("optimizer_"))
    whole["state_dict"] = state["state_dict"]
    whole["optimizer_states"] = [_by_position(state[name]) for name in names]
    return whole


def _by_position(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with its parameters counted, as it is saved unsharded, rather than named."""
    groups = optimizer["param_groups"]
    position = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {position[name]: value for name, value in optimizer["state"].items()},
        "param_groups": [{**g, "params": [position[name] for name in g["params"]]} for g in groups],
    }


def read_rank(folder: Path, rank: int) -> dict[str, Any]:
    """One rank's state: tensors and plain values only; no code from the file is run."""
    return read_plain(rank_file(folder, rank))


def merge_ranks(states: list[dict[str, Any]], place: DataRank) -> dict[str, Any]:
    """One rank's state from those that another number of ranks saved.

    Cursors are global and equal on all ranks. Rollouts that were not used up, and groups in the making, are
    dealt out anew; random generators stay as the run's seed made them.
    """
    merged = dict(states[0])
    name = next((key for key, value in merged.items() if isinstance(value, dict) and "feed" in value), None)
    if name is None:
        return merged
    parts = [state[name] for state in sorted(states, key=lambda s: s["data_rank"]) if state["first"]]
    dealt = {}
    for kind in ("pending", "unfinished"):
        groups = [group for part in parts for group in part["feed"].get(kind, ())]
        cuts = [len(groups) * i // place.size for i in range(place.size + 1)]
        dealt[kind] = groups[cuts[place.rank] : cuts[place.rank + 1]]
    used = sum(part["completions_used"] for part in parts)
    merged[name] = {
        **merged[name],
        "feed": {**merged[name]["feed"], **dealt},
        "completions_used": used // place.size + (place.rank < used % place.size),
    }
    return merged
