"""What a value given by the user replaces: a list, or another class, takes nothing from what stood before.

By itself the parser would keep every option of the former value that the new one also has: a default's, say,
or a config file's. A reward would get the name of another, and its way to find the answer.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import pydoc
from typing import Any

import yaml

from agro_lightning import rewards
from agro_lightning.commands.compat import is_nested, keep_as_settings, options_of, wrap_check


def replace_whole_values(parser: argparse.ArgumentParser) -> None:
    """Lets lists, and classes of another path, replace former values of the same key.

    `--key+ VALUE` still appends, and `--key.option VALUE` or a value without another class_path still changes
    single options.

    Args:
        parser: its actions, and those of its subcommands, are changed.
    """
    for action in options_of(parser):
        wrap_check(action, _replacing)
        keep_as_settings(action)
        choices = getattr(action, "choices", None)
        for inner in choices.values() if isinstance(choices, dict) else ():
            if isinstance(inner, argparse.ArgumentParser):
                replace_whole_values(inner)


def _replacing(action: argparse.Action, check: Any) -> Any:
    """The action's check, which fills a value up from `cfg`, where the former one stands."""

    @functools.wraps(check)
    def checked(value: Any, **known: Any) -> Any:
        cfg = known.get("cfg")
        former = cfg.get(action.dest) if cfg else None
        if action.dest.rpartition(".")[2] == "rewards":
            value = _full_paths(value)
            if isinstance(value, str) and value.startswith(rewards.__name__) and not known.get("append"):
                value = [value]
        if cfg is None or former is None or known.get("append"):
            return check(value, **known)
        if isinstance(former, list):
            if is_nested(value):  # one option of the last entry
                return check(value, **known)
            return check(value, **{**known, "cfg": None})
        found = check(copy.deepcopy(value), **known)
        if _class_path(found) in (None, _class_path(former)) or _class_path(former) is None:
            return found
        cfg.pop(action.dest)
        found = check(value, **{**known, "cfg": None})
        _fill_up(found, former)
        return found

    return checked


def _full_paths(value: Any) -> Any:
    """Import paths for the short names of rewards; the parser finds them for base classes alone, and rewards
    need none."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        with contextlib.suppress(yaml.YAMLError):  # the parser says it better
            value = yaml.safe_load(value)
    if isinstance(value, list):
        return [_full_paths(item) for item in value]
    if isinstance(value, dict) and "class_path" in value:
        return {**value, "class_path": _full_paths(value["class_path"])}
    known = isinstance(value, str) and value in rewards.__all__
    return f"{rewards.__name__}.{value}" if known else value


def _fill_up(found: Any, former: Any) -> None:
    """Gives options that the former class had, too, their own default: the parser may yet merge the two."""
    own = inspect.signature(pydoc.locate(found.class_path)).parameters  # type: ignore[arg-type]
    options = found.get("init_args") or type(found)()
    for name in (former.get("init_args") or options).keys():
        if name in own and name not in options:
            default = own[name].default
            options[name] = None if default is inspect.Parameter.empty else default
    found.init_args = options


def _class_path(value: Any) -> str | None:
    return value.get("class_path") if hasattr(value, "get") else None
