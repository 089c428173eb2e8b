"""Reading log files: finding them, telling their form, and handing out their answers row by row."""

import json
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from agro_lightning.data.buffer.files import find_row_files
from agro_lightning.data.buffer.row_files import MAX_LINE_BYTES, check_regular, one_line, read_json_lines
from agro_lightning.data.buffer.schema import FIX_FILE, BadFileError, BadRowError, Rejections
from agro_lightning.data.chat import RowError
from agro_lightning.data.logs.chats import Chats
from agro_lightning.data.logs.graded import Graded
from agro_lightning.data.logs.inspect_evals import InspectEvals
from agro_lightning.data.logs.lm_eval_samples import LmEvalSamples
from agro_lightning.data.logs.openenv_traces import OpenEnvTraces
from agro_lightning.data.logs.records import LogForm, LoggedAnswer, Row
from agro_lightning.data.logs.verifiers_traces import VerifiersTraces

FormName = Literal["verifiers", "openenv", "inspect", "lm-eval", "chat", "graded"]
FORMS: dict[str, type[LogForm]] = {
    "verifiers": VerifiersTraces,
    "openenv": OpenEnvTraces,
    "inspect": InspectEvals,
    "lm-eval": LmEvalSamples,
    "chat": Chats,
    "graded": Graded,
}
"""In the order in which a file's first row is asked."""
assert tuple(FORMS) == get_args(FormName)
SUFFIXES = (".jsonl", ".json", ".eval")
ODD = (AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError, RecursionError)
"""What values of other types than a form has can raise."""
ZSTANDARD = 93
"""The number that archives give it."""
NumberedRow = tuple[int, dict[str, Any]]


def form_of(row: Row) -> str | None:
    """The name of a row's form, None where it has none that is known."""
    return next((name for name, form in FORMS.items() if form.knows(row)), None)


def log_files(paths: Sequence[str]) -> list[Path]:
    """The .jsonl, .json and .eval files under some paths: files, folders at any depth, or globs.

    Raises:
        BadFileError: a path does not exist or is no such file, or a folder holds none.
    """
    found = [
        Path(entry.path) for entry in find_row_files(paths, may_be_missing=False, suffixes=SUFFIXES).values()
    ]
    if not found:
        raise BadFileError(f"{', '.join(paths)} holds no log: {', '.join(SUFFIXES)} files are looked for")
    return sorted(found)


class LogFile:
    """One log, opened.

    Args:
        path: the file.
        form: its form; None: told by its first row.
        reward: see LogForm.
        rejections: takes note of the rows that cannot be used.
    """

    def __init__(self, path: Path, form: FormName | None, reward: str | None, rejections: Rejections) -> None:
        self.path, self.form, self.rejections = path, form, rejections
        self._wanted, self._reader = reward, None if form is None else FORMS[form](reward)

    @property
    def passed_over(self) -> Counter[str]:
        """Rows left out on purpose, by reason."""
        return Counter() if self._reader is None else Counter(self._reader.passed_over)

    def answers(self) -> Iterator[tuple[int, LoggedAnswer]]:
        """(row number, answer) of every answer.

        Raises:
            BadFileError: the file cannot be read, is empty, or is of no known form.
            BadRowError: a row cannot be used, and `rejections` is strict.
        """
        empty = True
        for number, row in self._rows():
            empty = False
            reader = self._reader or self._recognised(row, number)
            try:
                if not reader.knows(row):
                    raise RowError(
                        "other_form", f"is no row of the form {self.form}: {reader.columns} is needed"
                    )
                for answer in reader.answers(row):
                    if isinstance(answer, RowError):
                        self.rejections.add(answer.reason, [number], str(answer))
                    else:
                        yield number, answer
            except RowError as error:
                self.rejections.add(error.reason, [number], str(error))
            except ODD as error:
                if isinstance(error, BadRowError | BadFileError):
                    raise
                self.odd_row(number, error)
        if empty and not self.rejections.counts:
            raise BadFileError(f"{self.path} holds no row. {FIX_FILE}")

    def odd_row(self, number: int, error: BaseException) -> None:
        """Notes a row with a value that its form does not have, which was found by what that raised."""
        said = f"is no row of the form {self.form}: {type(error).__name__} {one_line(error)}"
        self.rejections.add("wrong_type", [number], said)

    def _recognised(self, row: Row, number: int) -> LogForm:
        name = form_of(row)
        if name is None:
            known = "; ".join(f"{form}: {FORMS[form].columns}" for form in FORMS)
            columns = ", ".join(list(row)[:20]) or "none"
            raise BadFileError(
                f"{self.path}: {self.rejections.unit} {number} has the columns {columns}, "
                f"which no known log has. Known are {known}. Name one by --form"
            )
        self.form, self._reader = name, FORMS[name](self._wanted)
        return self._reader

    def _rows(self) -> Iterator[NumberedRow]:
        check_regular(self.path)
        with self.path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" or self.path.suffix == ".eval":
            yield from _archived(self.path, self.rejections)
        elif self.path.suffix == ".json":
            yield from _whole(self.path)
        else:
            no_object = "is a {}; each line must be one object"
            for number, row, _ in read_json_lines(self.path, self.rejections, no_object=no_object):
                yield number, row


