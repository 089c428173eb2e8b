"""The command line: LightningCLI for `fit` and `validate`, plain functions for the other commands."""

import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning still calls jsonargparse's older names

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from agro_lightning.callbacks import NonFiniteGuard, SampleTable, StepMetrics, Summary
from agro_lightning.checkpoint import DurableCheckpointIO
from agro_lightning.cli_errors import explain
from agro_lightning.data.datamodule import AgroDataModule
from agro_lightning.metrics_file import MetricsFile
from agro_lightning.module import AgroModule
from agro_lightning.quickstart.defaults import DATA_DEFAULTS, TRAINER_DEFAULTS

TRAINING_COMMANDS = {
    "fit": "Train. Without --config it trains the quick start that ships with the package.",
    "validate": "Measure accuracy on the validation prompts.",
}


class AgroParser(LightningArgumentParser):
    """Says what is wrong in one line, with the nearest valid key, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # noqa: D102
        sys.stderr.write(f"error: {explain(message, self, sys.argv[1:])}\n")
        raise SystemExit(2)


class AgroCLI(LightningCLI):
    """Model, data and trainer from one YAML file and the command line."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [])
        return AgroParser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
                for name in TRAINING_COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None,
                            help="Folder of the run: metrics, checkpoints, samples, replay buffer. Default: a new "
                                 "one under runs/, named by the time. To resume, give that of the run, and "
                                 "--ckpt_path last.")
        parser.link_arguments("data.sampling.temperature", "model.temperature")
        parser.set_defaults({f"data.{key}": value for key, value in DATA_DEFAULTS.items()})

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.run_dir is None:
            config.run_dir = str(Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config[self.subcommand]
        folder = Path(config.run_dir)
        trainer = config.trainer
        trainer.default_root_dir = str(folder)
        if trainer.logger is None or trainer.logger is True:
            kwargs["logger"] = [TensorBoardLogger(folder, name="", version=""), MetricsFile(folder)]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> L.Trainer:
        mine = [StepMetrics(), NonFiniteGuard(), SampleTable(), Summary()]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        kept = [callback for callback in mine if not any(type(other) is type(callback) for other in given)]
        if not any(isinstance(callback, ModelCheckpoint) for callback in given):
            kept.append(ModelCheckpoint(dirpath=Path(config["default_root_dir"]) / "checkpoints",
                                        filename="step-{step:08d}", auto_insert_metric_name=False,
                                        every_n_train_steps=100, save_top_k=2, monitor="step", mode="max",
                                        save_last="link"))
        config["callbacks"] = [*given, *kept]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if config.get("strategy") in ("auto", None) and not any(isinstance(p, DurableCheckpointIO) for p in plugins):
            config["plugins"] = [*plugins, DurableCheckpointIO()]
        return super()._instantiate_trainer(config, callbacks)


def _commands() -> dict[str, tuple[str, Callable[[], Callable[..., Any]]]]:
    """The commands besides training: what each does, and how to import it."""

    def export() -> Callable[..., Any]:
        from agro_lightning.export import export

        return export

    return {
        "export": ("Turn a checkpoint into a folder that from_pretrained loads.", export),
    }


def main(args: list[str] | None = None) -> None:
    """`python -m agro_lightning COMMAND ...`"""
    args = sys.argv[1:] if args is None else args
    commands = _commands()
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in TRAINING_COMMANDS.items()]
        lines += [f"  {name:<10} {text}" for name, (text, _) in commands.items()]
        print("usage: python -m agro_lightning COMMAND [--help]\n\n" + "\n".join(lines))
        raise SystemExit(0 if args else 2)
    if args[0] in commands:
        from jsonargparse import auto_cli

        auto_cli(commands[args[0]][1](), args=args[1:], as_positional=False, parser_class=AgroParser)
        return
    if args[0] not in TRAINING_COMMANDS:
        sys.stderr.write(f"error: {explain_command(args, [*TRAINING_COMMANDS, *commands])}\n")
        raise SystemExit(2)
    AgroCLI(AgroModule, AgroDataModule, save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True}, trainer_defaults=TRAINER_DEFAULTS, seed_everything_default=0,
            auto_configure_optimizers=False, args=args,
            parser_kwargs={name: {"description": text} for name, text in TRAINING_COMMANDS.items()})


def explain_command(args: list[str], commands: list[str]) -> str:
    """What to say where the first word is no command."""
    import difflib

    if args[0].startswith("-"):
        return f"{args[0]} stands before the command; write: python -m agro_lightning fit {' '.join(args)}"
    near = difflib.get_close_matches(args[0], commands, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown command {args[0]!r}.{hint} Commands: {', '.join(commands)}"
