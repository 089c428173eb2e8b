"""Plain `lm.generate`, for models that the faster engines do not serve."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from agro_lightning.rollout.engines.base import Generation, Sampling
from agro_lightning.rollout.engines.kv_cache import unsupported
from agro_lightning.rollout.engines.sampling import draw, uniforms
from agro_lightning.rollout.engines.transformers_engine import (
    TransformersEngine,
    check_prompts,
    generation,
    positions_differ,
)


class _Draw(LogitsProcessor):
    """Draws each row's token itself and leaves `generate` no choice; keeps its log-prob, not the logits."""

    def __init__(self, seed: int, lines: np.ndarray, sampling: Sampling) -> None:
        self.seed, self.lines, self.sampling = seed, lines, sampling
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        steps = np.full(len(self.lines), len(self.tokens))
        tokens, logprobs = draw(scores, uniforms(self.seed, self.lines, steps), self.sampling)
        self.tokens.append(tokens)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@contextmanager
def _no_defaults(lm: Any) -> Iterator[None]:
    """Hides the model's generation config, whose repetition penalty and so on `generate` would mix in."""
    kept, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = kept


class HFGenerate(TransformersEngine):
    """Generates with `lm.generate`: every model that has it, also recurrent and hybrid ones.

    Each completion computes its own copy of the prompt, and rows that ended are decoded until the last one
    ends. Prompts of unequal length are padded on the left, with masks from lengths; models with recurrent
    layers, whose state padding would enter, and rows whose positions depend on each other's lengths (longrope
    above its limit) get prompts of one length at a time. Draws the tokens that
    BatchedDecoding draws.

    Args:
        memory_bytes: bytes for keys, values and logits of the rows in flight. By default a quarter of the
            GPU's memory, or 2 GiB elsewhere.
    """

    @classmethod
    def instead_of(cls, engine: TransformersEngine) -> "HFGenerate":
        """One that serves the engine's policy."""
        made = cls(engine.memory_bytes)
        made._policy, made._eos = engine._policy, engine._eos
        return made

    def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, streamer: BaseStreamer
    ) -> Generation:
        """One completion of one prompt; the streamer gets its tokens as they are drawn, after the prompt's.

        Raises:
            ValueError: the prompt is empty, too long, or has ids outside the vocabulary.
        """
        with self._policy.generating():
            check_prompts(self._policy.base, [prompt_ids], sampling)
            lines = np.zeros(1, dtype=np.int64)
            return self._decode(self._policy.base, [prompt_ids], lines, sampling, seed, streamer)[0]

    def _generate(
        self, lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Generation]]:
        row_bytes = self.kv_bytes_per_token(lm) * (max(map(len, prompts)) + sampling.max_new_tokens)
        row_bytes += 20 * lm.get_input_embeddings().weight.shape[0]
        most = max(self.memory_budget(lm) // row_bytes, 1)
        lines = sorted(range(len(prompts) * n), key=lambda line: len(prompts[line // n]))
        records: dict[int, Generation] = {}
        lengths = [len(prompts[line // n]) for line in lines]
        padded = unsupported(lm) is None and not positions_differ(lm, prompts, sampling)
        for part in _batches(lengths, most, padded=padded):
            chosen = np.array(lines[part])
            rows = [prompts[line // n] for line in lines[part]]
            for line, record in zip(lines[part], self._decode(lm, rows, chosen, sampling, seed), strict=True):
                records[line] = record
        return [[records[index * n + j] for j in range(n)] for index in range(len(prompts))]

    def _decode(
        self,
        lm: Any,
        rows: Sequence[Sequence[int]],
        lines: np.ndarray,
        sampling: Sampling,
        seed: int,
        streamer: BaseStreamer | None = None,
    ) -> list[Generation]:
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.as_tensor(row)
            mask[index, width - len(row) :] = 1
        chooser = _Draw(seed, lines, sampling)
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self._eos) or None,
            pad_token_id=0,
        )
        with _no_defaults(lm):
            lm.generate(
                ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([chooser]),
                streamer=streamer,
            )
        tokens = torch.stack(chooser.tokens, 1).tolist()
        logprobs = torch.stack(chooser.logprobs, 1).tolist() if chooser.logprobs else None
        records = []
        for index, row in enumerate(tokens):
            end = next((place + 1 for place, token in enumerate(row) if token in self._eos), len(row))
            end = min(end, sampling.max_new_tokens)
            values = None if logprobs is None else logprobs[index][:end]
            records.append(generation(row[:end], values, self._eos))
        return records


def _batches(lengths: Sequence[int], most: int, padded: bool) -> Iterator[slice]:
    """Cuts rows, sorted by length, into batches of at most `most`, of one length each unless padded."""
    start = 0
    while start < len(lengths):
        end = min(start + most, len(lengths))
        if not padded:
            end = next((place for place in range(start, end) if lengths[place] != lengths[start]), end)
        yield slice(start, end)
        start = end
