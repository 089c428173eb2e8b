"""Batched decoding: each prompt computed once, ended rows make room for waiting ones, in a memory budget."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from agro_lightning.models.positions import LengthClasses
from agro_lightning.rollout.engines.base import Begun, Caches, Generation, InFlightEngine, Request, Sampling
from agro_lightning.rollout.engines.hf_generate import HFGenerate
from agro_lightning.rollout.engines.kv_cache import unsupported
from agro_lightning.rollout.engines.rows_in_flight import RowsInFlight
from agro_lightning.rollout.engines.transformers_engine import (
    TransformersEngine,
    check_prompts,
    positions_differ,
)

_STEP_BYTES = {"cpu": 16 << 20, "cuda": 32 << 30}
"""Bytes of memory that could be read in the time that a decoding step takes apart from computing."""


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
        rows = self._rows(lm, sampling, seed)
        lines = rows.reserve(np.arange(len(prompts) * n)).reshape(len(prompts), n)
        for bucket in self._length_buckets(lm, [len(prompt) for prompt in prompts], n):
            for index in bucket:
                rows.wait(prompts[index], lines[index])
            while not rows.idle:
                rows.step()
        return [[rows.record(line) for line in row] for row in lines.tolist()]

    def _rows(self, lm: Any, sampling: Sampling, seed: int, **options: Any) -> RowsInFlight:
        return RowsInFlight(
            lm=lm,
            sampling=sampling,
            seed=seed,
            eos=self._eos,
            memory=self.memory_budget(lm),
            kv_bytes=self.kv_bytes_per_token(lm),
            **options,
        )

    @property
    def can_suspend(self) -> bool:
        """Not where rows' positions depend on each other."""
        return self._policy is not None and LengthClasses.of(self._policy.base.config) is None

    def in_flight(self, sampling: Sampling, *, policy_version: int, caches: Caches) -> InFlightEngine:
        """Requests that come and go, under weights that change between tokens."""
        if self._policy is None:
            raise RuntimeError("BatchedDecoding has no policy; call attach(policy, tokenizer) first")
        if not self.can_suspend:
            return super().in_flight(sampling, policy_version=policy_version, caches=caches)
        with self._policy.generating():
            rows = self._rows(self._policy.base, sampling, 0, flowing=True, version=policy_version)
        return _DecodedInFlight(self._policy, rows, caches)

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


class _DecodedInFlight(InFlightEngine):
    """RowsInFlight, entered and left with every step, so that weights may change in between."""

    def __init__(self, policy: Any, rows: RowsInFlight, caches: Caches) -> None:
        self.policy, self.rows, self.caches = policy, rows, caches
        self._numbers: dict[int, int] = {}
        """Of each line, the request that has it."""
        self._prompts: dict[int, Sequence[int]] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        check_prompts(self.policy.base, [request.prompt_ids for request in requests], self.rows.sampling)
        for prompt, same in groupby(requests, key=lambda request: request.prompt_ids):
            some = list(same)
            lines = self.rows.reserve(np.array([request.seed for request in some]))
            for line, request in zip(lines.tolist(), some, strict=True):
                self._numbers[line], self._prompts[line] = request.number, prompt
            fresh = [not request.begun.completion_ids for request in some]
            if any(fresh):
                self.rows.wait(prompt, lines[fresh])
            for line, request in zip(lines.tolist(), some, strict=True):
                if request.begun.completion_ids:
                    self.rows.go_on(prompt, line, request.begun)

    def step(self) -> list[tuple[int, Generation]]:
        if self.rows.idle:
            return []
        with self.policy.generating():
            lines = self.rows.step().tolist()
        ended = []
        for line in lines:
            answer, number = self.rows.record(line), self._numbers.pop(line)
            runs = self.rows.release(line)
            del self._prompts[line]
            ended.append((number, replace(answer, policy_versions=runs if answer.completion_ids else None)))
        return ended

    def update_weights(self, policy_version: int) -> None:
        with self.policy.generating():
            self.rows.change_version(policy_version)
            if self.caches == "drop":
                self.rows.compute_caches_anew(self._prompts)

    def suspend(self) -> dict[int, Begun]:
        begun = {number: self.rows.begun(line) for line, number in self._numbers.items()}
        self.close()
        return begun

    def close(self) -> None:
        self._numbers, self._prompts = {}, {}
