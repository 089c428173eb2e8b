"""Episodes in environments of verifiers (extra `agents`): turns, tools and games, token in, token out."""

import asyncio
import importlib
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from agro_lightning.data.chat import RowError
from agro_lightning.data.logs.verifiers_traces import answer_of_trace
from agro_lightning.primitives.atomic_files import replace_text
from agro_lightning.rollout.engines.auto import AutoEngine
from agro_lightning.rollout.engines.base import EpisodeEngine, Generation, RolloutEngine, Sampling
from agro_lightning.rollout.token_server import TokenServer
from agro_lightning.types import (
    Completion,
    Prompt,
    PromptGroup,
    joined_sequences,
    shared_prompt,
    trimmed,
)

HARNESS = "agro_lightning_in_process"
"""The id under which verifiers finds the harness of in_process_harness.py."""
RENDERER = "agro_lightning.rollout.extending_renderer.ExtendingRenderer"
"""What renders chats where the user names nothing else."""
_MODEL = "policy"
_Result = TypeVar("_Result")


class EnvironmentEngine(EpisodeEngine):
    """Plays episodes of verifiers' environments; their rewards are the completions' rewards.

    verifiers' agent speaks to its interception on loopback, whose client renders the conversation to token
    ids and asks a TokenServer over `engine`; token ids are extended from turn to turn, never made anew from
    text. What comes back is one completion an episode: the policy's own tokens are chosen (`policy_mask`),
    those of the environment and the chat template are context. The prompt is what a task's episodes have in
    common before the first chosen token. An episode with branches is one completion of several sequences.

    The prompts of the run name tasks: `write_tasks` makes their file. `data.rewards` is not asked. The
    validation's prompts are answered by `engine`, in one turn.

    Args:
        env: verifiers' own environment settings, such as {"taskset": {"id": "textarena", "game":
            "Hangman-v0"}}; a taskset of one's own is the name of a module that exports it. Roles that name no
            harness, runtime or client get the one of this process, and the policy.
        engine: generates the policy's turns; AutoEngine by default.
        max_concurrent: episodes at a time.
        max_turns: of an episode; None: as many as the environment wants.
        timeout_s: longest episode; one that takes longer is dropped and counted.
        renderer: verifiers' settings of the renderer, such as {"name": "qwen3"}; the default one extends
            tokens by the policy's own chat template, and reads tool calls where it is given a parser, such as
            {"tool_parser": "qwen3"}.

    Raises:
        ImportError: verifiers is not installed.
        ValueError: a count or time that is not positive, or settings that verifiers does not take.
    """

    def __init__(
        self,
        env: dict[str, Any],
        engine: RolloutEngine | None = None,
        max_concurrent: int = 16,
        max_turns: int | None = None,
        timeout_s: float = 600.0,
        renderer: dict[str, Any] | None = None,
    ) -> None:
        if min(max_concurrent, timeout_s, max_turns or 1) <= 0:
            raise ValueError("max_concurrent, max_turns and timeout_s must be positive")
        self._vf = _verifiers()
        self.env, self.engine = env, engine or AutoEngine()
        self.max_concurrent, self.max_turns, self.timeout_s = max_concurrent, max_turns, timeout_s
        self.renderer = _renderer(renderer or {})
        self._environment = _environment(self._vf, env, max_turns, timeout_s)
        self._tasks: dict[int, Any] = {}
        self._counts: Counter[str] = Counter()
        self._tokenizer: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._server: TokenServer | None = None

    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the inner engine, and serves it on loopback.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"EnvironmentEngine speaks in chats, and the tokenizer of {tokenizer.name_or_path!r} has no "
                "chat template: use an instruct model, or set tokenizer.chat_template"
            )
        self.engine.attach(policy, tokenizer)
        self._tokenizer = tokenizer
        self._folder = tempfile.TemporaryDirectory(prefix="agro-renderer-")
        tokenizer.save_pretrained(self._folder.name)
        limit = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)
        self._server = TokenServer(_EachTurn(self.engine), model=_MODEL, max_model_len=limit)

    def update_weights(self, policy_version: int) -> int | None:
        """Passes the new version on to the engine, between requests."""
        self._serving().update_weights(policy_version)
        return self._serving().policy_version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        """Answers prompts without an environment, in one turn, by the inner engine."""
        return self.engine.generate(prompts, sampling, n=n, seed=seed)

    def play(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int, seed: int, source: str
    ) -> list[PromptGroup]:
        """n episodes of each prompt's task; what failed is left out and counted.

        Args:
            prompts: their column `task` is the task's place in the taskset.
            sampling: of each turn; max_new_tokens counts within a turn.
            n: episodes of each task.
            seed: with the same weights, equal seeds give equal requests, and so equal episodes, as far as the
                environment itself draws nothing of its own.
            source: name of the source in metrics and files.

        Raises:
            ValueError: a prompt without a task, or a task that is not there.
        """
        tasks = [self._task(prompt) for prompt in prompts]
        before = random.getstate()  # games draw from the process's generator
        try:
            episodes = _in_the_loop(self._episodes(tasks, sampling, n, seed))
        finally:
            random.setstate(before)
        version = self._serving().policy_version
        return [
            self._group(prompt, records, sampling, source, version)
            for prompt, records in zip(prompts, episodes, strict=True)
        ]

    def take_counts(self) -> dict[str, float]:
        """Episodes that were left out, by kind, and what the inner engine counts."""
        taken, self._counts = self._counts, Counter()
        return {**self.engine.take_counts(), **{name: float(count) for name, count in taken.items()}}

    def close(self) -> None:
        """Ends the server and the inner engine."""
        if self._server is not None:
            self._server.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._server = self._folder = None
        self.engine.close()

    # ------------------------------------------------------------------ episodes

    async def _episodes(
        self, tasks: Sequence[Any], sampling: Sampling, n: int, seed: int
    ) -> list[list[Mapping[str, Any]]]:
        """The traces' records of n episodes of each task."""
        room = asyncio.Semaphore(self.max_concurrent)

        async def one(number: int, task: Any) -> Mapping[str, Any]:
            async with room:
                context = self._context(sampling, (seed * 1_000_003 + number) % 2**31)
                episode = await self._environment.run_episode(task, context)
            traces = [trace for trace in episode.traces if trace.agent is None or trace.agent.trainable]
            if not traces:
                return {"nodes": [], "ok": False, "errors": [error.model_dump() for error in episode.errors]}
            record = traces[-1].to_record(float_decimals=None)
            if len(traces) > 1:
                return {"several": len(traces)}
            errors = [*record["errors"], *(error.model_dump() for error in episode.errors)]
            return record if episode.ok else {**record, "ok": False, "errors": errors}

        async with self._environment.serving():
            numbered = [(i * n + j, task) for i, task in enumerate(tasks) for j in range(n)]
            records = await asyncio.gather(*(one(number, task) for number, task in numbered))
        return [records[start : start + n] for start in range(0, len(records), n)]

    def _context(self, sampling: Sampling, seed: int) -> Any:
        server, vf = self._serving(), self._vf
        assert self._folder is not None
        client = vf.TrainClientConfig(
            base_url=server.url + "/v1",
            headers={"Authorization": f"Bearer {server.token}"},
            renderer=self.renderer,
            renderer_model_name=self._folder.name,
        )
        drawn = vf.Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
        )
        return vf.ModelContext(model=_MODEL, client=client, sampling=drawn)

    def _group(
        self,
        prompt: Prompt,
        records: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        source: str,
        version: int,
    ) -> PromptGroup:
        """The episodes of one task as a group: what they have in common before the policy's first token is
        the prompt."""
        answers = []
        for record in records:
            try:
                if "several" in record:
                    raise RowError("dropped_branches", f"{record['several']} agents that are trained")
                answer = answer_of_trace(record)
                if not any(answer.chosen):
                    raise RowError("no_token", "the policy chose no token")
                if not shared_prompt(answer.sequences()):
                    raise RowError("dropped_branches", "branches without a first token in common")
                answers.append((record, answer))
            except RowError as error:
                kind = _kind(record) if error.reason == "failed" else error.reason
                self._counts[
                    "dropped_branches" if kind == "dropped_branches" else f"generation_failures/{kind}"
                ] += 1
        common = shared_prompt([each for _, answer in answers for each in answer.sequences()])
        completions = tuple(
            self._completion(record, answer, len(common), sampling, source, version)
            for record, answer in answers
        )
        return PromptGroup(prompt=self._rendered(prompt, common), completions=completions)

    def _rendered(self, prompt: Prompt, ids: tuple[int, ...]) -> Prompt:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return Prompt(
            prompt_id=prompt.prompt_id,
            prompt=text,
            prompt_ids=ids,
            answer=prompt.answer,
            fields=prompt.fields,
        )

    def _completion(
        self,
        record: Mapping[str, Any],
        answer: Any,
        start: int,
        sampling: Sampling,
        source: str,
        version: int,
    ) -> Completion:
        made = joined_sequences(trimmed([(ids[start:], mask[start:]) for ids, mask in answer.sequences()]))
        parts = {name: part["score"] for name, part in record["rewards"].items() if part is not None}
        return Completion(
            completion=self._tokenizer.decode(list(made["completion_ids"]), skip_special_tokens=True),
            **made,
            reward=answer.reward,
            reward_parts=parts,
            finish_reason="length" if answer.truncated else "stop",
            source=source,
            policy_version=version,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            behavior_logprobs=None if sampling.temperature == 0 else tuple(answer.logprobs or ()) or None,
        )

    def _task(self, prompt: Prompt) -> Any:
        place = prompt.fields.get("task")
        if type(place) is not int or place < 0:
            raise ValueError(
                f"prompt {prompt.prompt_id} names no task (its column 'task' is {place!r}): make the file of "
                "prompts with agro_lightning.rollout.verifiers_engine.write_tasks"
            )
        if place not in self._tasks:
            found = next(iter(self._environment.taskset.skip(place).take(1)), None)
            if found is None:
                raise ValueError(f"prompt {prompt.prompt_id} names task {place}, which the taskset has not")
            self._tasks[place] = found
        return self._tasks[place]

    def _serving(self) -> TokenServer:
        if self._server is None:
            raise RuntimeError("EnvironmentEngine has no policy; call attach(policy, tokenizer) first")
        return self._server


