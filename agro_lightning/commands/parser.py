"""The parser of every command: errors of one line, `~` in paths, whole values where one replaces another."""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls its older names

from docstring_parser import DocstringStyle
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from agro_lightning.commands.cli_errors import command_line, explain, unknown_section
from agro_lightning.commands.cli_overrides import replace_whole_values

set_parsing_settings(docstring_parse_style=DocstringStyle.GOOGLE, docstring_parse_attribute_docstrings=True)

PROGRAM = "python -m agro_lightning"
PATH_KEYS = {
    "path", "paths", "run_dir", "ckpt_path", "out", "ckpt", "buffer", "follow", "weights_dir", "tokenizer",
    "python", "model_config", "default_root_dir", "dirpath", "save_dir", "file", "source", "run",
}  # fmt: skip
"""Last words of the keys whose values are files or folders."""


class AgroParser(LightningArgumentParser):
    """Says what is wrong in one line, with the nearest valid key, and exits with 2."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parses the command line; the outermost call's arguments are those that errors speak of."""
        given = list(sys.argv[1:] if args is None else args)
        with command_line(given) as outermost:
            if outermost:
                if wrong := unknown_section(self, given):
                    self.error(wrong)
                replace_whole_values(self)
            try:
                return expand_home(super().parse_args(given, *rest, **options))
            except UnicodeDecodeError as error:
                self.error(f"{_undecodable(given)} is not UTF-8 text ({error.reason}); give a YAML file")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (
            not self.exit_on_error
        ):  # jsonargparse tries alternatives with inner parsers, and needs their errors
            super().error(message, ex)
        sys.stderr.write(f"error: {explain(message, getattr(ex, 'subcommand_parser', None) or self)}\n")
        raise SystemExit(2)


def _undecodable(args: Sequence[str]) -> str:
    """The first file among the arguments that cannot be read as text."""
    for word in args:
        path = os.path.expanduser(word.partition("=")[2] if word.startswith("-") else word)
        try:
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as handle:
                    handle.read()
        except UnicodeDecodeError:
            return path
    return "a configuration file"


def expand_home(value: Any, key: str = "") -> Any:
    """Settings with `~` expanded in those that are paths."""
    if isinstance(value, Namespace | dict):
        for name in list(vars(value) if isinstance(value, Namespace) else value):
            value[name] = expand_home(value[name], str(name))
    elif isinstance(value, list):
        return [expand_home(item, key) for item in value]
    elif isinstance(value, str) and value.startswith("~") and key in PATH_KEYS:
        return os.path.expanduser(value)
    return value
