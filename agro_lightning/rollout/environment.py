"""A class of the user's as an environment: how it is found, what it offers, and calls with a time limit."""

import hashlib
import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.rewards import EnvironmentReward, Reward

logger = logging.getLogger(__name__)
_RESERVED = {"reset", "respond", "get_reward", "close"}


class EnvironmentClass:
    """The class that `data.environment` names; one object of it plays one episode.

    Args:
        settings: class_path, and init_args of the constructor.

    Raises:
        ValueError: no such class, one that has not the contract, or init_args that it does not take.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        path, self.init_args = settings.get("class_path"), dict(settings.get("init_args") or {})
        if not isinstance(path, str) or "." not in path or set(settings) - {"class_path", "init_args"}:
            raise ValueError(
                f"data.environment is {dict(settings)}; give class_path: package.module.Class, and init_args"
            )
        module, _, name = path.rpartition(".")
        try:
            self.type: Any = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"data.environment: {path} cannot be imported: {error}") from error
        if not inspect.isclass(self.type) or not callable(getattr(self.type, "reset", None)):
            raise ValueError(f"data.environment: {path} must be a class with a method reset(**row)")
        try:
            made: Any = self.new()
        except TypeError as error:
            raise ValueError(f"data.environment: {path} does not take its init_args: {error}") from error
        self.speaks = callable(getattr(self.type, "respond", None))
        self.rewards = callable(getattr(self.type, "get_reward", None))
        self.takes_seed = "seed" in inspect.signature(made.reset).parameters
        self.tools = [] if self.speaks else self._tools(path)

    def new(self) -> Any:
        return self.type(**self.init_args)

    def _tools(self, path: str) -> list[str]:
        names = [
            name
            for name, value in inspect.getmembers(self.type, inspect.isfunction)
            if not name.startswith("_") and name not in _RESERVED
        ]
        if not names:
            raise ValueError(
                f"data.environment: {path} offers nothing: give it public methods (tools), or respond(text)"
            )
        return names

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as JSON schemas, from type hints and Google-style docstrings.

        Raises:
            ValueError: a tool without them.
        """
        made, found = self.new(), []
        for name in self.tools:
            try:
                found.append(get_json_schema(getattr(made, name)))
            except Exception as error:  # transformers has several for what a docstring lacks
                raise ValueError(
                    f"data.environment: the tool {name} needs type hints and a docstring that describes each "
                    f"argument: {error}"
                ) from error
        return found


def check_own_reward(environment: EnvironmentClass | None, rewards: Sequence[Reward]) -> None:
    """Checks that an environment's own reward counts, and that a reward that asks for it gets it.

    Raises:
        ValueError: one without the other.
    """
    scored = any(isinstance(reward, EnvironmentReward) for reward in rewards)
    gives = environment is not None and environment.rewards
    if scored != gives:
        raise ValueError(
            "the rewards have EnvironmentReward, and no environment has get_reward"
            if scored
            else "the environment has get_reward: list agro_lightning.rewards.EnvironmentReward in the "
            "rewards, with weight 0 where it is not to count"
        )


def with_tools(settings: PromptSettings, schemas: Sequence[dict[str, Any]]) -> PromptSettings:
    """The settings, with an environment's tools for the chat template.

    Raises:
        ValueError: tools, and prompts that are no chat.
    """
    if not schemas:
        return settings
    if not settings.chat:
        raise ValueError(f"an environment with tools needs prompts of {settings.path} with chat: true")
    return replace(settings, chat_template_options={**settings.chat_template_options, "tools": list(schemas)})


def drawn_seed(*key: object) -> int:
    """A number in [0, 2^31) that follows from the key alone."""
    digest = hashlib.blake2b(repr(key).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def start_call(function: Callable[[], Any]) -> Future[Any]:
    """Runs a call in a thread of its own, which a process that ends does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # also SystemExit of a tool: it is the tool's error
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="environment").start()
    return future
