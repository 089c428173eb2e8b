"""One request of vLLM's token route `POST /inference/v1/generate`, read and answered."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agro_lightning.rollout.engines.base import Generation, Sampling

_TAKEN = ("max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop_token_ids")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "stop": ([], ""),
    "bad_words": ([],),
    "logit_bias": ({},),
}
"""Parameters that engines do not have, and the values at which they change nothing."""
_OF_NO_EFFECT = {"logprobs", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"} | {
    "include_stop_str_in_output",
    "routed_experts_prompt_start",
}
"""Parameters that say how text or extras are given, of which an answer has none."""
_MOST_COMPLETIONS = 1024


class RefusedRequest(Exception):
    """A request that is answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """What one request asks for."""

    request_id: str
    token_ids: tuple[int, ...]
    """The prompt."""
    sampling: Sampling
    n: int
    """Completions of the prompt."""
    seed: int
    stop_token_ids: frozenset[int]
    """Tokens that end a completion, besides those at which the engine ends one by itself."""

    @classmethod
    def read(cls, body: Any, *, model: str, max_model_len: int | None) -> "TokenRequest":
        """Reads a body, parsed from JSON.

        Raises:
            RefusedRequest: a field that is missing, of another type, or asks for what engines do not have.
        """
        body = _object(body, "the body")
        for name in ("stream", "features", "content_parts"):
            if body.get(name):
                raise RefusedRequest(400, f"{name} is not served here; leave it out")
        if (named := body.get("model")) not in (None, model):
            raise RefusedRequest(
                404, f"there is no model {named!r} here; the one that is served is {model!r}"
            )
        params = _object(body.get("sampling_params"), "sampling_params")
        for name, value in params.items():
            if value is None or name in _TAKEN or name in _OF_NO_EFFECT:
                continue
            if name not in _NEUTRAL or value not in _NEUTRAL[name]:
                raise RefusedRequest(
                    400, f"sampling_params.{name} = {value!r} cannot be heeded; taken are {', '.join(_TAKEN)}"
                )
        prompt = _ids(body.get("token_ids"), "token_ids")
        if not prompt:
            raise RefusedRequest(400, "token_ids is empty; a prompt needs a token, such as BOS")
        most = _number(params, "max_tokens", int)
        if max_model_len is not None:
            if len(prompt) >= max_model_len:
                raise RefusedRequest(
                    400,
                    f"the prompt has {len(prompt)} tokens; the model's maximum context length is "
                    f"{max_model_len} tokens, and the completion needs one",
                )
            most = min(most, max_model_len - len(prompt))
        n = _number(params, "n", int, 1)
        if not 1 <= n <= _MOST_COMPLETIONS:
            raise RefusedRequest(400, f"sampling_params.n is {n}; it must be 1 to {_MOST_COMPLETIONS}")
        try:
            sampling = Sampling(
                max_new_tokens=most,
                temperature=_number(params, "temperature", float, 1.0),
                top_p=_number(params, "top_p", float, 1.0),
                top_k=max(_number(params, "top_k", int, 0), 0),  # vLLM's "all" is 0 or -1
            )
        except ValueError as error:
            raise RefusedRequest(400, str(error)) from error
        return cls(
            request_id=str(body.get("request_id") or secrets.token_hex(8)),
            token_ids=prompt,
            sampling=sampling,
            n=n,
            seed=secrets.randbits(31) if params.get("seed") is None else _number(params, "seed", int),
            stop_token_ids=frozenset(_ids(params.get("stop_token_ids") or [], "stop_token_ids")),
        )

    def answer(self, row: Sequence[Generation], *, model: str, policy_version: int) -> dict[str, Any]:
        """The answer: a choice for each completion; one that failed has no tokens and the reason "error".

        Raises:
            RefusedRequest: all completions failed.
        """
        if all(one.finish_reason == "error" for one in row):
            raise RefusedRequest(500, "the engine could not generate a completion of this prompt")
        choices = [self._choice(index, one, policy_version) for index, one in enumerate(row)]
        return {"request_id": self.request_id, "model": model, "choices": choices}

    def _choice(self, index: int, one: Generation, policy_version: int) -> dict[str, Any]:
        ids, reason = one.completion_ids, one.finish_reason
        ends = [place for place, token in enumerate(ids) if token in self.stop_token_ids]
        if ends:
            ids, reason = ids[: ends[0] + 1], "stop"
        logprobs = one.behavior_logprobs
        if logprobs is None and self.sampling.temperature == 0:
            logprobs = (0.0,) * len(ids)  # greedy decoding draws what it draws for certain
        content = logprobs and [
            {"token": f"token_id:{token}", "token_id": token, "logprob": value}
            for token, value in zip(ids, logprobs, strict=False)
        ]
        return {
            "index": index,
            "token_ids": list(ids),
            "finish_reason": reason,
            "logprobs": None if logprobs is None else {"content": content or []},
            "weight_versions": list(_spans(one.policy_versions or ((policy_version, len(ids)),), len(ids))),
        }


def _spans(runs: Sequence[tuple[int, int]], tokens: int) -> Iterator[dict[str, Any]]:
    """Runs of (version, tokens) as vLLM writes them."""
    start = 0
    for version, length in runs:
        if start < tokens:
            yield {"version": str(version), "start": start, "end": min(start + length, tokens)}
        start += length


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RefusedRequest(400, f"{name} must be a JSON object, not {_shown(value)}")
    return value


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise RefusedRequest(400, f"{name} must be a list of token ids, not {_shown(value)}")
    return tuple(value)


def _number(params: Mapping[str, Any], name: str, kind: type, default: Any = ...) -> Any:
    value = params.get(name)
    if value is None and default is not ...:
        return default
    if type(value) is not int and (kind is int or type(value) is not float):
        wanted = "an integer" if kind is int else "a number"
        raise RefusedRequest(400, f"sampling_params.{name} must be {wanted}, not {_shown(value)}")
    try:
        return kind(value)
    except OverflowError as error:
        raise RefusedRequest(400, f"sampling_params.{name} is too large") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
