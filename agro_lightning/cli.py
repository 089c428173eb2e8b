"""The command line: LightningCLI for `fit` and `validate`, plain functions for the other commands."""

import os
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault(
    "JSONARGPARSE_DEPRECATION_WARNINGS", "off"
)  # Lightning still calls jsonargparse's older names

import lightning as L
from docstring_parser import DocstringStyle
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from agro_lightning.callbacks import NonFiniteGuard, StepMetrics
from agro_lightning.checkpoint import DurableCheckpointIO
from agro_lightning.cli_errors import explain, explained, unknown_section
from agro_lightning.cli_values import replace_whole_values
from agro_lightning.data.datamodule import AgroDataModule
from agro_lightning.faults import NameLostRank, SlowRanks, StopOnSignal
from agro_lightning.launch import check_nodes, number_of_ranks, run_folder, slurm_plugins, was_launched
from agro_lightning.metrics_file import MetricsFile
from agro_lightning.module import AgroModule
from agro_lightning.progress import hide_advice, step_progress
from agro_lightning.quickstart.defaults import DATA_DEFAULTS, TRAINER_DEFAULTS
from agro_lightning.run_checkpoints import RunCheckpoint, check_start
from agro_lightning.run_config import RunConfig
from agro_lightning.run_report import SampleTable, Summary
from agro_lightning.strategy import Sharded

set_parsing_settings(docstring_parse_style=DocstringStyle.GOOGLE, docstring_parse_attribute_docstrings=True)

PROGRAM = "python -m agro_lightning"
TRAINING_COMMANDS = {
    "fit": "Train. Without --config it trains the quick start that ships with the package.",
    "validate": "Measure accuracy on the validation prompts.",
}
DOCTOR = "Check a configuration before a long run; estimate memory and communication of many ranks."


