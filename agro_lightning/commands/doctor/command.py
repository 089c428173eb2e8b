"""The command `doctor`: finds out in a minute what a long run would find out later."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser

from agro_lightning.commands.cli_errors import explained
from agro_lightning.commands.defaults import TRAINER_DEFAULTS
from agro_lightning.commands.doctor.checks import ASSUMED_PROMPT_TOKENS, check_all
from agro_lightning.commands.doctor.memory.estimate import Estimate, Workload, simulate
from agro_lightning.commands.doctor.propose import as_yaml, given_settings, propose
from agro_lightning.commands.doctor.report import (
    GIB,
    CheckFailed,
    Checks,
    amount,
    memory_table,
    not_counted,
    totals,
    traffic_table,
)
from agro_lightning.commands.fit import AgroCLI
from agro_lightning.commands.lightning_compat import tensor_parallel_size
from agro_lightning.data.sources import Live
from agro_lightning.distributed.launch import number_of_ranks, run_folder
from agro_lightning.primitives.quiet import quiet
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule

OWN_OPTIONS = {
    *("simulate_ranks", "model_config", "prompt_tokens", "completion_tokens", "gpu_memory_gib", "propose"),
    *("devices", "json"),
}
"""Options that `fit` does not take."""
CHATTY = ("lightning", "lightning.pytorch", "lightning.fabric", "torch.distributed.tensor")
"""Loggers that would speak between the lines of the report; what is wrong is raised."""
DESCRIPTION = """Checks a configuration before a long run: batch arithmetic, rewards, memory, one sample with
its mask, the engine's log-probs, and one real step with save, resume and export in a scratch folder. Takes
what `fit` takes. Exit status 0 when all is well. With --simulate_ranks, memory and communication of so many
ranks instead, on this machine alone and without weights. With --propose, a configuration for so many
--devices of --gpu_memory_gib: max_tokens, batch size and sharding, as YAML that `fit` takes."""


class DoctorCLI(AgroCLI):
    """The configuration of `fit`, and what only the doctor takes; builds nothing but module and data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--simulate_ranks",
            type=int | None,
            default=None,
            help="Estimate memory and communication per rank of this many ranks; run nothing real.",
        )
        parser.add_argument(
            "--model_config",
            type=str | None,
            default=None,
            help="Folder with the config.json that memory is estimated for; default: that of "
            "model.policy.path, else models/ID beside the config file, else the hub's.",
        )
        parser.add_argument(
            "--prompt_tokens",
            type=int | None,
            default=None,
            help="Tokens of the longest prompt for --simulate_ranks; default: data.train.max_prompt_tokens.",
        )
        parser.add_argument(
            "--gpu_memory_gib",
            type=float,
            default=80.0,
            help="Memory of one GPU for --simulate_ranks and --propose.",
        )
        parser.add_argument(
            "--propose",
            type=bool,
            default=False,
            help="Print a configuration that fits into the GPUs, as YAML; run nothing.",
        )
        parser.add_argument("--devices", type=int, default=1, help="GPUs of one node for --propose.")
        parser.add_argument(
            "--completion_tokens",
            type=int | None,
            default=None,
            help="Tokens of the longest completion for --propose; default: data.sampling.max_new_tokens.",
        )
        parser.add_argument("--json", type=bool, default=False, help="Print the report as one JSON object.")

    def instantiate_classes(self) -> None:
        self.model, self.datamodule, self.trainer_config = self.build()

    def build(self) -> tuple[AgroModule, AgroDataModule, dict[str, Any]]:
        """A new module, new data, and the trainer's settings."""
        with explained(building=True):
            self.config_init = self.parser.instantiate_classes(self.config)
        return self.get("model"), self.get("data"), dict(self.get("trainer"))

    def proposal(self) -> str:
        """A configuration that fits, as YAML.

        Raises:
            CheckFailed: none does.
        """
        prompt, completion = self.get("prompt_tokens"), self.get("completion_tokens")
        data, has = self.datamodule, int(self.get("gpu_memory_gib") * GIB)
        for name, value in (("devices", self.get("devices")), ("prompt_tokens", prompt),
                            ("completion_tokens", completion), ("gpu_memory_gib", has)):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {self.get(name)}; it must be positive")
        prompt = prompt or data.train_settings.max_prompt_tokens or ASSUMED_PROMPT_TOKENS
        workload = _workload(self, self.get("devices"), gpu=True, prompt_tokens=prompt, cache=has // 4)
        workload = replace(
            workload,
            tensor_parallel=1,
            completion_tokens=completion or workload.completion_tokens,
        )
        with architecture(self):
            found = propose(self.model, workload, has)
        files = [Path(str(file)) for file in _config_files(self)]
        known = yaml.safe_load(self.parser.dump(self.config, skip_default=True)) or {}
        known = {name: value for name, value in known.items() if name not in OWN_OPTIONS}
        return as_yaml(found, given_settings(files, self.args, known), self.model, has)

    def estimate(self, ranks: int) -> tuple[Workload, Estimate]:
        """Memory and communication of one of so many ranks, every prompt and completion at full length.

        Raises:
            ValueError: no ranks, or sizes that do not divide each other.
        """
        if ranks < 1:
            raise ValueError(f"simulate_ranks is {ranks}; give the number of ranks of the run")
        gpu = self.trainer_config.get("accelerator") != "cpu"
        prompt = self.get("prompt_tokens") or self.datamodule.train_settings.max_prompt_tokens
        cache = int(self.get("gpu_memory_gib") * GIB) // 4 if gpu else 2 << 30
        workload = _workload(self, ranks, gpu=gpu, prompt_tokens=prompt or ASSUMED_PROMPT_TOKENS, cache=cache)
        with architecture(self):
            return workload, simulate(self.model, workload)


def load(args: list[str]) -> DoctorCLI:
    """The configuration that the arguments give, without doing anything with it."""
    return DoctorCLI(
        AgroModule,
        AgroDataModule,
        args=_own_options(args),
        save_config_callback=None,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"description": " ".join(DESCRIPTION.split())},
        run=False,
    )


