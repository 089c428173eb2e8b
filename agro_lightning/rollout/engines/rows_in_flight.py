"""Rows in flight: completions decoded side by side, which come and go, under weights that may change."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from agro_lightning.rollout.engines.base import Begun, Generation, Sampling
from agro_lightning.rollout.engines.kv_cache import Prefilled, RowsCache
from agro_lightning.rollout.engines.sampling import draw, uniforms
from agro_lightning.rollout.engines.transformers_engine import generation

_PREFILL_TOKENS = 8192
_PREFILL_LOGITS = 1 << 26
"""Most tokens, and most logits, of one prefill pass."""
_REFILL_BELOW = 0.75
"""Share of rows still running at which ended ones are dropped and waiting ones taken in."""
_PADDING_FREE = 256
_PADDING_SHARE = 0.125
"""Padding tokens that a prefill pass may have: up to the first, and above it a share of its real tokens."""


@dataclass(slots=True)
class _Waiting:
    """A prompt of which some completions have not begun."""

    prompt: Sequence[int]
    lines: Int[np.ndarray, " completions"]
    """Those that have not begun."""


class RowsInFlight:
    """The rows of a batch, what waits to join them, and what came out of them so far.

    Each completion has a line, from `reserve` to `release`; row r of the batch writes into line rows[r]. A
    step begins with the last tokens, so that no logits are kept from one step to the next: every token of a
    step is drawn from the weights that the model has in it.

    Args:
        lm: the language model, in eval mode and without gradients during every call.
        sampling: how tokens are drawn.
        seed: with a completion's stream, what its draws follow from.
        eos: token ids that end a completion.
        memory: bytes for keys, values and logits of the rows.
        kv_bytes: bytes that the keys and values of one token take.
        flowing: completions come in all the time, and those that wait are let in when they are many enough,
            not only when rows have ended.
        version: the policy version of the weights.
    """

    def __init__(
        self,
        *,
        lm: Any,
        sampling: Sampling,
        seed: int,
        eos: Sequence[int],
        memory: int,
        kv_bytes: int,
        flowing: bool = False,
        version: int = -1,
    ) -> None:
        self.lm, self.sampling, self.seed = lm, sampling, seed
        self.eos, self.memory, self.kv_bytes, self.flowing = eos, memory, kv_bytes, flowing
        self.vocabulary = lm.get_input_embeddings().weight.shape[0]
        self.logits_bytes = 20 * self.vocabulary  # logits, their fp32 copy and log-probs, the fp64 sums
        self.waiting: deque[_Waiting] = deque()
        self.cache = RowsCache()
        self.eos_tensor = torch.tensor(eos, dtype=torch.long, device=lm.device)
        self.rows = np.zeros(0, dtype=np.int64)
        self.running = np.zeros(0, dtype=bool)
        self.last = torch.zeros(0, dtype=torch.long, device=lm.device)
        self.capacity: int | None = None
        """Rows that memory had room for when some were last left waiting; None: all found room."""
        self.tokens = np.zeros((0, sampling.max_new_tokens), dtype=np.int32)
        self.logprobs = np.zeros(self.tokens.shape, dtype=np.float32)
        self.counts = np.zeros(0, dtype=np.int64)
        self.streams = np.zeros(0, dtype=np.int64)
        self.free: list[int] = []
        self.version = version
        self.changes: dict[int, list[tuple[int, int]]] = {}
        """Of a line whose weights have changed: the versions it had, and its tokens at the end of each."""

    # ------------------------------------------------------------------ lines

    def reserve(self, streams: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Lines for completions, one for each random stream; rising numbers where none was released."""
        missing = len(streams) - len(self.free)
        if missing > 0:
            count = len(self.counts)
            grown = missing if not count else max(missing, count)
            self.tokens = np.pad(self.tokens, ((0, grown), (0, 0)))
            self.logprobs = np.pad(self.logprobs, ((0, grown), (0, 0)))
            self.counts, self.streams = np.pad(self.counts, (0, grown)), np.pad(self.streams, (0, grown))
            self.free += range(count, count + grown)
        lines, self.free = np.array(self.free[: len(streams)], dtype=np.int64), self.free[len(streams) :]
        self.counts[lines], self.streams[lines] = 0, streams
        return lines

    def wait(self, prompt: Sequence[int], lines: Int[np.ndarray, " n"]) -> None:
        """Lines of one prompt are to be decoded."""
        self.waiting.append(_Waiting(prompt, lines))

    def go_on(self, prompt: Sequence[int], line: int, begun: Begun) -> None:
        """A line of a prompt is to be decoded behind what there is of it."""
        count = len(begun.completion_ids)
        self.tokens[line, :count] = begun.completion_ids
        self.logprobs[line, :count] = begun.behavior_logprobs
        self.counts[line] = count
        ends = np.cumsum([tokens for _, tokens in begun.policy_versions]).tolist()
        self.changes[line] = [
            (version, end)
            for (version, _), end in zip(begun.policy_versions, ends, strict=True)
            if version != self.version
        ]
        self.wait([*prompt, *begun.completion_ids], np.array([line]))

    def begun(self, line: int) -> Begun:
        """What a line holds that has not ended."""
        count = int(self.counts[line])
        return Begun(
            completion_ids=tuple(self.tokens[line, :count].tolist()),
            behavior_logprobs=tuple(self.logprobs[line, :count].tolist()),
            policy_versions=self._runs(line),
        )

    def record(self, line: int) -> Generation:
        """What a line holds, once it has ended."""
        count = int(self.counts[line])
        logprobs = None if self.sampling.temperature == 0 else self.logprobs[line, :count].tolist()
        return generation(self.tokens[line, :count].tolist(), logprobs, self.eos)

    def release(self, line: int) -> tuple[tuple[int, int], ...]:
        """Gives an ended line back; returns the runs of (version, tokens) that made it."""
        runs = self._runs(line)
        self.changes.pop(line, None)
        self.free.append(line)
        return runs

    def _runs(self, line: int) -> tuple[tuple[int, int], ...]:
        ends = [*self.changes.get(line, []), (self.version, int(self.counts[line]))]
        starts = [0, *(end for _, end in ends)]
        return tuple(
            (version, end - start) for start, (version, end) in zip(starts, ends, strict=False) if end > start
        )

    # ------------------------------------------------------------------ decoding

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running.any()

    def step(self) -> Int[np.ndarray, " ended"]:
        """Lets in rows that wait and draws the next token of every row; returns the lines that ended."""
        alive = torch.from_numpy(self.running.nonzero()[0])
        emptier = len(alive) <= _REFILL_BELOW * self._wanted(len(alive))
        tokens = self.last
        if emptier or self.cache.full:
            self._keep(alive)
            tokens = tokens[alive.to(tokens.device)]
        logits = self.cache.forward(self.lm, tokens) if len(alive) else None
        if emptier and self.waiting:
            logits = self._admit(logits)
        assert logits is not None  # there are rows in flight
        return self._sample(logits)

    def _wanted(self, alive: int) -> int:
        """Rows that there could be."""
        if not self.flowing:
            return len(self.rows)
        most = alive + sum(len(item.lines) for item in self.waiting)
        return max(len(self.rows), most if self.capacity is None else min(most, self.capacity))

    def change_version(self, version: int) -> None:
        """Notes that the model's weights are another version's from now on."""
        for line in self.rows[self.running].tolist():
            self.changes.setdefault(line, []).append((self.version, int(self.counts[line])))
        self.version = version

    def compute_caches_anew(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Computes the keys and values of the rows in flight with the model's present weights.

        Args:
            prompts: of each line.
        """
        alive = self.running.nonzero()[0]
        if not len(alive):
            return
        # the last token has not been fed yet
        seen = [
            [*prompts[line], *self.tokens[line, : self.counts[line] - 1].tolist()]
            for line in self.rows[alive].tolist()
        ]
        order = sorted(range(len(seen)), key=lambda row: -len(seen[row]))
        prefilled, _ = self._prefill([seen[row] for row in order], [1] * len(order))
        kept = alive[order]
        self.rows, self.running = self.rows[kept], self.running[kept]
        self.last = self.last[torch.from_numpy(kept).to(self.last.device)]
        self.cache = RowsCache()
        remaining = self.sampling.max_new_tokens - int(self.counts[self.rows].min())
        self.cache.rebuild(torch.zeros(0, dtype=torch.long), prefilled, remaining)

    def _sample(self, logits: Tensor) -> Int[np.ndarray, " ended"]:
        """Draws a token for each row and records it; an ended row draws on, unrecorded, until dropped."""
        steps = self.counts[self.rows]
        numbers = uniforms(self.seed, self.streams[self.rows], steps)
        tokens, logprobs = draw(logits, numbers, self.sampling)
        on, lines = self.running, self.rows[self.running]
        self.tokens[lines, steps[on]] = tokens.cpu().numpy()[on]
        if logprobs is not None:
            self.logprobs[lines, steps[on]] = logprobs.cpu().numpy()[on]
        self.counts[lines] += 1
        ended = torch.isin(tokens, self.eos_tensor).cpu().numpy()
        self.running = on & ~ended & (steps + 1 < self.sampling.max_new_tokens)
        self.last = tokens
        return self.rows[on & ~self.running]

    def _keep(self, alive: Tensor) -> None:
        """Drops the rows that have ended and makes room for the next tokens of the others."""
        self.rows, self.running = self.rows[alive.numpy()], self.running[alive.numpy()]
        if len(self.rows):
            self.cache.rebuild(alive, [], self.sampling.max_new_tokens - int(self.counts[self.rows].min()))
        else:
            self.cache = RowsCache()

    def _admit(self, logits: Tensor | None) -> Tensor:
        """Computes as many waiting prompts as fit and adds their rows; returns the logits of all rows."""
        admitted: list[_Waiting] = []
        longest = max(len(item.prompt) for item in self.waiting)
        columns = max(self.cache.width, longest) + self.sampling.max_new_tokens
        most = self.memory // (columns * self.kv_bytes + self.logits_bytes)
        room = max(most - len(self.rows), 0 if len(self.rows) else 1)
        while self.waiting and room > 0:
            head = self.waiting[0]
            admitted.append(_Waiting(head.prompt, head.lines[:room]))
            head.lines = head.lines[room:]
            room -= len(admitted[-1].lines)
            if not len(head.lines):
                self.waiting.popleft()
        self.capacity = len(self.rows) + sum(len(item.lines) for item in admitted) if self.waiting else None
        if not admitted:
            assert logits is not None
            return logits
        admitted.sort(key=lambda item: -len(item.prompt))
        sizes = [len(item.lines) for item in admitted]
        prefilled, new_logits = self._prefill([item.prompt for item in admitted], sizes)
        self.cache.rebuild(torch.arange(len(self.rows)), prefilled, self.sampling.max_new_tokens)
        self.rows = np.concatenate([self.rows, *(item.lines for item in admitted)])
        self.running = np.concatenate([self.running, np.ones(sum(sizes), dtype=bool)])
        return new_logits if logits is None else torch.cat([logits, new_logits])

    def _prefill(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> tuple[list[Prefilled], Tensor]:
        """Keys, values and next-token logits of prompts. Padding is on the right, where no token sees it."""
        prefilled, logits, device = [], [], self.lm.device
        for part in self._passes([len(prompt) for prompt in prompts]):
            chunk = prompts[part]
            ids = torch.zeros((len(chunk), len(chunk[0])), dtype=torch.long)
            for row, prompt in enumerate(chunk):
                ids[row, : len(prompt)] = torch.as_tensor(prompt)
            last, place = torch.tensor([len(prompt) - 1 for prompt in chunk]).unique(return_inverse=True)
            cache = DynamicCache()
            out = self.lm(
                input_ids=ids.to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last.to(device),
            )
            copies = torch.tensor(counts[part])
            logits.append(
                out.logits[torch.arange(len(chunk)), place.to(device)].repeat_interleave(
                    copies.to(device), 0, output_size=int(copies.sum())
                )
            )
            pairs = [(keys, values) for keys, values, *_ in cache if keys is not None and values is not None]
            for row, (prompt, count) in enumerate(zip(chunk, counts[part], strict=True)):
                end = len(prompt)
                layers = [(keys[row, :, :end], values[row, :, :end]) for keys, values in pairs]
                prefilled.append(Prefilled(layers=layers, rows=count))
        return prefilled, torch.cat(logits)

    def _passes(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Cuts prompts, longest first, into passes that fit the limits and hold little padding."""
        start = 0
        while start < len(lengths):
            end, longest = start + 1, lengths[start]
            while end < len(lengths):
                size, real = end + 1 - start, sum(lengths[start : end + 1])
                different = len(set(lengths[start : end + 1]))
                if (
                    size * longest > _PREFILL_TOKENS
                    or size * different * self.vocabulary > _PREFILL_LOGITS
                    or size * longest - real > max(_PADDING_FREE, _PADDING_SHARE * real)
                ):
                    break
                end += 1
            yield slice(start, end)
            start = end
