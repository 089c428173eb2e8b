"""From log files to prompt groups, with everything that was refused."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from agro_lightning.data.buffer.schema import BadFileError, Rejections
from agro_lightning.data.chat import RowError
from agro_lightning.data.logs.reading import ODD, FormName, LogFile, log_files
from agro_lightning.data.logs.tokens import LogTokens
from agro_lightning.types import Completion, Prompt, PromptGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A row that could not be used, or a whole file (row None)."""

    file: str
    row: int | None
    reason: str
    message: str


class KeptRejections(Rejections):
    """Rejections that keep every row's reason."""

    def __init__(self, path: str, *, strict: bool, unit: str, kept: list[Refusal]) -> None:
        super().__init__(path, strict=strict, unit=unit)
        self.kept = kept

    def add(self, reason: str, numbers: Sequence[int] | np.ndarray, message: str) -> None:
        super().add(reason, numbers, message)
        for number in numbers:
            self.kept.append(Refusal(file=self.path, row=int(number), reason=reason, message=message))


@dataclass(kw_only=True)
class ImportedLogs:
    """What was read out of logs."""

    groups: dict[str, tuple[Prompt, list[Completion]]] = field(default_factory=dict)
    """Prompt and completions by prompt_id, in the order of their first rows."""
    forms: dict[str, str] = field(default_factory=dict)
    """The form of each file that was read."""
    refused: list[Refusal] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Rows that say nothing new, by reason."""

    @property
    def prompt_groups(self) -> list[PromptGroup]:
        return [PromptGroup(prompt=prompt, completions=tuple(rows)) for prompt, rows in self.groups.values()]

    def add(self, prompt: Prompt, completion: Completion) -> None:
        """Adds a completion to its prompt's group.

        Raises:
            RowError: the task has another prompt in an earlier row.
        """
        known, completions = self.groups.setdefault(prompt.prompt_id, (prompt, []))
        if any(each.branch_lengths for each in (completion, *completions)):
            known, completions, prompt, completion = _with_branches(known, completions, prompt, completion)
            self.groups[prompt.prompt_id] = known, completions
        if known.prompt_ids != prompt.prompt_ids:
            said = f"task {prompt.prompt_id!r} begins with another prompt than in an earlier row"
            raise RowError(
                "prompt_mismatch", f"{said}; completions of one prompt are compared with each other"
            )
        completions.append(completion)


def _with_branches(
    known: Prompt, completions: list[Completion], prompt: Prompt, completion: Completion
) -> tuple[Prompt, list[Completion], Prompt, Completion]:
    """A group and a row that joins it, both behind the shorter of their prompts where that begins the other:
    what branches have in common is less than the prompt of a row without."""
    short, long = sorted((known, prompt), key=lambda one: len(one.prompt_ids))
    size = len(short.prompt_ids)
    if long.prompt_ids[:size] == short.prompt_ids:
        if long is known:
            completions = [each.behind(long.prompt_ids[size:]) for each in completions]
        else:
            completion = completion.behind(long.prompt_ids[size:])
        known = prompt = short
    return known, completions, prompt, completion


def import_logs(
    paths: Sequence[str],
    tokens: LogTokens,
    *,
    form: FormName | None = None,
    reward: str | None = None,
    strict_rows: bool = True,
    strict_files: bool = True,
) -> ImportedLogs:
    """Reads logs.

    Args:
        paths: files, folders or globs.
        tokens: the policy's.
        form: of all files; None: each file's own, told by its first row.
        reward: see `records.LogForm`.
        strict_rows: a row that cannot be used is an error instead of being noted.
        strict_files: the same of files.

    Raises:
        BadRowError, BadFileError: see above; the message names file and row.
        ValueError: no row could be used.
    """
    found = ImportedLogs()
    for path in log_files(paths):
        unit = "line" if path.suffix == ".jsonl" else "entry"
        rejections = KeptRejections(str(path), strict=strict_rows, unit=unit, kept=found.refused)
        log = LogFile(path, form, reward, rejections)
        try:
            for number, answer in log.answers():
                try:
                    found.add(*tokens.rollout(answer))
                except RowError as error:
                    rejections.add(error.reason, [number], str(error))
                except ODD as error:
                    log.odd_row(number, error)
        except BadFileError as error:
            if strict_files:
                raise
            found.refused.append(Refusal(file=str(path), row=None, reason="bad_file", message=str(error)))
        if log.form is not None:
            found.forms[str(path)] = log.form
        found.passed_over.update(log.passed_over)
    if not found.groups:
        first = f"; the first reason: {found.refused[0].message}" if found.refused else ""
        raise ValueError(f"no row of {', '.join(paths)} can be used: {len(found.refused)} refused{first}")
    return found