def _archived(path: Path, rejections: Rejections) -> Iterator[NumberedRow]:
    """The samples of an inspect-ai archive, in the order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry for entry in archive.infolist() if entry.filename.startswith("samples/")]
            if not names:
                raise BadFileError(
                    f"{path} is an archive without samples/; inspect-ai writes such. {FIX_FILE}"
                )
            for number, entry in enumerate(sorted(names, key=lambda entry: entry.filename)):
                if entry.file_size > MAX_LINE_BYTES:
                    size = f"unpacks to {entry.file_size:,} bytes; at most {MAX_LINE_BYTES:,} are read"
                    rejections.add("text_too_long", [number], f"{entry.filename} {size}")
                    continue
                try:
                    row = json.loads(_entry(archive, entry))
                except (ValueError, RecursionError) as error:
                    rejections.add("bad_json", [number], f"{entry.filename} is no JSON: {one_line(error)}")
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    rejections.add("bad_json", [number], f"{entry.filename} is no JSON object")
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OSError,
        pa.ArrowException,
    ) as error:
        raise BadFileError(
            f"{path} is no readable archive, torn perhaps: {one_line(error)}. {FIX_FILE}"
        ) from None


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry's content; also where it is packed with Zstandard, which Python's zipfile learns in 3.14."""
    if entry.compress_type != ZSTANDARD:
        with archive.open(entry) as file:
            return file.read(MAX_LINE_BYTES + 1)
    with open(str(archive.filename), "rb") as file:
        file.seek(entry.header_offset)
        name, extra = struct.unpack("<26x2H", file.read(30))
        file.seek(name + extra, os.SEEK_CUR)
        packed = pa.BufferReader(file.read(min(entry.compress_size, MAX_LINE_BYTES)))
    with pa.input_stream(packed, compression="zstd") as stream:
        data = stream.read(MAX_LINE_BYTES + 1)
    if zlib.crc32(data) != entry.CRC:
        raise zipfile.BadZipFile(f"{entry.filename} is damaged, or larger than it says")
    return data


def _whole(path: Path) -> Iterator[NumberedRow]:
    """The rows of a JSON file: one object, a list of them, or an inspect-ai log with its samples."""
    if os.path.getsize(path) > MAX_LINE_BYTES:
        limit = f"has {os.path.getsize(path):,} bytes; at most {MAX_LINE_BYTES:,} are read as one JSON"
        raise BadFileError(f"{path} {limit}: write a row a line, as .jsonl. {FIX_FILE}")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is no JSON: {one_line(error)}. {FIX_FILE}") from None
    if isinstance(found, dict) and isinstance(found.get("samples"), list):
        found = found["samples"]
    for number, row in enumerate(found if isinstance(found, list) else [found]):
        if not isinstance(row, dict):
            raise BadFileError(
                f"{path}: entry {number} is a {type(row).__name__}; objects are needed. {FIX_FILE}"
            )
        yield number, row
