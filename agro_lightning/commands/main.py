"""The command line: one table of commands, each a function."""

import difflib
import json
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import getdoc, signature
from typing import Any

PROGRAM = "python -m agro_lightning"
COMMANDS = {
    "fit": ("commands.fit:fit", "Train; without --config, the quick start that ships with the package."),
    "validate": ("commands.fit:validate", "Measure accuracy on the validation prompts."),
    "doctor": ("commands.doctor.command:doctor", "Check a configuration before a long run; estimate memory."),
    "rollout": ("commands.rollout:rollout", "Sample and score completions into a buffer, or for a run."),
    "annotate": ("commands.annotate:annotate", "Cache a reference's log-probs in a copy of a buffer."),
    "import": ("commands.import_log:import_log", "Turn other tools' logs into a buffer."),
    "inspect": ("commands.inspect:inspect", "Show what is in a buffer."),
    "chat": ("commands.chat:chat", "Type prompts, and see the policy's answers as they come."),
    "view": ("commands.view.command:view", "Write a run's curves and completions as one HTML file."),
    "export": (
        "commands.export:export",
        "Turn a checkpoint into a folder that from_pretrained loads; push it.",
    ),
    "from-trl": ("commands.from_trl:from_trl", "Turn a GRPOConfig of TRL into a configuration of fit."),
}
"""Name -> (module and function below agro_lightning, what it does). A function of `args` reads the rest of
the command line itself; another one gets its parameters from there."""
POSITIONAL = {
    "import": "source",
    "inspect": "buffer",
    "export": "ckpt",
    "chat": "ckpt",
    "view": "run",
    "from-trl": "file",
}
"""The option that words without a name are the values of."""
OF_RUN = {
    "annotate": {
        "policy": "model.policy",
        "temperature": "data.sampling.temperature",
        "max_tokens": "model.max_tokens",
    },
    "import": {
        "policy": "model.policy.path",
        "trust_remote_code": "model.policy.trust_remote_code",
        "chat": "data.train.chat",
        "template": "data.train.template",
        "system_prompt": "data.train.system_prompt",
        "chat_template_options": "data.train.chat_template_options",
        "max_prompt_tokens": "data.train.max_prompt_tokens",
    },
    "inspect": {
        "tokenizer": "model.policy.path",
        "trust_remote_code": "model.policy.trust_remote_code",
        "max_prompt_tokens": "data.train.max_prompt_tokens",
    },
}
"""Commands that take --run_dir: which options default to which settings of that run."""
OF_CHECKPOINT = {"chat": {"prompts": "data.train", "sampling": "data.sampling"}}
"""Commands of a run's folder or checkpoint: which options default to which settings in its config.yaml."""


def main(args: list[str] | None = None) -> None:
    """`python -m agro_lightning COMMAND ...`"""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
        print(f"usage: {PROGRAM} COMMAND [--help]\n\n" + "\n".join(lines))
        raise SystemExit(0 if args else 2)
    if args[0] not in COMMANDS:
        sys.stderr.write(f"error: {_explain_command(args)}\n")
        raise SystemExit(2)
    module, _, function = COMMANDS[args[0]][0].partition(":")
    run = getattr(import_module(f"agro_lightning.{module}"), function)
    if list(signature(run).parameters) == ["args"]:
        run(args[1:])
    else:
        _call(args[0], run, args[1:])


def _call(name: str, function: Callable[..., Any], args: list[str]) -> None:
    """Calls a plain function with what the command line and config files say."""
    from agro_lightning.commands.cli_errors import explained
    from agro_lightning.commands.defaults import DATA_DEFAULTS
    from agro_lightning.commands.parser import AgroParser
    from agro_lightning.commands.run_settings import run_defaults, run_folder_of, values_of

    summary = (getdoc(function) or "").partition("\n\nArgs:")[0]
    parser = AgroParser(prog=f"{PROGRAM} {name}", description=" ".join(summary.split()))
    parser.add_argument("-c", "--config", action="config", help="A YAML file with any of these keys.")
    parser.add_function_arguments(function, as_group=False, fail_untyped=True)
    # the parser can print what it has built itself, and not an object that is a parameter's default
    keys = signature(function).parameters.keys() & {"rewards", "engine"}
    parser.set_defaults({key: DATA_DEFAULTS[key] for key in keys})
    args = _named(name, args)
    if name in OF_RUN:
        help_ = f"Folder of a run, whose settings are the defaults of {', '.join(OF_RUN[name])}."
        parser.add_argument("--run_dir", type=str | None, default=None, help=help_)
        for run_dir in values_of(args, "--run_dir")[-1:]:
            with explained(building=True):
                found = run_defaults(run_dir, OF_RUN[name])
                if isinstance(found.get("policy"), dict):
                    found["policy"].pop("lora", None)  # the model that the run started from
                parser.set_defaults(found)
    if name in OF_CHECKPOINT and not values_of(args, "--config", "-c"):
        for ckpt in values_of(args, f"--{POSITIONAL[name]}")[-1:]:
            if folder := run_folder_of(ckpt):
                with explained(building=True):
                    parser.set_defaults(run_defaults(str(folder), OF_CHECKPOINT[name]))
    config = parser.parse_args(args)
    with explained(building=True):
        arguments = parser.instantiate_classes(config)
    for key in ("config", "run_dir"):
        arguments.pop(key, None)
    with explained():
        function(**arguments)


def _named(command: str, args: list[str]) -> list[str]:
    """The arguments with leading words as the value of the command's main option."""
    count = next((index for index, arg in enumerate(args) if arg.startswith("-")), len(args))
    words = args[:count]
    if not words or command not in POSITIONAL:
        return args
    return [f"--{POSITIONAL[command]}", words[0] if count == 1 else json.dumps(words), *args[count:]]


def _explain_command(args: list[str]) -> str:
    """What to say where the first word is no command."""
    if args[0].startswith("-"):
        return f"{args[0]} stands before the command; write: {PROGRAM} fit {' '.join(args)}"
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown command {args[0]!r}.{hint} Commands: {', '.join(COMMANDS)}"
