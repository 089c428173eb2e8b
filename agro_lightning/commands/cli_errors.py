"""Turns a parser's complaint into one line: the nearest valid key, and the file and line where the wrong one
stands."""

import difflib
import importlib
import inspect
import logging
import os
import pydoc
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml

from agro_lightning.commands.compat import options_of, type_of
from agro_lightning.primitives.atomic_files import DiskFullError, disk_full_error, free_space, is_disk_full
from agro_lightning.primitives.cache import cache_folder

log = logging.getLogger(__name__)

PACKAGES = ("agro_lightning", "agro_kernels")
CLASSES = {
    "engine": "agro_lightning.rollout",
    "objective": "agro_lightning.objectives",
    "rewards": "agro_lightning.rewards",
    "callbacks": "lightning.pytorch.callbacks",
    "logger": "lightning.pytorch.loggers",
}
"""Where the classes are that keys of this name may have as their values."""
RENAMED = {"model.sharding.param_dtype": "model.policy.compute_dtype"}
"""Keys of earlier versions, and what they are called now."""
_KEY = re.compile(r"(?:Parser key|Key|key) ['\"]([\w.]+)['\"]")


_command_line: ContextVar[list[str] | None] = ContextVar("command_line", default=None)


@contextmanager
def command_line(args: list[str]) -> Iterator[bool]:
    """Notes the arguments that are being parsed, for errors to find config files in; yields False inside of
    another such block, which changes nothing."""
    if _command_line.get() is not None:
        yield False
        return
    token = _command_line.set(args)
    try:
        yield True
    finally:
        _command_line.reset(token)


@contextmanager
def explained(*, building: bool = False, writes_to: Path | None = None) -> Iterator[None]:
    """Turns errors into one line.

    The exit code is 2 where the configuration or the data are wrong, 1 where a run failed. The traceback of
    an error that no check of this project foresaw goes to a file, which the line names.

    Args:
        building: objects are being built from the configuration, so that whatever goes wrong lies there.
        writes_to: the run's folder, for a full disk: a library may report it without a name.
    """
    try:
        yield
    except Exception as error:
        log.debug("the error that is about to be explained", exc_info=True)
        known = isinstance(error, (ValueError, OSError, ImportError, RuntimeError))
        if isinstance(error, OSError) and is_disk_full(error) and not isinstance(error, DiskFullError):
            error = _disk_full(error, writes_to)
        words = _shorter(" ".join(str(error).split())) or type(error).__name__
        words = words if known else f"{type(error).__name__}: {words}"
        if isinstance(error, DiskFullError) and writes_to is not None and "checkpoint:" not in words:
            words += f". Last complete checkpoint: {_newest_checkpoint(writes_to)}"
        if not building and not isinstance(error, OSError) and not (known and _raised_here(error)):
            words += _keep_traceback()
        sys.stderr.write(f"error: {words}\n")
        raise SystemExit(2 if building or isinstance(error, ValueError) else 1) from None


def _disk_full(error: OSError, writes_to: Path | None) -> DiskFullError:
    """With the file's name where the system says it, and else the folders that are full."""
    if isinstance(error.filename, (str, bytes)):
        return disk_full_error(error, Path(os.fsdecode(error.filename)))
    places = [cache_folder(""), Path(tempfile.gettempdir()), Path("/dev/shm")]
    places = [path for path in [writes_to, *places] if path is not None and path.exists()]
    free = {path: os.statvfs(path) for path in places}
    full = [path for path, about in free.items() if about.f_bavail * about.f_frsize < 1 << 20]
    told = ", ".join(free_space(path) for path in full or places)
    return DiskFullError(
        error.errno,
        f"{error.strerror}: a file could not be written, and the system does not say which; bytes: {told}. "
        "Files already there are untouched; free space, or write elsewhere",
    )


def _newest_checkpoint(run: Path) -> str:
    from agro_lightning.checkpoints.files import newest_checkpoint  # it imports torch

    return str(newest_checkpoint(run / "checkpoints") or "none was saved yet")


def _raised_here(error: BaseException) -> bool:
    """Whether this project's code raised it, knowing what to say."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].startswith(PACKAGES)


def _keep_traceback() -> str:
    """Where the traceback is, in words; nothing where there is no room for it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="agro-lightning-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f". The traceback is in {file.name}"


