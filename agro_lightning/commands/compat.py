"""What is reached of jsonargparse, and of a parser's actions, under private names (jsonargparse 4)."""

import argparse
from collections.abc import Callable
from typing import Any


def options_of(parser: Any) -> list[argparse.Action]:
    """The actions behind a parser's options; none for what is no parser."""
    return getattr(parser, "_actions", [])


def type_of(action: argparse.Action) -> Any:
    """The type hint that an option's value is checked against; None without one."""
    return getattr(action, "_typehint", None)


def wrap_check(action: argparse.Action, wrap: Callable[[argparse.Action, Any], Any]) -> None:
    """Replaces the check of an option's value by `wrap(action, check)`, once."""
    check = getattr(action, "_check_type", None)
    if check is not None and not hasattr(check, "__wrapped__"):
        action._check_type = wrap(action, check)  # type: ignore[attr-defined]


def keep_as_settings(action: argparse.Action) -> None:
    """Lets settings have a `class_path` of their own, which the parser would take for another class's."""
    if "class_path" in getattr(getattr(action, "basetype", None), "__dataclass_fields__", {}):
        action.resolve_subclass_spec = lambda value: value  # type: ignore[attr-defined]


def is_nested(value: Any) -> bool:
    """Whether a value is one option of a former value."""
    return type(value).__name__ == "NestedArg"
