"""What the servers of tokens are asked and how they answer: two routes, of vLLM and of SGLang."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agro_lightning.rollout.engines.base import Sampling

UNKNOWN_LOGPROB = -9999.0
"""What vLLM sends for a log-prob that is not finite, or that it does not have."""


class ServerGoneError(Exception):
    """The server is not there, or says that it cannot serve now."""


class NoRouteError(ServerGoneError):
    """The server is there and has not what was asked for."""


class ServerFailedError(Exception):
    """The server is there, and failed on this request."""


class RequestRefusedError(Exception):
    """The server does not take this request, and no other will."""


Versions = tuple[tuple[int, int], ...] | None
"""Runs of (policy version, tokens); None where the server does not tell."""
Row = tuple[list[int], list[float] | None, str, Versions]
"""Token ids, their log-probs, why the completion ended, and whose tokens they are."""


class TokenRoute:
    """`POST /inference/v1/generate`: vLLM with `--enable-scale-out`, and TokenServer.

    vLLM gives completion j of a request the seed + j. An older vLLM names tokens in its log-probs by text or
    "token_id:5", a newer one by number; their order is that of `token_ids` in both.
    """

    path = "/inference/v1/generate"

    def body(
        self, model: str, prompt: list[int], sampling: Sampling, n: int, seed: int, stop: Sequence[int]
    ) -> dict[str, Any]:
        """The request for n completions of one prompt."""
        return {
            "model": model,
            "token_ids": prompt,
            "sampling_params": {
                "n": n,
                "seed": seed,
                "max_tokens": sampling.max_new_tokens,
                **sampling.request_fields(stop),
                "logprobs": 0,
            },
        }

    def rows(self, answer: Any) -> Iterator[Row]:
        """The completions of an answer, in the order of their indices."""
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            content = (choice.get("logprobs") or {}).get("content")
            logprobs = None if content is None else [float(entry["logprob"]) for entry in content]
            spans = choice.get("weight_versions") or ()
            versions = tuple((_number(span["version"]), span["end"] - span["start"]) for span in spans)
            yield choice["token_ids"] or [], logprobs, choice["finish_reason"], _known(versions)

    def version(self, get: Callable[[str], Any]) -> int:
        """Optimiser steps behind the served weights: TokenServer names them among its models, and vLLM has
        the label of its last update where VLLM_SERVER_DEV_MODE is set; -1 where there is none."""
        card = get("/v1/models")["data"][0]
        if card.get("owned_by") == "vllm":
            return _number(_or_nothing(get, "/weight_info").get("weight_version"))
        return _number(card.get("policy_version"))


class SGLangRoute:
    """SGLang's own `POST /generate`: one request with n copies of the prompt, each with a seed."""

    path = "/generate"

    def body(
        self, model: str, prompt: list[int], sampling: Sampling, n: int, seed: int, stop: Sequence[int]
    ) -> dict[str, Any]:
        """The request for n completions of one prompt."""
        params = {
            "max_new_tokens": sampling.max_new_tokens,
            **sampling.request_fields(stop),
            "skip_special_tokens": False,
        }
        return {
            "input_ids": [prompt] * n,
            "sampling_params": [{**params, "sampling_seed": (seed + j) % 2**31} for j in range(n)],
            "return_logprob": True,
        }

    def rows(self, answer: Any) -> Iterator[Row]:
        """The completions of an answer, in the order of the request's copies."""
        for one in answer if isinstance(answer, list) else [answer]:
            about = one["meta_info"]
            drawn = about["output_token_logprobs"]
            ids, logprobs = [token for _, token, *_ in drawn], [float(logprob) for logprob, *_ in drawn]
            versions = _known(((_number(about.get("weight_version")), len(ids)),))
            yield ids, logprobs, about["finish_reason"]["type"], versions

    def version(self, get: Callable[[str], Any]) -> int:
        """Optimiser steps behind the served weights: the label of the last update, where it is a number."""
        info = _or_nothing(get, "/model_info") or _or_nothing(get, "/get_model_info")
        return _number(info.get("weight_version"))


def _or_nothing(get: Callable[[str], Any], path: str) -> dict[str, Any]:
    try:
        return get(path)
    except NoRouteError:
        return {}


def _number(label: Any) -> int:
    try:
        return int(label)
    except (TypeError, ValueError):
        return -1


def _known(versions: tuple[tuple[int, int], ...]) -> Versions:
    return versions if versions and all(version >= 0 for version, _ in versions) else None
