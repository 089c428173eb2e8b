"""Where prompts come from: JSONL, JSON and Parquet files, folders, saved data sets, the hub, gym tasks."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agro_lightning import quickstart
from agro_lightning.data.buffer.row_files import (
    BOM,
    check_regular,
    one_line,
    open_parquet,
    parquet_batches,
    read_json_lines,
)
from agro_lightning.data.buffer.schema import BadFileError, Rejections
from agro_lightning.data.chat import without_filler
from agro_lightning.rewards.gym import GYM_FIELD, require_reasoning_gym

SUFFIXES = (".jsonl", ".json", ".parquet")
SHIPPED = {
    "quickstart-train": "prompts_train.jsonl",
    "quickstart-val": "prompts_val.jsonl",
    "larger-number-train": "larger_number_train.jsonl",
    "larger-number-val": "larger_number_val.jsonl",
    "apples-train": "apples_train.jsonl",
    "apples-val": "apples_val.jsonl",
    "guess": "guess.jsonl",
    "calculator-train": "calculator_train.jsonl",
    "calculator-val": "calculator_val.jsonl",
}
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
MAX_LIST_BYTES = 1 << 30
GYM_SIZE = 1000
"""Prompts of a gym task whose options name no size."""
_LOCAL = "Give a .jsonl, .json or .parquet file, a folder with some, a folder from save_to_disk, or a hub id"
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One row as read from its source."""

    number: int
    """Its line (JSONL, from 1) or row (from 0)."""
    columns: dict[str, Any]
    rejections: Rejections
    """Takes note of the row where it is bad."""


class RejectedRows:
    """The bad rows of all files of a data set."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        """Whether the first bad row is an error; else they are counted."""
        self.files: list[Rejections] = []

    def open(self, path: str, unit: str) -> Rejections:
        """Starts a file, whose rows are counted in `unit` (line, row or entry)."""
        self.files.append(Rejections(path, strict=self.strict, unit=unit))
        return self.files[-1]

    @property
    def counts(self) -> Counter[str]:
        """Bad rows by reason."""
        return sum((rejections.counts for rejections in self.files), Counter())

    @property
    def first(self) -> str | None:
        """What was wrong with the first of them."""
        return next((rejections.first[1] for rejections in self.files if rejections.first is not None), None)


def read_prompt_rows(
    path: str, *, subset: str | None, split: str, rejected: RejectedRows
) -> Iterator[PromptRow]:
    """The rows of a data set, in the order of its files.

    Args:
        path: a file, a glob, a folder, a hub id, or `quickstart-train` or `quickstart-val`.
        subset: the configuration, where the data set has several (`main` of GSM8K).
        split: the split, where it has several.
        rejected: takes note of bad rows.

    Raises:
        BadFileError: there is nothing at `path`, or a file cannot be read; the message names it.
        BadRowError: a line is no row, and bad rows are errors.
    """
    path = os.path.expanduser(path)
    place = Path(path)
    if path in SHIPPED:
        yield from _read_file(quickstart.FOLDER / SHIPPED[path], rejected)
    elif place.is_dir() and any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _read_saved(path, split, rejected)
    elif place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if _is_rows(file.relative_to(place))]
        for file in _of_split(place, files, subset, split):
            yield from _read_file(file, rejected)
    elif place.exists():
        yield from _read_file(place, rejected)
    elif glob.has_magic(path):
        matches = sorted(Path(match) for match in glob.glob(path, recursive=True))
        if not matches:
            raise BadFileError(f"no file matches {path!r}. {_LOCAL}")
        for file in matches:
            yield from _read_file(file, rejected)
    elif place.suffix not in SUFFIXES and _HUB_ID.fullmatch(path):
        yield from _read_hub(path, subset, split, rejected)
    else:
        raise BadFileError(f"{path!r} does not exist. {_LOCAL}")


def read_gym_rows(task: str, options: dict[str, Any], *, rejected: RejectedRows) -> Iterator[PromptRow]:
    """The prompts that a reasoning-gym task generates: `prompt`, `answer`, and what scores them.

    Args:
        task: the task's name, such as `leg_counting`.
        options: the task's own options. `size` is 1000 and `seed` is 0 where they are not given.
        rejected: takes note of bad rows.

    Raises:
        ImportError: reasoning-gym is not installed.
        BadFileError: no such task, or no such option.
    """
    require_reasoning_gym("format: gym")
    from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]

    options = {"size": GYM_SIZE, "seed": 0} | options
    rejections = rejected.open(f"reasoning-gym task {task}", "entry")
    try:
        entries = create_dataset(task, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise BadFileError(f"reasoning-gym cannot make the task {task!r} with {options}: {error}") from error
    for number in range(len(entries)):
        entry = entries[number]
        gym = {"task": task, "options": options, "entry": entry}
        columns = {"prompt": entry["question"], "answer": entry["answer"], GYM_FIELD: gym}
        yield PromptRow(number=number, columns=columns, rejections=rejections)


def _is_rows(inside: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in inside.parts)
    return inside.suffix in SUFFIXES and not hidden and inside.name != "dataset_info.json"


def _of_split(folder: Path, files: Sequence[Path], subset: str | None, split: str) -> list[Path]:
    """Those files whose path inside the folder names subset and split; all, where none names a split."""
    if not files:
        raise BadFileError(f"the folder {str(folder)!r} holds no {', '.join(SUFFIXES)} file. {_LOCAL}")
    if subset is not None:
        chosen = [file for file in files if subset in _words(file.relative_to(folder))]
        if not chosen:
            names = ", ".join(str(file.relative_to(folder)) for file in files[:10])
            raise BadFileError(f"no file in {str(folder)!r} belongs to subset {subset!r}; it holds {names}")
        files = chosen
    splits = {file: _words(file.relative_to(folder)) & {*SPLITS, split} for file in files}
    if any(splits.values()):
        chosen = [file for file in files if split in splits[file]]
        if not chosen:
            found = ", ".join(sorted(set().union(*splits.values())))
            raise BadFileError(f"the folder {str(folder)!r} has the splits {found}, none called {split!r}")
        files = chosen
    inner = {file.relative_to(folder).parts[0] for file in files if file.parent != folder}
    subsets = sorted(inner - {"data", *SPLITS})
    if subset is None and len(subsets) > 1:
        raise BadFileError(
            f"the folder {str(folder)!r} has the subsets {', '.join(subsets)}; set subset to one of them, or "
            "give a glob for several"
        )
    return list(files)


def _words(inside: Path) -> set[str]:
    """What a path inside a folder is made of: its folders, its name, and the words of its name."""
    return {*inside.parts[:-1], inside.stem, *re.split(r"[-_.]", inside.stem)}


def _read_file(path: Path, rejected: RejectedRows) -> Iterator[PromptRow]:
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, rejected)
        elif path.suffix == ".json" and _first_character(path) == b"[":
            yield from _read_json_list(path, rejected)
        elif path.suffix in (".json", ".jsonl"):
            rejections = rejected.open(str(path), "line")
            no_object = "is a {}; an object with a prompt is needed"
            for number, columns, _ in read_json_lines(path, rejections, no_object=no_object):
                yield PromptRow(number=number, columns=columns, rejections=rejections)
        else:
            raise BadFileError(f"{path} is no file of prompts; accepted are {', '.join(SUFFIXES)} files")
    except OSError as error:
        raise BadFileError(f"{path} cannot be read: {error}") from error


def _first_character(path: Path) -> bytes:
    check_regular(path)
    with path.open("rb") as file:
        return file.read(1024).removeprefix(BOM).lstrip()[:1]


def _read_json_list(path: Path, rejected: RejectedRows) -> Iterator[PromptRow]:
    rejections = rejected.open(str(path), "entry")
    if path.stat().st_size > MAX_LIST_BYTES:
        raise BadFileError(
            f"{path} is one JSON list of {path.stat().st_size:,} bytes, which must be read whole; at most "
            f"{MAX_LIST_BYTES:,} are. Write it as JSONL, an object a line"
        )
    try:
        entries = json.loads(path.read_bytes().removeprefix(BOM).decode())
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is no JSON: {one_line(error)}") from error
    for number, columns in enumerate(entries):
        if isinstance(columns, dict):
            yield PromptRow(number=number, columns=columns, rejections=rejections)
        else:
            kind = type(columns).__name__
            rejections.add("bad_json", [number], f"is a {kind}; an object with a prompt is needed")


def _read_parquet(path: Path, rejected: RejectedRows) -> Iterator[PromptRow]:
    rejections = rejected.open(str(path), "row")
    with open_parquet(path) as file:
        for numbers, batch in parquet_batches(file, None, rejections):
            for number, columns in zip(numbers.tolist(), batch.to_pylist(), strict=True):
                row = _from_arrow(columns, file.schema_arrow)
                yield PromptRow(number=number, columns=row, rejections=rejections)


def _from_arrow(columns: Any, schema: pa.Schema) -> dict[str, Any]:
    """A row from Arrow; its lists of messages and tools without the nulls that mean missing keys, and its
    short floats as they were written: as a float64, the float32 0.1 is 0.10000000149011612."""
    row = {
        name: without_filler(value) if isinstance(value, list) else value for name, value in columns.items()
    }
    for field in schema:
        if _short_floats(field.type):
            row[field.name] = _as_written(row.get(field.name), field.type)
    return row


def _short_floats(kind: pa.DataType) -> bool:
    """Whether there are floats of fewer than 64 bits in a type."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return pa.types.is_float32(kind) or pa.types.is_float16(kind) or any(map(_short_floats, inner))


