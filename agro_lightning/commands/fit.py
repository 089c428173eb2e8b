"""`fit` and `validate`: LightningCLI with the run folder, loggers, callbacks and checkpoints of every run."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from agro_lightning.checkpoints.single_file import DurableCheckpointIO
from agro_lightning.commands.defaults import DATA_DEFAULTS, TRAINER_DEFAULTS
from agro_lightning.commands.lightning_compat import ExplainedCLI
from agro_lightning.commands.parser import PROGRAM, AgroParser
from agro_lightning.commands.run_settings import config_of_checkpoint
from agro_lightning.distributed.launch import (
    check_nodes,
    number_of_ranks,
    run_folder,
    slurm_plugins,
    was_launched,
)
from agro_lightning.training.callbacks.config_file import RunConfig
from agro_lightning.training.callbacks.csv_log import MetricsFile
from agro_lightning.training.callbacks.non_finite import NonFiniteGuard
from agro_lightning.training.callbacks.progress import hide_advice, step_progress
from agro_lightning.training.callbacks.rank_faults import NameLostRank
from agro_lightning.training.callbacks.run_lock import RunLock
from agro_lightning.training.callbacks.samples import SampleTable
from agro_lightning.training.callbacks.signals import StopOnSignal
from agro_lightning.training.callbacks.step_metrics import StepMetrics
from agro_lightning.training.callbacks.summary import Summary
from agro_lightning.training.callbacks.tensorboard_log import TensorBoardErrors
from agro_lightning.training.checkpointing import RunCheckpoint, check_start
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule
from agro_lightning.training.strategy import Sharded

TRAINING_COMMANDS = ("fit", "validate")


class AgroCLI(ExplainedCLI):
    """Model, data and trainer from one YAML file and the command line."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = AgroParser(**{"dump_header": [], "prog": PROGRAM, **kwargs})
        parser.add_argument("-c", "--config", action="config", help="A YAML file with any of these keys.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Without Lightning's warning that a list of arguments is no command line."""
        self.args = args
        self.config = parser.parse_args(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            name: {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            for name in TRAINING_COMMANDS
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: metrics, checkpoints, samples, replay buffer. Default: a new "
            "one under runs/, named by time and process. To resume, give that of the run, and "
            "--ckpt_path last; without it a folder with checkpoints is refused.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=100,
            help="Optimiser steps between checkpoints in RUN_DIR/checkpoints; the last two are kept. 0 saves "
            "at the run's end, and when it is told to stop, alone. To keep "
            "others too (best-k, say) list a ModelCheckpoint in trainer.callbacks; one with save_last: true "
            "takes the place of these.",
        )
        parser.add_argument(
            "--on_tensorboard_error",
            type=Literal["stop", "continue"],
            default="stop",
            help="What a run does when TensorBoard's file cannot be written, on a full disk say: stop, or go "
            "on without TensorBoard.",
        )
        parser.add_argument(
            "--allow_changed_data",
            type=bool,
            default=False,
            help="Let a run go on where its prompts or offline files are others than before.",
        )
        parser.link_arguments("allow_changed_data", "data.allow_changed_data")
        parser.link_arguments("data.sampling.temperature", "model.temperature")
        parser.set_defaults({f"data.{key}": value for key, value in DATA_DEFAULTS.items()})

    def make_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Adds what every run has to what the config asks for: run folder, loggers, callbacks, durable
        checkpoints."""
        check_nodes(config)
        given_dir = self.get("run_dir")
        may_be_new = bool(given_dir) or was_launched()
        folder = run_folder(given_dir)
        config["default_root_dir"] = str(folder)
        fitting = self.subcommand == "fit"
        config["logger"] = loggers(config.get("logger"), folder, fitting=fitting)
        mine = [StepMetrics(), NonFiniteGuard(), Summary(), SampleTable(), StopOnSignal(), NameLostRank()]
        mine.append(TensorBoardErrors(self.get("on_tensorboard_error")))
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if not any(isinstance(callback, ProgressBar) for callback in given):
            if config.get("enable_progress_bar") is not False:
                mine.append(step_progress())
        kept = [callback for callback in mine if not any(type(other) is type(callback) for other in given)]
        last = any(isinstance(callback, ModelCheckpoint) and callback.save_last for callback in given)
        if config.get("enable_checkpointing") is not False and not last:
            every = self.get("checkpoint_every")
            if not config.get("fast_dev_run"):
                ckpt_path = self.get("ckpt_path")
                check_start(folder, ckpt_path, fitting=fitting, may_be_new=may_be_new)
            # before the given ones: the trainer's first checkpoint callback is asked for the last checkpoint
            given = [RunCheckpoint(folder / "checkpoints", every=every), *given]
        for callback in (*given, *kept):
            if isinstance(callback, TensorBoardErrors):
                callback.watch(config["logger"])
        guard = [] if config.get("fast_dev_run") else [RunLock()]  # first: the others write into the folder
        config["callbacks"] = [*guard, *given, *kept]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        plugins = [*plugins, *slurm_plugins()]
        strategy = str(config.get("strategy"))  # the parser leaves a class name without options as text
        named = strategy in ("agro_lightning.training.strategy.Sharded", "agro_lightning.strategy.Sharded")
        if named or config.get("strategy") in ("auto", None) and number_of_ranks(config) > 1:
            config["strategy"] = Sharded()
        config["plugins"] = plugins
        if config.get("strategy") in ("auto", None) and not any(
            isinstance(p, DurableCheckpointIO) for p in plugins
        ):
            config["plugins"] = [*plugins, DurableCheckpointIO()]
        return super().make_trainer(config, callbacks)


def loggers(
    given: Logger | list[Logger] | bool | None, folder: Path, *, fitting: bool
) -> list[Logger] | bool:
    """A training run's metrics go to TensorBoard, or where the config says instead, and to metrics.csv too;
    `validate` leaves the run's curves as they are. False: nowhere."""
    if given is False:
        return False
    if isinstance(given, bool) or given is None:
        return [TensorBoardLogger(folder, name="", version=""), MetricsFile(folder)] if fitting else False
    given = given if isinstance(given, list) else [given]
    return [*given, MetricsFile(folder)] if fitting else given


def fit(args: list[str]) -> None:
    """Train. Without --config it trains the quick start that ships with the package."""
    _train("fit", args)


def validate(args: list[str]) -> None:
    """Measure accuracy on the validation prompts; of a run's checkpoint, with the run's settings."""
    _train("validate", [*config_of_checkpoint(args), *args])


def _train(command: str, args: list[str]) -> None:
    hide_advice()
    AgroCLI(
        AgroModule,
        AgroDataModule,
        args=[command, *args],
        save_config_callback=RunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={
            function.__name__: {"description": function.__doc__ or ""} for function in (fit, validate)
        },
    )