def doctor(args: list[str]) -> None:
    """Runs the command with its arguments; exits with 1 where a check failed."""
    with quiet(*CHATTY):
        cli = load(args)
        checks = Checks(rank(), as_json=cli.get("json"))
        if cli.get("propose"):
            sys.stdout.write(cli.proposal())
            return
        if cli.get("simulate_ranks") is not None:
            checks.run("memory", lambda: _simulated(cli, cli.get("simulate_ranks")))
        else:
            _examine(cli, checks)
    checks.finish()
    if checks.failed:
        raise SystemExit(1)


def _own_options(args: list[str]) -> list[str]:
    """The arguments; the doctor's own options may have hyphens, and --propose needs no value."""
    found: list[str] = []
    for arg, after in zip(args, [*args[1:], "--"], strict=True):
        name, equals, value = arg.partition("=")
        plain = name.removeprefix("--").replace("-", "_")
        plain = "gpu_memory_gib" if plain == "gpu_memory" else plain
        found.append(f"--{plain}{equals}{value}" if name.startswith("--") and plain in OWN_OPTIONS else arg)
        if arg == "--propose" and after.startswith("--"):
            found.append("true")
    return found


def rank() -> int:
    """This process's rank, as torchrun or srun says."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def _examine(cli: DoctorCLI, checks: Checks) -> None:
    """The checks of this machine."""
    launched = "WORLD_SIZE" in os.environ or SLURMEnvironment.detect()
    ranks = number_of_ranks(cli.trainer_config)
    data = cli.datamodule
    checks.ok(
        "arithmetic",
        data.arithmetic(
            accumulate=cli.trainer_config.get("accumulate_grad_batches") or 1,
            ranks=max(1, ranks // tensor_parallel_size(cli.trainer_config.get("strategy"))),
        ),
    )
    if ranks > 1 and not launched:
        checks.say(
            f"         the config asks for {ranks} ranks; what runs here runs on one, without sharding. "
            "Start doctor with torchrun or srun to check them together"
        )
    folder = Path(run_folder(cli.get("run_dir"))) / "doctor" if launched else Path(tempfile.mkdtemp())
    try:
        estimate = _apart if launched else _here
        check_all(cli, checks, folder, launched=launched, memory=lambda most: estimate(cli, ranks, most))
    finally:
        if not launched or rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            if launched:
                with contextlib.suppress(OSError):  # a folder that holds more stays
                    folder.parent.rmdir()


# ---------------------------------------------------------------------- memory


def _here(cli: DoctorCLI, ranks: int, longest: int) -> str:
    """The memory table of the config on this machine.

    Raises:
        CheckFailed: the estimate is above what the device has.
    """
    gpu = torch.cuda.is_available() and cli.trainer_config.get("accelerator") != "cpu"
    if gpu:
        device, has = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        device, has = "CPU", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    workload = _workload(cli, ranks, gpu=gpu, prompt_tokens=longest, cache=has // 4 if gpu else 2 << 30)
    with architecture(cli):
        estimate = simulate(cli.model, workload)
    words, table = f"{totals(estimate)}; this {device} has {amount(has)}", memory_table(estimate)
    if estimate.peak > has:
        raise CheckFailed(f"{words}. {_advice(estimate)}", table)
    return f"{words}\n{table}"


def _apart(cli: DoctorCLI, ranks: int, longest: int) -> str:
    """The memory table from a process of its own: torch remembers the meshes of simulated ranks.

    Raises:
        CheckFailed: the estimate is above the GPU's memory, or could not be made.
    """
    if rank() > 0:
        return "estimated by the first rank"
    ours = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "agro_lightning", "doctor", *cli.args, "--json", "true"]
    command += ["--simulate_ranks", str(ranks), "--prompt_tokens", str(longest)]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        command += ["--gpu_memory_gib", str(memory / GIB)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise CheckFailed(f"memory could not be estimated: {done.stderr.strip()[-400:]}")
    (found,) = json.loads(done.stdout)["checks"]
    if found["verdict"] == "FAILED":
        raise CheckFailed(found["words"], found["details"])
    return f"{found['words']}\n{found['details']}"


def _simulated(cli: DoctorCLI, ranks: int) -> str:
    """Memory and communication of many ranks.

    Raises:
        CheckFailed: the estimate is above the GPU's memory.
    """
    workload, estimate = cli.estimate(ranks)
    has = int(cli.get("gpu_memory_gib") * GIB)
    with architecture(cli) as where:
        pass
    data = ranks // workload.tensor_parallel
    replicate = cli.model.sharding.replicate if ranks > 1 else 1
    given = cli.get("prompt_tokens") or cli.datamodule.train_settings.max_prompt_tokens
    assumed = "" if given else " (assumed; give --prompt_tokens)"
    words = totals(estimate) + (f"; a GPU has {amount(has)}" if workload.gpu else "")
    lines = [
        f"architecture: {where}, {estimate.parameters:,} parameters",
        f"ranks: {ranks} = {replicate} replicas × {data // replicate} shards × {workload.tensor_parallel} "
        "tensor-parallel",
        cli.datamodule.arithmetic(accumulate=workload.accumulate, ranks=data),
        f"every prompt has {workload.prompt_tokens} tokens{assumed}, every completion "
        f"{workload.completion_tokens}; a pass holds at most {cli.model.max_tokens or 'all'} tokens",
        *(
            [f"the reference's shards, {amount(estimate.offloaded)}, wait in CPU memory"]
            if estimate.offloaded
            else []
        ),
        "",
        memory_table(estimate),
        "",
        traffic_table(estimate, workload),
        "",
        not_counted(workload),
    ]
    if workload.gpu and estimate.peak > has:
        raise CheckFailed(f"{words}. {_advice(estimate)}", "\n".join(lines))
    return "\n".join([words, *lines])


def _advice(estimate: Estimate) -> str:
    worst = max(estimate.phases, key=lambda name: sum(estimate.phases[name].values()))
    if worst == "rollout":
        return (
            "The rollout holds most: raise tensor_parallel_size, give the engine fewer memory_bytes, or let "
            "another process generate (configs/asynchronous.yaml)"
        )
    return (
        f"The {worst} holds most: lower model.max_tokens, set model.policy.gradient_checkpointing, or use "
        "more ranks"
    )


def _workload(cli: DoctorCLI, ranks: int, *, gpu: bool, prompt_tokens: int, cache: int) -> Workload:
    config, data = cli.trainer_config, cli.datamodule
    engine: Any = data.engine
    limit = (engine.memory_bytes or cache) if hasattr(engine, "memory_bytes") else 0  # others have their own
    accumulate = config.get("accumulate_grad_batches") or 1
    ahead = sum(source.ahead for source in data.sources if isinstance(source, Live))
    return Workload(
        ranks=ranks,
        tensor_parallel=tensor_parallel_size(config.get("strategy")),
        gpu=gpu,
        groups=data.batch_size,
        group_size=data.group_size,
        prompt_tokens=prompt_tokens,
        completion_tokens=data.sampling.max_new_tokens,
        accumulate=accumulate,
        clip=config.get("gradient_clip_val"),
        cache_bytes=limit,
        sequences=(data.batch_size * accumulate + ahead) * data.group_size,
    )


@contextlib.contextmanager
def architecture(cli: DoctorCLI) -> Iterator[str]:
    """Points the module at the config.json to build, and says which one it is.

    Raises:
        FileNotFoundError: --model_config has no config.json.
        CheckFailed: the model's config.json is out of reach.
    """
    settings = cli.model.policy_settings
    path, given = settings.path, cli.get("model_config")
    beside = [Path(str(file)).parent / "models" / path for file in _config_files(cli)]
    found = next((folder for folder in beside if (folder / "config.json").is_file()), None)
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise FileNotFoundError(f"--model_config {given} has no config.json; give a folder with one")
        settings.path = given
    elif found is not None and not Path(path).exists():
        settings.path = str(found)
    try:
        yield settings.path if settings.path == path else f"{settings.path}/config.json, for {path}"
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckFailed(
            f"{reason}. Give --model_config, a folder with the config.json of {path}, or put it into "
            f"models/{path} beside the config file"
        ) from error
    finally:
        settings.path = path


def _config_files(cli: DoctorCLI) -> list[Any]:
    return list(cli.text("config") or [])