def _as_written(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, float) and not kind.num_fields:
        return float(str((np.float16 if pa.types.is_float16(kind) else np.float32)(value)))
    if isinstance(value, list) and kind.num_fields == 1:
        return [_as_written(item, kind.field(0).type) for item in value]
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {
            name: _as_written(item, kind.field(name).type) if _short_floats(kind.field(name).type) else item
            for name, item in value.items()
        }
    return value


def _read_saved(path: str, split: str, rejected: RejectedRows) -> Iterator[PromptRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(path)
    except Exception as error:  # datasets raises whatever its parts raise on a damaged folder
        raise BadFileError(f"{path} is no readable folder of save_to_disk: {one_line(error)}") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise BadFileError(f"{path} has the splits {', '.join(map(str, data))}, none called {split!r}")
        data = data[split]
    schema, rejections = data.features.arrow_schema, rejected.open(path, "row")
    for number, columns in enumerate(data):
        yield PromptRow(number=number, columns=_from_arrow(columns, schema), rejections=rejections)


def _read_hub(path: str, subset: str | None, split: str, rejected: RejectedRows) -> Iterator[PromptRow]:
    from datasets import load_dataset

    try:
        data = load_dataset(path, name=subset, split=split)
    except Exception as error:  # of many kinds: no network, no such data set, subset or split, a gated one
        raise BadFileError(
            f"{path!r} is no local path, and cannot be loaded from the hub: {one_line(error)}. Without a "
            "network, set path to a local copy of it"
        ) from error
    schema, rejections = data.features.arrow_schema, rejected.open(path, "row")
    for number, columns in enumerate(data):
        yield PromptRow(number=number, columns=_from_arrow(columns, schema), rejections=rejections)