def explain(message: str, parser: Any) -> str:
    """One line for the user.

    Args:
        message: what the parser complained of, maybe many lines.
        parser: whose keys are valid.
    """
    args = _command_line.get() or []
    if said := _wrong_class(message, args):
        return said
    valid = valid_keys(parser)
    for key in _unknown_keys(message):
        if key not in valid:
            return _unknown(key, valid, args)
    if place := re.search(r"[Uu]nrecognized arguments: ([^-].*)", message):
        return f"unexpected {place[1]}; values are given by name, as in --key value (--help lists the keys)"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = _KEY.search(message)
    return _shorter(" ".join(lines))[:600] + (_where(key[1], args) if key else "")


def unknown_section(parser: Any, args: list[str]) -> str | None:
    """What to say of an unknown key with nothing under it, which the parser lets pass.

    Args:
        parser: whose keys are valid.
        args: the command line, in which the config files are named.
    """
    valid = valid_keys(parser)

    def search(node: Any, parent: str) -> str | None:
        for name, value in node.value:
            key = f"{parent}{name.value}"
            if name.value in ("init_args", "dict_kwargs"):
                continue
            if not value.value and key not in valid:
                return key
            known = any(other.startswith(f"{key}.") for other in valid)
            if known and isinstance(value, yaml.MappingNode) and (found := search(value, f"{key}.")):
                return found
        return None

    for path in _config_files(args):
        root = _composed(path)
        if isinstance(root, yaml.MappingNode) and (key := search(root, "")):
            return _unknown(key, valid, args)
    return None


def _wrong_class(message: str, args: list[str]) -> str | None:
    """What to say of a class that does not exist, or of an option that a class does not have."""
    key = _KEY.search(message)
    if key is None:
        return None
    option = re.search(r"given class_path '([\w.]+)':\s*Option '(\w+)' is not accepted", message)
    if option is not None and (owner := pydoc.locate(option[1])) is not None:
        options = [name for name in inspect.signature(owner).parameters if name != "self"]  # type: ignore[arg-type]
        name = option[1].rpartition(".")[2]
        return f"unknown key {key[1]}.{option[2]}{_where(f'{key[1]}.{option[2]}', args)}" + _choice(
            option[2], options, f"; {name} takes "
        )
    absent = re.search(
        r"(?:dot import path string: |has no attribute '|\.Sequence'>\. Got value: )([\w.]+)", message
    )
    classes = _known_classes(key[1])
    if absent is None or not classes:
        return None
    return f"{key[1]}{_where(key[1], args)}: there is no class {absent[1]}" + _choice(
        absent[1], classes, "; give the import path of one of your own, or one of "
    )


def _choice(given: str, accepted: list[str], otherwise: str) -> str:
    """The nearest of what is accepted, or all of it."""
    near = difflib.get_close_matches(given, accepted, n=1)
    return f"; did you mean {near[0]}?" if near else f"{otherwise}{', '.join(accepted) or 'no options'}"


def _known_classes(key: str) -> list[str]:
    """Names of the classes that a key may have as its value, where it is one of these."""
    package = CLASSES.get(key.rpartition(".")[2])
    if package is None:
        return []
    module = importlib.import_module(package)
    found = {name: getattr(module, name) for name in module.__all__}
    return [name for name, value in found.items() if inspect.isclass(value) and _can_be_chosen(value)]


def _can_be_chosen(kind: type) -> bool:
    """Whether it does something: not a base class, an error, or what is passed around."""
    acts = {"__call__", "generate", "on_train_start", "log_metrics"} & set(dir(kind))
    base = inspect.isabstract(kind) or getattr(kind, "_is_protocol", False)
    return bool(acts) and not base and kind.__name__ != "RewardSet"  # which holds the others


def _unknown(key: str, valid: set[str], args: list[str]) -> str:
    near = RENAMED.get(key.removeprefix("fit.")) or _nearest(key, valid)
    parent = key.rpartition(".")[0]
    if near in (None, parent):
        siblings = {name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == parent}
        hint = f"; {parent or 'the top level'} takes {', '.join(sorted(siblings - {'help'}))}"
    else:
        hint = f"; did you mean {near}?"
    return f"unknown key {key}{_where(key, args)}{hint}"


