"""Tokenisation of prompts and rows: ids for texts, texts for ids, new ids for another tokenizer's."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.schema import READ_SCHEMA, prompt_id_of, tokenizer_id
from agro_lightning.data.chat import special_tokens
from agro_lightning.primitives.ragged import Ragged


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompt texts, for prompt data sets and buffer rows alike.

    The tokenizer's special tokens are added unless the text begins with them: with BOS, or with a special
    token that the tokenizer's chat template writes. An EOS that the tokenizer would put at the end is left
    out: the completion goes on from here.
    """
    openings, ends = _openings(tokenizer), adds_eos(tokenizer)
    written = [text.startswith(openings) for text in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    for special in (True, False):
        chosen = [place for place, begun in enumerate(written) if begun != special]
        encoded = _encode(tokenizer, [prompts[place] for place in chosen], special=special)
        for place, ids in zip(chosen, encoded, strict=True):
            rows[place] = ids[:-1] if special and ends else ids
    return rows


def adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer ends texts with its EOS."""
    eos = tokenizer.eos_token_id
    return eos is not None and _encode(tokenizer, ["a"], special=True)[0][-1:] == [eos]


def describe_special_tokens(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """Which special tokens come before a prompt's text: a sentence for `doctor`."""
    added = _encode(tokenizer, ["a"], special=True)[0]
    bare = _encode(tokenizer, ["a"], special=False)[0]
    front = tokenizer.convert_ids_to_tokens(added[: max(0, len(added) - len(bare) - adds_eos(tokenizer))])
    if chat:
        return "chats get the special tokens that the chat template writes, and no others"
    if not front:
        return "the tokenizer adds no special token to a prompt's text"
    return (
        f"{' '.join(front)} is put before a prompt's text, unless the text begins with it; text-only buffer "
        "rows are tokenised in the same way"
    )


def _openings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """How texts begin that bring their special tokens along."""
    template = str(tokenizer.chat_template or "")
    in_chats = {token for token in special_tokens(tokenizer) if token in template}
    return tuple({str(tokenizer.bos_token)} - {"None"} | in_chats)


def encode_completions(tokenizer: PreTrainedTokenizerBase, completions: Sequence[str]) -> list[list[int]]:
    """Token ids of completion texts, nothing added."""
    return _encode(tokenizer, completions, special=False)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # the limits that count here are max_prompt_tokens and max_completion_tokens
    )["input_ids"]


