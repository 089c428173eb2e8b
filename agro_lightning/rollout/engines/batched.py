"""Batched decoding: each prompt computed once, ended rows make room for waiting ones, in a memory budget."""

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from agro_lightning.rollout.engines.base import Generation, Sampling
from agro_lightning.rollout.engines.hf_generate import HFGenerate
from agro_lightning.rollout.engines.kv_cache import Prefilled, RowsCache, unsupported
from agro_lightning.rollout.engines.sampling import draw, uniforms
from agro_lightning.rollout.engines.transformers_engine import (
    TransformersEngine,
    generation,
    positions_differ,
)

_PREFILL_TOKENS = 8192
_PREFILL_LOGITS = 1 << 26
"""Most tokens, and most logits, of one prefill pass."""
_REFILL_BELOW = 0.75
"""Share of rows still running at which ended ones are dropped and waiting ones taken in."""
_STEP_BYTES = {"cpu": 16 << 20, "cuda": 32 << 30}
"""Bytes of memory that could be read in the time that a decoding step takes apart from computing."""
_PADDING_FREE = 256
_PADDING_SHARE = 0.125
"""Padding tokens that a prefill pass may have: up to the first, and above it a share of its real tokens."""


class BatchedDecoding(TransformersEngine):
    """Decodes all completions as rows of one batch with the policy's own modules.

    A prompt's keys and values are computed once and copied to its n rows. Rows that reach EOS leave the
    batch, and waiting prompts take their place as the memory budget allows. Rows are right-aligned and their
    unused columns masked, from lengths, never from ids. Serves models of attention layers (full or sliding).

    Args:
        memory_bytes: bytes for keys, values and logits of the rows in flight, planned for completions of
            max_new_tokens. Storage is made as rows grow, so short completions take less. By default a quarter
            of the GPU's memory, or 2 GiB elsewhere.
    """

    @staticmethod
    def unsupported(lm: Any) -> str | None:
        """Why this engine does not serve a model, or None where it does."""
        needed = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
        missing = needed - set(inspect.signature(lm.forward).parameters)
        if lm.config.is_encoder_decoder:
            return "it is an encoder-decoder"
        return f"its forward takes no {', '.join(sorted(missing))}" if missing else unsupported(lm)

    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the engine to a policy.

        Raises:
            ValueError: the model has other state than keys and values.
        """
        reason = self.unsupported(policy.base)
        if reason is not None:
            raise ValueError(
                f"BatchedDecoding does not serve {type(policy.base).__name__}: {reason}. "
                "Use the engine HFGenerate"
            )
        super().attach(policy, tokenizer)

    def _generate(
        self, lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Generation]]:
        if positions_differ(lm, prompts, sampling):
            return HFGenerate.instead_of(self)._generate(lm, prompts, sampling, n, seed)
        run = _Run(
            lm=lm,
            prompts=prompts,
            sampling=sampling,
            n=n,
            seed=seed,
            eos=self._eos,
            memory=self.memory_budget(lm),
            kv_bytes=self.kv_bytes_per_token(lm),
        )
        for bucket in self._length_buckets(lm, [len(prompt) for prompt in prompts], n):
            run.decode(bucket)
        return run.generations()

    def _length_buckets(self, lm: Any, lengths: Sequence[int], n: int) -> list[list[int]]:
        """Prompts in buckets of like length, so that short ones are not padded to the longest of all.

        Each step of a bucket reads the weights, and of each row as many columns as the bucket's longest has.
        A bucket is cut in two where that saves more reading of padding than it costs in reading weights.
        """
        weights = sum(parameter.nbytes for parameter in lm.parameters())
        cut_cost = weights + _STEP_BYTES["cuda" if lm.device.type == "cuda" else "cpu"]
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        column = n * self.kv_bytes_per_token(lm)
        buckets, pending = [], [order]
        while pending:
            bucket = pending.pop()
            saved = [
                (len(bucket) - cut) * (lengths[bucket[0]] - lengths[bucket[cut]]) * column
                for cut in range(1, len(bucket))
            ]
            if saved and max(saved) > cut_cost:
                cut = saved.index(max(saved)) + 1
                pending += [bucket[cut:], bucket[:cut]]
            else:
                buckets.append(bucket)
        return buckets


@dataclass(slots=True)
class _Waiting:
    """A prompt of which some completions have not begun."""

    prompt: int
    begun: int = 0


class _Run:
    """One call of generate: what waits, the rows in flight, and what came out so far."""

    def __init__(
        self,
        *,
        lm: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        seed: int,
        eos: Sequence[int],
        memory: int,
        kv_bytes: int,
    ) -> None:
        self.lm, self.prompts, self.sampling, self.n, self.seed = lm, prompts, sampling, n, seed
        self.eos, self.memory, self.kv_bytes = eos, memory, kv_bytes
        self.vocabulary = lm.get_input_embeddings().weight.shape[0]
        self.logits_bytes = 20 * self.vocabulary  # logits, their fp32 copy and log-probs, the fp64 sums
        self.waiting: deque[_Waiting] = deque()
        self.cache = RowsCache()
        self.eos_tensor = torch.tensor(eos, dtype=torch.long, device=lm.device)
        # one line a completion; row r of the batch writes into line rows[r]
        self.rows = np.zeros(0, dtype=np.int64)
        self.running = np.zeros(0, dtype=bool)
        self.tokens = np.zeros((len(prompts) * n, sampling.max_new_tokens), dtype=np.int32)
        self.logprobs = None if sampling.temperature == 0 else np.zeros(self.tokens.shape, dtype=np.float32)
        self.counts = np.zeros(len(prompts) * n, dtype=np.int64)

    def decode(self, prompts: Sequence[int]) -> None:
        """Makes the completions of some prompts, longest first."""
        self.waiting.extend(_Waiting(index) for index in prompts)
        self._keep(torch.zeros(0, dtype=torch.long))
        logits = self._admit(None)
        while True:
            assert logits is not None  # there are rows in flight
            tokens = self._sample(logits)
            alive = torch.from_numpy(self.running.nonzero()[0])
            if not len(alive) and not self.waiting:
                return
            emptier = len(alive) <= _REFILL_BELOW * len(self.rows)
            if emptier or self.cache.full:
                self._keep(alive)
                tokens = tokens[alive.to(tokens.device)]
            logits = self.cache.forward(self.lm, tokens) if len(alive) else None
            if emptier and self.waiting:
                logits = self._admit(logits)

    def _sample(self, logits: Tensor) -> Tensor:
        """Draws a token for each row and records it; an ended row draws on, unrecorded, until dropped."""
        steps = self.counts[self.rows]
        tokens, logprobs = draw(logits, uniforms(self.seed, self.rows, steps), self.sampling)
        on, lines = self.running, self.rows[self.running]
        self.tokens[lines, steps[on]] = tokens.cpu().numpy()[on]
        if self.logprobs is not None and logprobs is not None:
            self.logprobs[lines, steps[on]] = logprobs.cpu().numpy()[on]
        self.counts[lines] += 1
        ended = torch.isin(tokens, self.eos_tensor).cpu().numpy()
        self.running = on & ~ended & (self.counts[self.rows] < self.sampling.max_new_tokens)
        return tokens

    def _keep(self, alive: Tensor) -> None:
        """Drops the rows that have ended and makes room for the next tokens of the others."""
        self.rows, self.running = self.rows[alive.numpy()], self.running[alive.numpy()]
        if len(self.rows):
            self.cache.rebuild(alive, [], self.sampling.max_new_tokens - int(self.counts[self.rows].min()))
        else:
            self.cache = RowsCache()

    def _admit(self, logits: Tensor | None) -> Tensor:
        """Computes as many waiting prompts as fit and adds their rows; returns the logits of all rows."""
        prompts, counts, lines = [], [], [self.rows]
        longest = len(self.prompts[self.waiting[0].prompt])
        columns = max(self.cache.width, longest) + self.sampling.max_new_tokens
        most = self.memory // (columns * self.kv_bytes + self.logits_bytes)
        room = max(most - len(self.rows), 0 if len(self.rows) else 1)
        while self.waiting and room > 0:
            head = self.waiting[0]
            count = min(self.n - head.begun, room)
            prompts.append(self.prompts[head.prompt])
            counts.append(count)
            lines.append(np.arange(count) + head.prompt * self.n + head.begun)
            head.begun, room = head.begun + count, room - count
            if head.begun == self.n:
                self.waiting.popleft()
        if not prompts:
            assert logits is not None
            return logits
        prefilled, new_logits = self._prefill(prompts, counts)
        self.cache.rebuild(torch.arange(len(self.rows)), prefilled, self.sampling.max_new_tokens)
        self.rows = np.concatenate(lines)
        self.running = np.concatenate([self.running, np.ones(sum(counts), dtype=bool)])
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

    def generations(self) -> list[list[Generation]]:
        """The records, n for each prompt, in the order of the prompts."""

        def record(line: int, count: int) -> Generation:
            logprobs = None if self.logprobs is None else self.logprobs[line, :count].tolist()
            return generation(self.tokens[line, :count].tolist(), logprobs, self.eos)

        records = [record(line, count) for line, count in enumerate(self.counts.tolist())]
        return [records[start : start + self.n] for start in range(0, len(records), self.n)]