def _shorter(line: str) -> str:
    """Of a value that fits none of several types, only what is wrong with its class, or the plain types."""
    wrong = re.search(
        r"^(.*?)Does not validate against .* Problem with given class_path '([\w.]+)': (.*?) - Expected a",
        line,
    )
    if wrong is not None:
        return f"{wrong[1]}{wrong[2]}: {wrong[3]}"
    union = re.search(
        r"^(.*?)Does not validate against any of the Union subtypes Subtypes: \[([^\[\]]*)\] Errors: .* "
        r"Given value type: .*? Given value: (.*)$",
        line,
    )
    if union is None:
        return line
    names = {
        "NoneType": "null",
        "str": "text",
        "int": "an integer",
        "float": "a number",
        "bool": "true or false",
    }
    kinds: list[str] = re.findall(r"<class '([\w.]+)'>", union[2])
    return f"{union[1]}Expected {' or '.join(names.get(kind, kind) for kind in kinds)}. Got value: {union[3]}"


def _unknown_keys(message: str) -> list[str]:
    """Keys that the message calls unknown, the fullest names first."""
    found = re.findall(r"[Gg]roup '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", message)
    keys = [f"{group}.{key}" if not key.startswith(f"{group}.") else key for group, key in found]
    keys += re.findall(r"[Ss]ubcommand '\w+' does not accept (?:option|nested key) '([\w.]+)'", message)
    keys += re.findall(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", message)
    keys += re.findall(r"[Uu]nrecognized arguments: --([\w.]+)", message)
    keys += re.findall(r"No action for (?:destination )?key ['\"]([\w.]+)['\"]", message)
    inner = re.search(r"(?:Parser key|Key) ['\"]([\w.]+)['\"]", message)
    return [f"{inner[1]}.{key}" if inner and "." not in key else key for key in keys]


def valid_keys(parser: Any) -> set[str]:
    """All keys of the parser, nested ones with dots, those of class options included."""
    keys: set[str] = set()
    for action in options_of(parser):
        if action.dest and action.dest not in ("help", "==SUPPRESS=="):
            keys.add(action.dest)
            keys.update(action.dest.rsplit(".", depth)[0] for depth in range(1, action.dest.count(".") + 1))
        choices = getattr(action, "choices", None)
        if isinstance(choices, dict):
            for name, sub in choices.items():
                keys |= {key for inner in valid_keys(sub) for key in (inner, f"{name}.{inner}")}
        keys |= {f"{action.dest}.{name}" for name in _class_options(type_of(action))}
    return keys


def _class_options(typehint: Any) -> set[str]:
    """Names of the options of the classes that a type hint allows."""
    import dataclasses
    import typing

    names: set[str] = set()
    for inner in typing.get_args(typehint):
        names |= _class_options(inner)
    if dataclasses.is_dataclass(typehint):
        names |= {field.name for field in dataclasses.fields(typehint)}
    return names


def _nearest(key: str, valid: set[str]) -> str | None:
    """The valid key that is most alike: siblings first, then the same last word elsewhere, then any."""
    parent, _, last = key.rpartition(".")
    siblings = [name for name in valid if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in siblings], n=1, cutoff=0.6)
    if near:
        return f"{parent}.{near[0]}" if parent else near[0]
    same = sorted((name for name in valid if name.rpartition(".")[2] == last), key=len)
    if same:
        return same[0]
    near = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.6)
    return near[0] if near else None


def _config_files(args: list[str]) -> list[Path]:
    paths = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg in ("--config", "-c")]
    paths += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    return [path for path in (Path(path).expanduser() for path in paths) if path.is_file()]


def _where(key: str, args: list[str]) -> str:
    """ " (file:line)" of a key in the config files that were given, or "" when it stands on the command
    line."""
    for path in _config_files(args):
        line = _line_of(_composed(path), key.split("."))
        if line is not None:
            return f" ({path}:{line + 1})"
    return ""


def _composed(path: Path) -> Any:
    """The file's YAML with line numbers; None where it is no YAML, which the parser says better."""
    try:
        return yaml.compose(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def _line_of(node: Any, path: list[str]) -> int | None:
    if isinstance(node, yaml.SequenceNode):
        lines = (_line_of(item, path) for item in node.value)
        return next((line for line in lines if line is not None), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == path[0]:
            return name.start_mark.line if len(path) == 1 else _line_of(value, path[1:])
        if name.value == "init_args" and (line := _line_of(value, path)) is not None:
            return line
    return None
