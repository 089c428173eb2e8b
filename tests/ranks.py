"""Runs a function on several real processes with gloo, started from a fork server with imports done."""

import io
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

_PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.llama",
    "transformers.models.qwen3",
    "lightning",
    "agro_lightning.training.module",
    "agro_lightning.training.strategy",
    "tiny_models",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    context.set_forkserver_preload(_PRELOAD)
    return context


def _main(
    function: Callable[..., Any], rank: int, world: int, port: int, args: tuple, answer: Connection
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        result = io.BytesIO()  # tensors by value: shared memory would end with this process
        torch.save(function(rank, world, *args), result)
        answer.send((None, result.getvalue()))
    except BaseException:
        answer.send((traceback.format_exc(), None))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0, grace: float = 5.0
) -> list[Any]:
    """What `function(rank, world, *args)` returned on each rank. Raises AssertionError with the tracebacks.

    Args:
        timeout: seconds until ranks without an answer are killed.
        grace: seconds that the others have once one has failed.
    """
    context, port = _context(), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_main, args=(function, rank, world, port, args, pipes[rank][1]), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    results: dict[int, Any] = {}
    errors: list[str] = []
    waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    try:
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                errors += [f"rank {rank}: no answer" for rank in waiting.values()]
                break
            for receiver in ready:
                rank = waiting.pop(receiver)
                try:
                    error, result = receiver.recv()
                except EOFError:
                    error, result = "died without an answer", None
                if error:
                    errors.append(f"rank {rank}: {error}")
                    deadline = min(deadline, time.monotonic() + grace)  # the others may wait for it for ever
                else:
                    results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    finally:
        for process in processes:
            process.join(0.1 if errors else 10.0)
            if process.is_alive():
                process.kill()
                process.join()
    assert not errors, "\n".join(errors)
    return [results[rank] for rank in range(world)]
