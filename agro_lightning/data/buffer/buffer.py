"""Reading rollout files as prompt groups: drawn at random, by prompt, or in order, in bounded memory."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.files import FileSet, RowFile
from agro_lightning.data.buffer.group_plan import GroupPlan
from agro_lightning.data.buffer.prompt_index import PromptIndex
from agro_lightning.data.buffer.schema import FIX_ROW, BadRowError, prompt_id_of
from agro_lightning.data.buffer.store import Record, RowStore, prompt_key
from agro_lightning.data.buffer.validation import RowChecker
from agro_lightning.types import Completion, Prompt, PromptGroup

RowReward = tuple[float, Mapping[str, float]]
"""A row's total reward and its parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferCounts:
    """What a buffer holds and what it left out."""

    rows: int
    """Rows that can be drawn."""
    files: int
    """Files that they come from."""
    dropped: Mapping[str, int]
    """Bad rows left out, by reason."""
    files_skipped: Mapping[str, str]
    """Files left out, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Some of a buffer's rows, such as those that are new enough for replay."""

    buffer: "RolloutBuffer"
    prompts: PromptIndex

    @property
    def num_rows(self) -> int:
        return len(self.prompts.rows)

    def plan_epoch(self, seed: int, epoch: int, group_size: int) -> GroupPlan:
        """As RolloutBuffer.plan_epoch, but prompts with a single row are passed over, whatever on_bad_row."""
        return self.prompts.plan(seed, epoch, group_size)

    def rows_of(self, prompt: str | Prompt) -> np.ndarray:
        """As RolloutBuffer.rows_of."""
        return self.buffer.rows_of(prompt, self.prompts)


