"""The files of a rollout: which there are to be, which of them exist, who makes which."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agro_lightning.data.buffer.group_plan import runs
from agro_lightning.data.buffer.row_files import open_parquet
from agro_lightning.data.prompts.dataset import PromptDataset
from agro_lightning.primitives.atomic_files import sync_directory, write_once
from agro_lightning.types import Prompt

SETTINGS_FILE = "_rollout.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShare:
    """This process's share of the files: every `count`-th, from `index` on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "WorkerShare":
        """Reads "i/k". Raises ValueError for anything else, or unless 0 <= i < k."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError(
                f"shard is {text!r}; it must be i/k with 0 <= i < k, such as 0/4 for the first of four"
            )
        return cls(index=int(match[1]), count=int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFiles:
    """Numbers the files of one rollout. Which are done follows from the folder alone.

    Part p holds the groups p * size ... (p + 1) * size - 1 of the rollout; group g answers prompt g of the
    data set, which is gone through again, in another order where `shuffle`, once it is used up.
    """

    folder: Path
    prompts: PromptDataset
    size: int
    """Prompts of one file."""
    groups: int | None
    """Prompts in all, None: no end."""
    seed: int
    shuffle: bool

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:08d}.parquet"

    def missing(self, shard: WorkerShare) -> Iterator[int]:
        """The parts that a shard has yet to make, each looked for when it is its turn."""
        part = shard.index
        while self.groups is None or part * self.size < self.groups:
            if not self.path(part).exists():
                yield part
            part += shard.count

    def count(self, shard: WorkerShare) -> int | None:
        """How many parts the shard has in all."""
        if self.groups is None:
            return None
        return len(range(shard.index, -(-self.groups // self.size), shard.count))

    def prompts_of(self, part: int) -> list[Prompt]:
        """The prompts that a part answers."""
        end = (part + 1) * self.size
        if self.groups is not None:
            end = min(end, self.groups)
        return [self._prompt(group) for group in range(part * self.size, end)]

    def _prompt(self, group: int) -> Prompt:
        epoch, index = divmod(group, len(self.prompts))
        return self.prompts[int(self.prompts.order(self.seed, epoch)[index]) if self.shuffle else index]

    def request_seed(self, group: int, member: int, attempt: int) -> int:
        """The seed of one attempt at one completion of a group."""
        return int(np.random.default_rng([self.seed, group, member, attempt]).integers(2**63))

    def sampling_seed(self, part: int) -> int:
        """The seed that a part is sampled with."""
        return int(np.random.default_rng([self.seed, part]).integers(2**31))


def claim_folder(folder: Path, settings: Mapping[str, Any], name: str = SETTINGS_FILE) -> None:
    """Notes in a folder what it is filled with, or checks that it is filled with just that.

    Raises:
        ValueError: it is filled with something else (names the first setting that differs), or what it is
            filled with cannot be read.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_directory(folder.parent)
    path = folder / name
    try:
        write_once(path, json.dumps(settings, indent=1, sort_keys=True).encode())
    except FileExistsError:
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(
                f"{path}, which says what the folder holds, is damaged; give another folder"
            ) from None
        wanted = json.loads(json.dumps(settings))
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{folder} was begun with {key} {found.get(key)!r}, not {wanted.get(key)!r}. Go on "
                    "with the same settings, or give another folder"
                ) from None


class CommittedGroups:
    """Counts the groups in a folder's files; each file is read once, and those made here never."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[str] = set()
        self.total = 0
        """Groups of 2 or more completions in the files that are known."""

    def note(self, name: str, groups: int) -> None:
        """Counts a file that this process has made."""
        if name not in self._known:
            self._known.add(name)
            self.total += groups

    def look(self) -> None:
        """Counts the files that have appeared."""
        for path in self._folder.glob("part-*.parquet"):
            if path.name not in self._known:
                with open_parquet(path) as file:
                    ids = np.array(file.read(columns=["prompt_id"]).column("prompt_id").to_pylist())
                sizes = np.diff(runs(ids), append=len(ids))
                self.note(path.name, int((sizes >= 2).sum()))
