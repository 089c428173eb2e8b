"""The command line: `fit` and `validate` are LightningCLI's, the other commands plain functions."""

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

from agro_lightning.commands.cli_errors import explained
from agro_lightning.commands.cli_overrides import replace_whole_values
from agro_lightning.commands.defaults import DATA_DEFAULTS
from agro_lightning.commands.fit import PROGRAM, TRAINING_COMMANDS, AgroParser, run_training

DOCTOR = "Check a configuration before a long run; estimate memory and communication of many ranks."


def _commands() -> dict[str, tuple[str, Callable[[], Callable[..., Any]]]]:
    """The commands besides training: what each does, and how to import it."""

    def export() -> Callable[..., Any]:
        from agro_lightning.checkpoints.export import export

        return export

    def inspect() -> Callable[..., Any]:
        from agro_lightning.commands.inspect import inspect

        return inspect

    def annotate() -> Callable[..., Any]:
        from agro_lightning.commands.annotate import annotate

        return annotate

    def rollout() -> Callable[..., Any]:
        from agro_lightning.commands.rollout import rollout

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
        from agro_lightning.commands.doctor.command import doctor

        doctor(args[1:])
        return
    if args[0] in commands:
        _run_command(args[0], commands[args[0]][1](), args[1:])
        return
    if args[0] not in TRAINING_COMMANDS:
        sys.stderr.write(f"error: {explain_command(args, [*TRAINING_COMMANDS, 'doctor', *commands])}\n")
        raise SystemExit(2)
    run_training()


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