class AgroParser(LightningArgumentParser):
    """Says what is wrong in one line, with the nearest valid key, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (
            not self.exit_on_error
        ):  # jsonargparse tries alternatives with inner parsers, and needs their errors
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {explain(message, parser, sys.argv[1:])}\n")
        raise SystemExit(2)


class AgroCLI(LightningCLI):
    """Model, data and trainer from one YAML file and the command line."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = AgroParser(**{"dump_header": [], "prog": PROGRAM, **kwargs})
        parser.add_argument("-c", "--config", action="config", help="A YAML file with any of these keys.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if wrong := unknown_section(parser, sys.argv[1:]):
            parser.error(wrong)
        replace_whole_values(parser)
        super().parse_arguments(parser, args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            name: {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            for name in TRAINING_COMMANDS
        }

    def _set_seed(self) -> None:
        with explained(building=True):
            super()._set_seed()

    def instantiate_classes(self) -> None:
        with explained(building=True):
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with explained():
            super()._run_subcommand(subcommand)

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
        parser.link_arguments("data.sampling.temperature", "model.temperature")
        parser.set_defaults({f"data.{key}": value for key, value in DATA_DEFAULTS.items()})

    def _parse_ckpt_path(self) -> None:
        """Lightning would take settings from the checkpoint; here they stand in the config alone."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> L.Trainer:
        """Adds what every run has to what the config asks for: run folder, loggers, callbacks, durable
        checkpoints."""
        check_nodes(config)
        given_dir = self._get(self.config_init, "run_dir")
        may_be_new = bool(given_dir) or was_launched()
        folder = run_folder(given_dir)
        config["default_root_dir"] = str(folder)
        fitting = self.subcommand == "fit"
        config["logger"] = loggers(config.get("logger"), folder, fitting=fitting)
        mine = [StepMetrics(), NonFiniteGuard(), SampleTable(), Summary()]
        mine += [StopOnSignal(), SlowRanks(), NameLostRank()]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if not any(isinstance(callback, ProgressBar) for callback in given):
            if config.get("enable_progress_bar") is not False:
                mine.append(step_progress())
        kept = [callback for callback in mine if not any(type(other) is type(callback) for other in given)]
        last = any(isinstance(callback, ModelCheckpoint) and callback.save_last for callback in given)
        if config.get("enable_checkpointing") is not False and not last:
            every = self._get(self.config_init, "checkpoint_every")
            if not config.get("fast_dev_run"):
                ckpt_path = self._get(self.config_init, "ckpt_path")
                check_start(folder, ckpt_path, fitting=fitting, may_be_new=may_be_new)
            # before the given ones: the trainer's first checkpoint callback is asked for the last checkpoint
            given = [RunCheckpoint(folder / "checkpoints", every=every), *given]
        config["callbacks"] = [*given, *kept]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        plugins = [*plugins, *slurm_plugins()]
        named = config.get("strategy") == "agro_lightning.strategy.Sharded"  # left as text by the parser
        if named or config.get("strategy") in ("auto", None) and number_of_ranks(config) > 1:
            config["strategy"] = Sharded()
        config["plugins"] = plugins
        if config.get("strategy") in ("auto", None) and not any(
            isinstance(p, DurableCheckpointIO) for p in plugins
        ):
            config["plugins"] = [*plugins, DurableCheckpointIO()]
        return super()._instantiate_trainer(config, callbacks)


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


def _commands() -> dict[str, tuple[str, Callable[[], Callable[..., Any]]]]:
    """The commands besides training: what each does, and how to import it."""

    def export() -> Callable[..., Any]:
        from agro_lightning.export import export

        return export

    def inspect() -> Callable[..., Any]:
        from agro_lightning.inspect_command import inspect

        return inspect

    def annotate() -> Callable[..., Any]:
        from agro_lightning.annotate import annotate

        return annotate

    def rollout() -> Callable[..., Any]:
        from agro_lightning.rollout_command import rollout

        return rollout

    return {
        "rollout": ("Sample and score completions into a buffer, or for a run that is training.", rollout),
        "annotate": ("Cache a reference's log-probs in a copy of a buffer.", annotate),
        "inspect": ("Show what is in a buffer.", inspect),
        "export": ("Turn a checkpoint into a folder that from_pretrained loads.", export),
    }


def main(args: list[str] | None = None) -> None:
    """`python -m agro_lightning COMMAND ...`"""
    if args is not None:
        sys.argv = ["agro_lightning", *args]  # LightningCLI wants to read the command line itself
    args = sys.argv[1:]
    commands = _commands()
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in TRAINING_COMMANDS.items()]
        lines += [f"  {'doctor':<10} {DOCTOR}"]
        lines += [f"  {name:<10} {text}" for name, (text, _) in commands.items()]
        print(f"usage: {PROGRAM} COMMAND [--help]\n\n" + "\n".join(lines))
        raise SystemExit(0 if args else 2)
    if args[0] == "doctor":
        from agro_lightning.doctor import doctor

        doctor(args[1:])
        return
    if args[0] in commands:
        _run_command(args[0], commands[args[0]][1](), args[1:])
        return
    if args[0] not in TRAINING_COMMANDS:
        sys.stderr.write(f"error: {explain_command(args, [*TRAINING_COMMANDS, 'doctor', *commands])}\n")
        raise SystemExit(2)
    hide_advice()
    AgroCLI(
        AgroModule,
        AgroDataModule,
        save_config_callback=RunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={name: {"description": text} for name, text in TRAINING_COMMANDS.items()},
    )


def _run_command(name: str, function: Callable[..., Any], args: list[str]) -> None:
    """Calls a plain function with what the command line and config files say."""
    summary = (function.__doc__ or "").partition("\n\n    Args:")[0]
    parser = AgroParser(prog=f"{PROGRAM} {name}", description=" ".join(summary.split()))
    parser.add_argument("-c", "--config", action="config", help="A YAML file with any of these keys.")
    parser.add_function_arguments(function, as_group=False, fail_untyped=True)
    # the parser can print what it has built itself, and not an object that is a parameter's default
    keys = signature(function).parameters.keys() & {"rewards", "engine"}
    parser.set_defaults({key: DATA_DEFAULTS[key] for key in keys})
    replace_whole_values(parser)
    config = parser.parse_args(args)
    with explained(building=True):
        arguments = parser.instantiate_classes(config)
    del arguments["config"]
    with explained():
        function(**arguments)


def explain_command(args: list[str], commands: list[str]) -> str:
    """What to say where the first word is no command."""
    import difflib

    if args[0].startswith("-"):
        return f"{args[0]} stands before the command; write: {PROGRAM} fit {' '.join(args)}"
    near = difflib.get_close_matches(args[0], commands, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown command {args[0]!r}.{hint} Commands: {', '.join(commands)}"
