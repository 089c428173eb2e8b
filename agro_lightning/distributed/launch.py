"""Starting on several processes: which strategy, which run folder, and SLURM."""

import logging
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

log = logging.getLogger(__name__)

RUN_DIR = "AGRO_RUN_DIR"
"""Environment variable that gives the run folder to processes that Lightning starts (with a LOCAL_RANK)."""


def number_of_ranks(config: dict[str, Any]) -> int:
    """Processes of a run, from the launcher's environment or from trainer.devices and trainer.num_nodes."""
    launched = os.environ.get("WORLD_SIZE") or (
        os.environ.get("SLURM_NTASKS") if SLURMEnvironment.detect() else None
    )
    if launched:
        return int(launched)
    devices = config.get("devices")
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        count = len(devices)
    elif isinstance(devices, int) and devices >= 0:
        count = devices
    elif config.get("accelerator") == "cpu":
        count = 1
    else:  # "auto", -1
        count = max(1, torch.cuda.device_count())
    return count * int(config.get("num_nodes") or 1)


def was_launched() -> bool:
    """Whether torchrun, srun or Lightning started this process, which then is told its run folder."""
    return bool({"WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()) or SLURMEnvironment.detect()


def check_nodes(config: dict[str, Any]) -> None:
    """Several nodes need a launcher, or to be told where they meet; otherwise this one would wait in vain.

    Raises:
        ValueError: trainer.num_nodes is above 1, and neither is there.
    """
    nodes = int(config.get("num_nodes") or 1)
    if nodes > 1 and not SLURMEnvironment.detect() and not {"WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys():
        raise ValueError(
            f"trainer.num_nodes is {nodes}, and nothing says where the nodes meet: start with torchrun "
            "--nnodes or srun, or set trainer.num_nodes: 1"
        )


def run_folder(given: str | None) -> Path:
    """The run folder, the same on all processes: as given, or a new one named by time and process.

    Raises:
        ValueError: a launcher that leaves no way to agree on a name.
    """
    if given:
        return Path(given).expanduser()
    if os.environ.get(RUN_DIR) and "LOCAL_RANK" in os.environ:
        return Path(os.environ[RUN_DIR])
    # the process too: a sweep may start many runs in one second
    name = str(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("LOCAL_RANK") is not None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ValueError(
                "several processes were started without --run_dir; give one, so that they use the same"
            )
        # torchrun's agent keeps a store for its workers, also over restarts
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return Path(store.compare_set("agro_lightning/run_dir", "", name).decode())
    if SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return Path("runs") / f"slurm-{os.environ['SLURM_JOB_ID']}"
    os.environ[RUN_DIR] = name
    return Path(name)


def store_after_restart(timeout: timedelta) -> PrefixStore | None:
    """Where the processes of a job that torchrun has started again on one node meet; None in other jobs.

    torchrun keeps one store over restarts and torch 2.13 reads it without a prefix, so that the processes
    would find the addresses of dead ones. Agents of several nodes count restarts differently, and need
    another remedy.
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    own_stores = environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if environment.get("GROUP_WORLD_SIZE") != "1":
        if int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not own_stores:
            log.warning(
                "torchrun may restart this job on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                "for its agents, or the processes of a restart may look for those of the start before"
            )
        return None
    restarts = int(environment["TORCHELASTIC_RESTART_COUNT"])
    if not restarts or own_stores:
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    return PrefixStore(f"agro_lightning/restart-{restarts}", store)


def slurm_plugins() -> list[Any]:
    """Under srun: SLURM's ranks, without Lightning's requeueing, which would save in the middle of a step."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