class _EachTurn(RolloutEngine):
    """The engine behind the server: an episode's one seed becomes another for each of its turns.

    A turn's context is longer than the one before, so its length tells turns apart.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def attach(self, policy: Any, tokenizer: Any) -> None:
        self.engine.attach(policy, tokenizer)

    def update_weights(self, policy_version: int) -> int | None:
        return self.engine.update_weights(policy_version)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        of_turn = (seed * 1_000_003 + len(prompts[0])) % 2**31
        return self.engine.generate(prompts, sampling, n=n, seed=of_turn)

    def close(self) -> None:
        """The owner closes the engine."""


def write_tasks(path: str | Path, env: dict[str, Any], limit: int | None = None) -> int:
    """Writes the file of prompts that names an environment's tasks, for `data.train`; returns their number.

    Args:
        path: the JSON lines file; a row has `prompt_id`, `prompt` (the task's text) and `task` (its place).
        env: as EnvironmentEngine takes it.
        limit: tasks to take; needed where the taskset is infinite.

    Raises:
        ImportError: verifiers is not installed.
        ValueError: an infinite taskset without limit.
    """
    vf = _verifiers()
    taskset = _environment(vf, env, None, None).taskset
    if limit is not None:
        taskset = taskset.take(limit)
    if not taskset.bounded:
        raise ValueError(f"the taskset {env['taskset']['id']!r} has no end: give a limit")
    rows = []
    for place, task in enumerate(taskset):
        text = task.data.prompt_text or task.data.name or f"task {place}"
        rows.append({"prompt_id": f"task-{place}", "prompt": text, "task": place})
    replace_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _kind(record: Mapping[str, Any]) -> str:
    """Why an episode failed: the type of its last error, else verifiers' stop condition."""
    errors = record.get("errors") or []
    return str(errors[-1]["type"] if errors else record.get("stop_condition") or "error")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """This process's one event loop for verifiers, whose locks belong to the loop that met them first."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop


def _in_the_loop(work: Coroutine[Any, Any, _Result]) -> _Result:
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    finally:
        future.cancel()  # where the wait was interrupted


def _renderer(given: dict[str, Any]) -> dict[str, Any]:
    """verifiers' settings: the user's, or those of this project's renderer."""
    return given if "name" in given else {"name": "custom", "import_path": RENDERER, **given}


def _verifiers() -> Any:
    try:
        return importlib.import_module("verifiers.v1")
    except ImportError as error:
        raise ImportError(
            "EnvironmentEngine needs verifiers 0.4: pip install 'agro-lightning[agents]'"
        ) from error


def _environment(vf: Any, env: dict[str, Any], max_turns: int | None, timeout_s: float | None) -> Any:
    """verifiers' environment, whose roles run in this process where they say nothing else."""
    if not isinstance(env, dict) or not (env.get("taskset") or {}).get("id"):
        raise ValueError(f"env is {env!r}; give verifiers' settings, with a taskset that has an id")
    sys.modules.setdefault(HARNESS, importlib.import_module("agro_lightning.rollout.in_process_harness"))
    try:
        config = vf.resolve_env_config(env)
    except ModuleNotFoundError as error:
        raise ValueError(f"verifiers does not find the environment of {env!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"verifiers does not take the settings {env!r}: {error}") from error
    update: dict[str, Any] = {}
    for name, role in config:
        if isinstance(role, vf.AgentConfig):
            given = role.model_fields_set
            own = {} if "runtime" in given else {"runtime": {"type": "subprocess"}}
            own |= {} if role.harness is not None else {"harness": {"id": HARNESS}}
            own |= {} if "network_notice" in given else {"network_notice": False}
            own |= {} if max_turns is None else {"max_turns": max_turns}
            update[name] = {**role.model_dump(exclude_unset=True), **own}
    timeouts = config.timeout.model_dump() | ({} if timeout_s is None else {"episode": timeout_s})
    settings = {**env, **update, "timeout": timeouts}
    return vf.load_environment(vf.resolve_env_config(settings))