class RowTokens:
    """Tokenises a batch's text-only rows, and rows whose ids belong to another tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, append_eos: bool) -> None:
        """
        Args:
            tokenizer: the run's.
            append_eos: end completions that are tokenised from text with EOS, unless their finish_reason is
                "length".

        Raises:
            ValueError: EOS is to be appended and the tokenizer has none.
        """
        eos = tokenizer.eos_token_id
        if append_eos and not isinstance(eos, int):
            raise ValueError(
                "the tokenizer has no EOS token, so none can end completions that are given as text: set its "
                "eos_token, or append_eos: false"
            )
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self._eos = eos if isinstance(eos, int) else None
        self.tokenizer_id = tokenizer_id(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._ends = {token for token in added if added[token].special} | set(tokenizer.all_special_ids)
        self._warned = False

    def encode(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Fills in prompt_ids, completion_ids and finish_reason where they are missing or foreign.

        Log-probs of a completion that is retokenised belong to its old tokens and are dropped. A row with a
        policy_mask is never retokenised, since the mask belongs to its old tokens too: only its trailing
        tokens that the policy did not choose are cut off.
        """
        columns = _trimmed(dict(zip(batch.schema.names, batch.columns, strict=True)))
        stuck = _without_text(batch, "prompt") | _without_text(batch, "completion") | _masked(batch)
        foreign = self._foreign(batch) & ~stuck
        encoded = np.zeros(batch.num_rows, dtype=bool)
        for side in ("prompt", "completion"):
            text, ids = columns[side], columns[f"{side}_ids"]
            chosen = _mask(text.is_valid()) & (~_mask(ids.is_valid()) | foreign)
            if side == "completion":
                chosen &= ~_masked(batch)
            if not chosen.any():
                continue
            texts = text.filter(pa.array(chosen)).to_pylist()
            if side == "prompt":
                tokens = encode_prompts(self.tokenizer, texts)
            else:
                finish = columns["finish_reason"].filter(pa.array(chosen)).to_pylist()
                tokens = self._ended(encode_completions(self.tokenizer, texts), finish)
                encoded = chosen
            columns[f"{side}_ids"] = _scatter(chosen, tokens, ids)
            if (chosen & foreign).any():
                self._warn(batch.column("tokenizer_id").filter(pa.array(chosen & foreign))[0].as_py())
        columns["finish_reason"] = self._finish_reasons(columns["finish_reason"], columns["completion_ids"])
        if encoded.any():
            for name in ("behavior_logprobs", "ref_logprobs", "policy_versions"):
                nothing = pa.nulls(batch.num_rows, columns[name].type)
                columns[name] = pc.call_function("if_else", [pa.array(encoded), nothing, columns[name]])
        return _batch(columns)

    def problems(self, found: pa.RecordBatch) -> Iterator[tuple[str, np.ndarray, Callable[[int], str]]]:
        """Rows, as found in the file, that would have to be tokenised (no ids, or foreign ones) and
        cannot be."""
        foreign, masked = self._foreign(found), _masked(found)
        no_ids = (
            "has a policy_mask and no completion_ids; a mask belongs to tokens, and a text may have others: "
            "give the ids that were sampled"
        )
        yield "mask_without_ids", masked & _mask(found.column("completion_ids").is_null()), lambda _: no_ids

        def describe_masked(row: int) -> str:
            other = found.column("tokenizer_id")[row].as_py()
            return (
                f"completion_ids with a policy_mask were made with tokenizer_id {other!r}, the run's is "
                f"{self.tokenizer_id!r}; a row with a mask is never tokenised again: import it with the run's"
            )

        yield "foreign_tokenizer", foreign & masked, describe_masked
        for side in ("prompt", "completion"):
            stuck = foreign & _without_text(found, side)

            def describe(row: int, side: str = side) -> str:
                other = found.column("tokenizer_id")[row].as_py()
                return (
                    f"{side}_ids were made with tokenizer_id {other!r}, the run's is {self.tokenizer_id!r}, "
                    f"and there is no {side} text to tokenise again"
                )

            yield "foreign_tokenizer", stuck, describe

    def complete(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Fills in texts from tokens and prompt_id from the prompt's tokens, in rows that passed the
        checks."""
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for side, skip in (("prompt", False), ("completion", True)):
            missing = _mask(columns[side].is_null())
            if missing.any():
                ids = columns[f"{side}_ids"].filter(pa.array(missing)).to_pylist()
                texts = self.tokenizer.batch_decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
                columns[side] = _scatter(missing, texts, columns[side])
        unnamed = _mask(columns["prompt_id"].is_null())
        if unnamed.any():
            ids = columns["prompt_ids"].filter(pa.array(unnamed)).to_pylist()
            columns["prompt_id"] = _scatter(unnamed, [prompt_id_of(row) for row in ids], columns["prompt_id"])
        return _batch(columns)

    def _foreign(self, batch: pa.RecordBatch) -> np.ndarray:
        found = batch.column("tokenizer_id").to_pylist()
        return np.array([name is not None and name != self.tokenizer_id for name in found], dtype=bool)

    def _ended(self, tokens: list[list[int]], finish: Sequence[str | None]) -> list[list[int]]:
        eos = self._eos
        if not self.append_eos or eos is None:
            return tokens
        return [
            row if not row or row[-1] in self._ends or reason == "length" else [*row, eos]
            for row, reason in zip(tokens, finish, strict=True)
        ]

    def _finish_reasons(self, found: pa.Array, ids: pa.ListArray) -> pa.Array:
        """Where none is recorded: stop when the last token is a special one, else length."""
        unknown = _mask(found.is_null())
        if not unknown.any():
            return found
        tokens = Ragged.of(ids.filter(pa.array(unknown)))
        ended = np.zeros(len(tokens.present), dtype=bool)
        filled = tokens.lengths > 0
        ended[filled] = np.isin(tokens.values[tokens.offsets[1:][filled] - 1], list(self._ends))
        return _scatter(unknown, np.where(ended, "stop", "length").tolist(), found)

    def _warn(self, other: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"rows made with tokenizer_id {other!r} are tokenised again from their text, since the run's "
                f"is {self.tokenizer_id!r}; their recorded log-probs are not used",
                stacklevel=2,
            )


def _batch(columns: dict[str, pa.Array]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([columns[name] for name in READ_SCHEMA.names], schema=READ_SCHEMA)


def _masked(batch: pa.RecordBatch) -> np.ndarray:
    return _mask(batch.column("policy_mask").is_valid())


def _trimmed(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """The columns, without the tokens behind the last one that the policy chose."""
    mask, ids = Ragged.of(columns["policy_mask"]), Ragged.of(columns["completion_ids"])
    fits = mask.present & ~mask.nulls & ~ids.nulls & (mask.lengths == ids.lengths) & (mask.sums > 0)
    cut = fits & ~_mask(columns["branch_lengths"].is_valid())  # of those, Completion trims each branch
    cut[cut] = ~mask.values[mask.offsets[1:][cut] - 1]
    if not cut.any():
        return columns
    ends = {row: int(np.flatnonzero(mask[row])[-1]) + 1 for row in np.flatnonzero(cut).tolist()}
    for name, found in (("policy_mask", mask), ("completion_ids", ids)):
        kept = [found[row][:end].tolist() for row, end in ends.items()]
        columns[name] = _scatter(cut, kept, columns[name])
    return columns


def _without_text(batch: pa.RecordBatch, side: str) -> np.ndarray:
    """Rows that have the ids of a side and not its text."""
    return _mask(batch.column(f"{side}_ids").is_valid()) & _mask(batch.column(side).is_null())


def _mask(flags: pa.Array) -> np.ndarray:
    return flags.to_numpy(zero_copy_only=False).astype(bool, copy=False)


def _scatter(chosen: np.ndarray, values: Sequence[object], others: pa.Array) -> pa.Array:
    """`others` with `values`, in order, at the chosen rows."""
    spread: list[object] = [None] * len(chosen)
    for row, value in zip(np.flatnonzero(chosen), values, strict=True):
        spread[row] = value
    return pc.call_function("if_else", [pa.array(chosen), pa.array(spread, others.type), others])
