"""Episodes: the policy and an environment in turns, each episode at its own pace, token in, token out."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from agro_lightning.rollout.engines.base import Generation, Request, RolloutEngine, Sampling
from agro_lightning.rollout.environment import EnvironmentClass, drawn_seed, start_call
from agro_lightning.rollout.tool_calls import (
    CallError,
    Format,
    ToolCall,
    call_format,
    parse_calls,
    results_text,
)
from agro_lightning.types import FinishReason, Prompt

logger = logging.getLogger(__name__)
_SETTLE_SECONDS = 0.02
"""How long quick tools are waited for before decoding goes on, so that their turns stay in one batch."""


@dataclass(frozen=True, kw_only=True)  # without slots: the command line reads defaults from __dict__
class EpisodeLimits:
    """When an episode or a call ends, whatever the environment wants."""

    turns: int = 8
    """Most turns of the policy; sampling.max_new_tokens is the most tokens of one."""
    tokens: int = 4096
    """Most tokens of an episode after the prompt, the environment's included."""
    call_seconds: float = 30.0
    """Longest call of the environment; an episode with a longer one is dropped and counted."""
    episode_seconds: float = 600.0
    """Longest episode; it then ends as it stands."""
    result_chars: int = 4000
    """Longer answers of the environment are cut, and say so."""
    at_once: int = 256
    """Most episodes in progress."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"data.episode_limits.{name} is {value}; it must be positive")


@dataclass(eq=False, slots=True)
class _Episode:
    """One episode in progress."""

    number: int
    prompt: Prompt
    env_seed: int
    environment: Any = None
    began: float = 0.0
    turn: int = 0
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    finish: FinishReason = "stop"
    calls: list[ToolCall] = field(default_factory=list)
    results: list[tuple[str, str]] = field(default_factory=list)
    due: float = 0.0
    judged: bool = False
    """Whether it is over, and get_reward was called."""
    reward: float | str | None = None


class Episodes:
    """Plays episodes of an environment with any engine.

    Args:
        environment: the class.
        limits: of episodes and calls.
        tokenizer: the policy's.
        template_options: further variables of the chat template, as the prompts were written with.

    Raises:
        ValueError: an environment with tools and a tokenizer that cannot write them.
    """

    def __init__(
        self,
        environment: EnvironmentClass,
        limits: EpisodeLimits,
        tokenizer: PreTrainedTokenizerBase,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.environment, self.limits, self.tokenizer = environment, limits, tokenizer
        self.options = {k: v for k, v in (template_options or {}).items() if k != "tools"}
        self.counts: Counter[str] = Counter()
        self._warned: set[str] = set()
        self.form: Format | None = None if environment.speaks else call_format(tokenizer)
        self.schemas = environment.schemas() if self.form else []
        if self.form:
            self._delta([(environment.tools[0], "x")])

    def take_counts(self) -> dict[str, float]:
        """What happened since the last call, by metric name."""
        taken, self.counts = self.counts, Counter()
        return {f"rollout/{name}": float(count) for name, count in taken.items()}

    def play(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        n: int,
        seed: int,
        max_positions: int,
    ) -> list[list[Generation]]:
        """n episodes of each prompt, in order.

        The policy's draws follow from (seed, episode, turn); an environment's from (seed, prompt, its place
        in the call), so that the episodes of a group share them; docs/agents.md says why.

        Args:
            engine: attached and up to date.
            prompts: whose rows `reset` is given.
            sampling: of each turn.
            n: episodes of each prompt.
            seed: equal seeds, weights and prompts give equal episodes, as far as the environment keeps to it.
            max_positions: of the model; a fuller context ends an episode.
        """
        waiting = [
            _Episode(number=i * n + j, prompt=prompt, env_seed=drawn_seed(seed, prompt.prompt_id, i))
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ][::-1]
        ended: dict[int, Generation] = {}
        calls: dict[Future[Any], _Episode] = {}
        asked: dict[int, _Episode] = {}
        flow = engine.in_flight(sampling, policy_version=0, caches="keep")
        room = sampling.max_new_tokens
        try:
            while len(ended) < n * len(prompts):
                while waiting and len(calls) + len(asked) < self.limits.at_once:
                    episode = waiting.pop()
                    episode.began = time.monotonic()
                    self.counts["episodes"] += 1
                    self._call(calls, episode, lambda e=episode: self._reset(e))
                self._settle(calls, bool(asked))
                requests = []
                for future, episode in list(calls.items()):
                    late = not future.done()
                    if late and time.monotonic() < episode.due:
                        continue
                    del calls[future]
                    if late:
                        self._say("call_timeouts", f"a call took longer than {self.limits.call_seconds:g} s")
                    if episode.judged:
                        self._take_reward(episode, future)
                        ended[episode.number] = self._generation(episode)
                        continue
                    state = "failed" if late else self._go_on(episode, future, calls, max_positions - room)
                    if state == "end" and self.environment.rewards:
                        episode.judged = True
                        self._call(calls, episode, episode.environment.get_reward)
                    elif state == "turn":
                        asked[episode.number] = episode
                        context = (*episode.prompt.prompt_ids, *episode.ids)
                        turn_seed = drawn_seed(seed, episode.number, episode.turn, "turn")
                        requests.append(Request(number=episode.number, prompt_ids=context, seed=turn_seed))
                    elif state != "call":
                        ended[episode.number] = self._generation(episode) if state == "end" else _failed()
                if requests:
                    flow.submit(sorted(requests, key=lambda request: request.number))
                for number, answer in flow.step() if asked else ():
                    episode = asked.pop(number)
                    if answer.finish_reason == "error" or not answer.completion_ids:
                        ended[number] = _failed()
                        continue
                    self._take_turn(episode, answer)
                    self._call(calls, episode, lambda e=episode: self._answer(e))
        finally:
            flow.close()
        return [[ended[i * n + j] for j in range(n)] for i in range(len(prompts))]

    # ------------------------------------------------------------------ in threads: the environment's code

    def _reset(self, episode: _Episode) -> str | None:
        prompt = episode.prompt
        row = {
            **prompt.fields,
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.prompt,
            "answer": prompt.answer,
        }
        if self.environment.takes_seed:
            row["seed"] = episode.env_seed
        episode.environment = self.environment.new()
        return episode.environment.reset(**row)

    def _answer(self, episode: _Episode) -> str | None:
        """What the environment says to a turn: the text of `respond`, or of one tool; None: it is over."""
        environment, text = episode.environment, self._last_turn(episode, special=bool(self.form))
        if self.form is None:
            return environment.respond(text)
        if not episode.calls:
            return None
        call = episode.calls[len(episode.results)]
        if call.name not in self.environment.tools:
            raise LookupError(
                f"there is no tool {call.name!r}; there are {', '.join(self.environment.tools)}"
            )
        return str(getattr(environment, call.name)(**call.arguments))

    # ------------------------------------------------------------------ in this thread: the episode

    def _call(self, calls: dict[Future[Any], _Episode], episode: _Episode, function: Any) -> None:
        if self.form and episode.turn and not (episode.calls or episode.results or episode.judged):
            problem = self._parse(episode)
            if problem is not None:
                function = lambda: problem  # noqa: E731
        episode.due = time.monotonic() + self.limits.call_seconds
        calls[start_call(function)] = episode

    def _parse(self, episode: _Episode) -> str | None:
        assert self.form is not None
        try:
            episode.calls = parse_calls(self._last_turn(episode, special=True), self.form)
        except CallError as error:
            self._say("unread_calls", str(error))
            episode.calls = [ToolCall(self.environment.tools[0], {})]
            return f"error: {error}"
        self.counts["tool_calls"] += len(episode.calls)
        return None

    def _settle(self, calls: dict[Future[Any], _Episode], decoding: bool) -> None:
        """Waits for quick calls, or for any where nothing is being decoded."""
        if not calls:
            return
        until = time.monotonic() + _SETTLE_SECONDS
        pending = {future for future in calls if not future.done()}
        while pending and time.monotonic() < until:
            _, pending = wait(pending, timeout=until - time.monotonic(), return_when=FIRST_COMPLETED)
        if pending and len(pending) == len(calls) and not decoding:
            soonest = min(episode.due for episode in calls.values())
            wait(pending, timeout=max(0.0, soonest - time.monotonic()), return_when=FIRST_COMPLETED)

    def _go_on(
        self, episode: _Episode, future: Future[Any], calls: dict[Future[Any], _Episode], room: int
    ) -> str:
        """What comes after a call: "turn", another "call", the "end", or "failed"."""
        error = future.exception()
        said = None if error is not None else future.result()
        if error is not None and (not episode.turn or self.form is None):
            self._say("environment_errors", f"{type(error).__name__}: {error}")
            return "failed"
        if not episode.turn:
            if said and self.form:
                raise ValueError(
                    "reset returned a text, and the prompt is a chat that has been written: put the text "
                    "into the prompts' template, or give it by a tool"
                )
            self._append(episode, said)
        elif self.form is None:
            if said is None:
                return "end"
            self._append(episode, self._cut(said))
        else:
            if not episode.calls:
                return "end"
            if error is not None:
                self._say("tool_errors", f"{type(error).__name__}: {error}")
                said = f"error: {type(error).__name__}: {error}"
            name = episode.calls[len(episode.results)].name
            episode.results.append((name, self._cut(str(said))))
            if len(episode.results) < len(episode.calls):
                self._call(calls, episode, lambda: self._answer(episode))
                return "call"
            self._append(episode, self._delta(episode.results))
            episode.calls, episode.results = [], []
        return self._limit(episode, room) or "turn"

    def _limit(self, episode: _Episode, room: int) -> str | None:
        """Ends an episode that has reached a limit, under the limit's name."""
        context = len(episode.prompt.prompt_ids) + len(episode.ids)
        limits = self.limits
        reached = {
            "context_full": context > room,
            "token_limits": len(episode.ids) >= limits.tokens,
            "turn_limits": episode.turn >= limits.turns,
            "time_limits": time.monotonic() - episode.began > limits.episode_seconds,
        }
        for name, over in reached.items():
            if over:
                self.counts[name] += 1
                episode.finish = "length"
                return "end" if episode.turn else "failed"
        return None

    def _take_turn(self, episode: _Episode, answer: Generation) -> None:
        self.counts["turns"] += 1
        episode.turn += 1
        episode.ids += answer.completion_ids
        episode.mask += [True] * len(answer.completion_ids)
        episode.finish = answer.finish_reason
        if answer.behavior_logprobs is None or episode.logprobs is None:
            episode.logprobs = None
        else:
            episode.logprobs += answer.behavior_logprobs
        self.counts["cut_turns"] += bool(self.form) and answer.finish_reason == "length"

    def _last_turn(self, episode: _Episode, *, special: bool) -> str:
        start = len(episode.mask) - episode.mask[::-1].index(False) if False in episode.mask else 0
        return str(self.tokenizer.decode(episode.ids[start:], skip_special_tokens=not special))

    def _append(self, episode: _Episode, text: str | None) -> None:
        """Extends the context by what the policy did not choose."""
        if text:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            episode.ids += ids
            episode.mask += [False] * len(ids)

    def _delta(self, results: Sequence[tuple[str, str]]) -> str:
        assert self.form is not None
        return results_text(self.tokenizer, results, self.schemas, self.form, self.options)

    def _cut(self, text: str) -> str:
        if len(text) <= self.limits.result_chars:
            return text
        self.counts["cut_results"] += 1
        return f"{text[: self.limits.result_chars]}\n[cut: {len(text)} characters]"

    def _take_reward(self, episode: _Episode, future: Future[Any]) -> None:
        error = future.exception() if future.done() else TimeoutError("it took too long")
        try:
            episode.reward = float(future.result()) if error is None else None
        except (TypeError, ValueError) as unfit:
            error = unfit
        if error is not None:  # a failure of the reward, counted there
            episode.reward = f"get_reward: {type(error).__name__}: {error}"

    def _generation(self, episode: _Episode) -> Generation:
        return Generation(
            completion_ids=tuple(episode.ids),
            finish_reason=episode.finish,
            behavior_logprobs=None if episode.logprobs is None else tuple(episode.logprobs),
            policy_mask=None if all(episode.mask) else tuple(episode.mask),
            environment_reward=episode.reward,
        )

    def _say(self, kind: str, message: str) -> None:
        """Counts what went wrong; the first of a kind is in the log."""
        self.counts[kind] += 1
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(
                "environment %s: %s (further ones are counted in rollout/%s)",
                self.environment.type.__name__,
                message,
                kind,
            )


def _failed() -> Generation:
    return Generation(completion_ids=(), finish_reason="error", behavior_logprobs=None)