class RolloutBuffer:
    """The completions of any number of row files, grouped by prompt.

    Rows are numbered from 0 in the order in which files are loaded, and keep their numbers. A draw reads only
    the rows that it returns; memory holds about 20 bytes a row.

    Examples:
        >>> from transformers import AutoTokenizer
        >>> from agro_lightning.quickstart import FOLDER
        >>> tokenizer = AutoTokenizer.from_pretrained(FOLDER / "policy")
        >>> buffer = RolloutBuffer(FOLDER / "offline.parquet", tokenizer=tokenizer, vocab_size=17)
        >>> plan = buffer.plan_epoch(seed=0, epoch=0, group_size=4)
        >>> (group,) = buffer.groups([plan[0]])
        >>> group.prompt.prompt.endswith("="), len(group)
        (True, 4)
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        max_prompt_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        on_bad_row: Literal["error", "drop"] = "error",
        on_bad_file: Literal["error", "skip"] = "error",
        append_eos: bool = True,
        unscored: bool = False,
        source_name: str | None = None,
        live: bool = False,
        accept: Callable[[str], bool] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        """
        Args:
            paths: files, folders (`*.parquet` and `*.jsonl` at any depth; names starting with "." or "_" are
                not looked at), or globs.
            tokenizer: the run's; tokenises rows that have only text.
            vocab_size: rows of the model's embedding; token ids must lie below.
            max_prompt_tokens: longest prompt accepted.
            max_completion_tokens: longest completion accepted, EOS included.
            on_bad_row: stop with an error that names file and row, or drop such rows and count them.
            on_bad_file: stop with an error that names the file, or skip such files and count them.
            append_eos: end completions that are tokenised from text with EOS, unless their finish_reason is
                "length".
            unscored: rows may have no reward: it is NaN until `set_rewards` gives it.
            source_name: what drawn completions give as their source; default what their row says, else
                "offline".
            live: the folders are still being filled: they may be missing or empty now, see `refresh`.
            accept: called with the label of each file that is not loaded yet; False leaves it for a later
                refresh.
            cache_dir: where packed copies of large files are kept; default `store.default_cache()`.

        Raises:
            BadFileError, BadRowError: a file or row cannot be used, and is neither dropped nor skipped.
            ValueError: nothing was found (unless `live`), or an option is wrong.
        """
        if on_bad_row not in ("error", "drop"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}; it must be error or drop")
        if on_bad_file not in ("error", "skip"):
            raise ValueError(f"on_bad_file is {on_bad_file!r}; it must be error or skip")
        self._strict_rows = on_bad_row == "error"
        self._source_name = source_name
        self._live = live
        self.accept = accept
        checker = RowChecker(
            tokenizer,
            vocab_size=vocab_size,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            append_eos=append_eos,
            unscored=unscored,
        )
        self._rewards: dict[int, RowReward | None] = {}
        self.tokenizer_id = checker.tokens.tokenizer_id
        store = RowStore(checker, strict=self._strict_rows, directory=Path(cache_dir) if cache_dir else None)
        listed = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self._set = FileSet(listed, store, strict=on_bad_file == "error", live=live)
        self._planned: tuple[tuple[int, int, int], GroupPlan] | None = None
        self.refresh()
        if not live and not self.num_rows:
            skipped = list(self._set.skipped.values())
            raise ValueError(
                f"no row can be drawn from {', '.join(listed) or 'no paths'}: {len(self.files)} files read, "
                f"{len(skipped)} skipped, rows dropped: {dict(self.counts.dropped) or 'none'}. "
                f"{skipped[0] if skipped else 'Give .parquet or .jsonl files, or folders that hold some.'}"
            )

    def refresh(self) -> int:
        """Loads files added since, and forgets files that are gone; returns how many rows came and went.

        Only new files are read. With `on_bad_file: skip`, a skipped file is tried again once it has changed.

        Raises:
            BadFileError, BadRowError: as in the constructor; also a file that changed after it was loaded.
        """
        changed = -1
        try:
            changed = self._set.refresh(self.accept)
        finally:
            if changed != 0:
                self.__dict__.pop("_prompts", None)
                self.__dict__.pop("_every_prompt", None)
                self._planned = None
        return changed

    @property
    def files(self) -> list[RowFile]:
        """The loaded files, oldest first: by their newest policy version, then by label."""
        return self._set.files

    @property
    def num_rows(self) -> int:
        return self._set.num_rows

    def num_groups(self, min_size: int = 2) -> int:
        """How many prompts have at least `min_size` rows."""
        return int((self._prompts.counts >= min_size).sum())

    @property
    def counts(self) -> BufferCounts:
        """What is there and what was left out, over all files that are loaded now."""
        dropped: Counter[str] = Counter()
        for file in self.files:
            dropped.update(file.source.dropped)
        if not self._strict_rows:
            singles = int((self._prompts.counts == 1).sum())
            dropped.update({"prompt_mismatch": self._prompts.mismatched, "group_of_one": singles})
        return BufferCounts(
            rows=self.num_rows,
            files=len(self.files),
            dropped={reason: count for reason, count in sorted(dropped.items()) if count},
            files_skipped=self._set.skipped,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """A hash of each file's rows, by label; equal rows have equal hashes, however they are stored."""
        return {file.label: file.source.digest for file in self.files}

    @property
    def fingerprint(self) -> str:
        """A hash of `fingerprints`: what a plan depends on besides its arguments."""
        return hashlib.blake2b(
            json.dumps(sorted(self.fingerprints.items())).encode(), digest_size=8
        ).hexdigest()

    def select(self, *, min_policy_version: int | None = None, newest: int | None = None) -> Selection:
        """The rows that may be drawn, for replay.

        Args:
            min_policy_version: leaves out rows of older policies: the current version minus max_staleness.
            newest: of all rows, only this many of the newest: the capacity.
        """
        chosen = self._set.order if newest is None else self._set.order[max(0, self.num_rows - newest) :]
        if min_policy_version is not None:
            versions = self._set.column("version")[self.num_rows - len(chosen) :]
            chosen = chosen[versions >= min_policy_version]
        return Selection(buffer=self, prompts=self._prompts.only(chosen))

    def plan_epoch(self, seed: int, epoch: int, group_size: int) -> GroupPlan:
        """Parts each prompt's rows into groups of up to `group_size`, in random order; see
        `group_plan.plan_groups`.

        The plan depends on the arguments and the files alone, so (epoch, i) is all that a checkpoint has to
        keep. The last plan is kept, so asking for it again costs nothing.

        Args:
            seed: of the run.
            epoch: how often the buffer has been gone through.
            group_size: completions a group, at least 2.

        Raises:
            BadRowError: a prompt has a single row in the whole buffer, and bad rows are errors.
        """
        key = (seed, epoch, group_size)
        if self._planned is not None and self._planned[0] == key:
            return self._planned[1]
        prompts, every = self._prompts, self._every_prompt
        single = np.flatnonzero(every.counts == 1)
        if self._strict_rows and len(single):
            record, row_id = self._set.read(int(every.rows[every.starts[single[0]]]))
            raise BadRowError(
                f"{row_id}: the only completion of prompt {record.prompt_id!r}; a group needs at least 2 to "
                f"compare, and {len(single)} prompts have one. With data.mixing within_group it joins live "
                f"completions. {FIX_ROW}",
                reason="group_of_one",
            )
        self._planned = (key, prompts.plan(seed, epoch, group_size))
        return self._planned[1]

    def rows_of(self, prompt: str | Prompt, among: PromptIndex | None = None) -> np.ndarray:
        """The rows of one prompt, oldest first; none if it is not in the buffer.

        Args:
            prompt: a prompt_id; or a Prompt, which also finds rows without prompt_id whose prompt has the
                same tokens.
            among: look only here; default all rows.

        Raises:
            BadRowError: rows of that prompt_id have another prompt than the given one.
        """
        index = self._prompts if among is None else among
        if isinstance(prompt, str):
            return index.rows_of(prompt_key(prompt))
        named = index.rows_of(prompt_key(prompt.prompt_id))
        tokens = np.asarray(prompt.prompt_ids, "<i4").tobytes()
        if len(named) and self._set.read(int(named[0]))[0].prompt_tokens != tokens:
            raise BadRowError(
                f"{self.row_id(int(named[0]))}: prompt_id {prompt.prompt_id!r} has other tokens here "
                "than in the run; were the prompts made with another chat template? Give one of them new ids",
                reason="prompt_mismatch",
            )
        same_tokens = prompt_id_of(prompt.prompt_ids)
        unnamed = index.rows_of(prompt_key(same_tokens)) if same_tokens != prompt.prompt_id else named[:0]
        return np.concatenate([named, unnamed])

    def groups(self, rows: Sequence[Sequence[int]]) -> list[PromptGroup]:
        """Reads groups, each given as row numbers of one prompt, none twice.

        Raises:
            ValueError: a row is twice in a group (that would bias the variance), or prompts differ.
            KeyError: a row's file is gone.
        """
        return [self._group(group) for group in rows]

    def iter_groups(self) -> Iterator[PromptGroup]:
        """Every prompt with all its rows, single ones included, in the order of the prompts' first rows."""
        prompts = self._prompts
        ends = prompts.starts + prompts.counts
        for place in np.argsort(prompts.rows[prompts.starts], kind="stable"):
            yield self._group(prompts.rows[prompts.starts[place] : ends[place]].tolist())

    def unscored_rows(self) -> Iterator[tuple[int, Prompt, str]]:
        """(row, its prompt, its completion's text) of every row without a reward, in the order of rows."""
        for row in np.sort(self._set.order).tolist():
            record, row_id = self._set.read(row)
            if not record.scored and row not in self._rewards:
                yield row, record.prompt(), record.completion(row_id).completion

    def set_rewards(self, rewards: Mapping[int, "RowReward | None"]) -> None:
        """Gives rewards to rows that have none; None leaves a row out, that cannot or need not be scored."""
        self._rewards.update(rewards)
        self.__dict__.pop("_prompts", None)
        self._planned = None

    def row_id(self, row: int) -> str:
        """Names a row by its file and its number there."""
        return self._set.read(row)[1]

    def _group(self, rows: Sequence[int]) -> PromptGroup:
        if not len(rows) or len(set(rows)) != len(rows):
            raise ValueError(
                f"group {list(rows)} is empty or has a row twice; name distinct rows of one prompt"
            )
        first: Record | None = None
        completions: list[Completion] = []
        for row in rows:
            record, row_id = self._set.read(row)
            first = first or record
            if record.prompt_tokens != first.prompt_tokens:
                raise ValueError(
                    f"group {list(rows)} mixes prompts {first.prompt_id!r} and {record.prompt_id!r}; take one"
                )
            completion = record.completion(row_id, self._source_name)
            if given := self._rewards.get(row):
                completion = replace(completion, reward=given[0], reward_parts=given[1])
            completions.append(completion)
        assert first is not None
        return PromptGroup(prompt=first.prompt(), completions=tuple(completions))

    @cached_property
    def _prompts(self) -> PromptIndex:
        """Those of the rows that can be drawn."""
        left_out = [row for row, reward in self._rewards.items() if reward is None]
        every = self._every_prompt
        if not left_out:
            return every
        return replace(every.only(np.setdiff1d(every.rows, left_out)), mismatched=every.mismatched)

    @cached_property
    def _every_prompt(self) -> PromptIndex:
        keys = self._set.column("prompt_key")
        order = np.argsort(keys, kind="stable").astype(self._set.order.dtype)
        checks = self._set.column("prompt_check")[order]
        return PromptIndex.of(self._set.order[order], keys[order], checks, self._refuse_mismatch)

    def _refuse_mismatch(self, row: int, first: int) -> None:
        if self._strict_rows:
            record, row_id = self._set.read(row)
            raise BadRowError(
                f"{row_id}: prompt_id {record.prompt_id!r} has another prompt here than in "
                f"{self.row_id(first)}; rows with one prompt_id are compared with each other. {FIX_ROW}",
                reason="prompt_mismatch",
            )
