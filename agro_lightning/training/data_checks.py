"""Checks of the data module: its settings, the lengths of its prompts, and data that changed under a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.prompts.dataset import PromptDataset
from agro_lightning.data.sources import Source
from agro_lightning.models.policy import Policy
from agro_lightning.rewards import Reward
from agro_lightning.rollout import Sampling
from agro_lightning.rollout.environment import EnvironmentClass, check_own_reward


def check_numbers(**values: int) -> None:
    """Raises ValueError for a number of the data module's settings that is too small."""
    for name, value in values.items():
        least = {"group_size": 2, "seed": 0}.get(name, 1)
        if value < least:
            raise ValueError(f"data.{name} is {value}; it must be at least {least}")


def check_sampling(sampling: Sampling, pass_at: Sequence[int], samples: int) -> None:
    """Raises ValueError for greedy sampling, and for a pass@k that `samples` cannot estimate."""
    if bad := [k for k in pass_at if not 1 <= k <= samples]:
        raise ValueError(f"data.pass_at has {bad}; pass@k needs 1 <= k <= validation_samples = {samples}")
    if sampling.temperature == 0:
        raise ValueError(
            "data.sampling.temperature is 0 (greedy); a group of equal completions teaches nothing. "
            "Give a positive temperature, 1.0 say"
        )


def check_rewards(
    rewards: Sequence[Reward], sources: Sequence[Source], environment: EnvironmentClass | None
) -> None:
    """Raises ValueError for a name given twice, or where only one of environment and rewards gives scores."""
    if both := {reward.name for reward in rewards} & {source.name for source in sources}:
        raise ValueError(
            f"a reward and a source are both named {', '.join(sorted(both))}, and the metric reward/NAME "
            "would mean either; give one of them another name"
        )
    check_own_reward(environment, rewards)


def check_lengths(
    datasets: Sequence[PromptDataset],
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    drop: bool,
) -> None:
    """Compares prompts with the model's embedding and context.

    Args:
        datasets: the run's prompts, of training and validation.
        policy: whose embedding rows and context limit them.
        tokenizer: names a token that the embedding lacks.
        max_new_tokens: of a completion.
        drop: leave prompts out that are too long, and count them.

    Raises:
        ValueError: a token without a row of the embedding; a prompt that is too long, without `drop`.
    """
    embedding: Any = policy.base.get_input_embeddings()
    rows = embedding.weight.shape[0]
    for prompt in (prompt for prompts in datasets for prompt in prompts):
        if (last := max(prompt.prompt_ids)) >= rows:
            raise ValueError(
                f"prompt {prompt.prompt_id} has token {last} ({tokenizer.convert_ids_to_tokens(last)}), "
                f"and the model's embedding has rows 0 to {rows - 1}: give the model's own tokenizer, or "
                "resize its embedding"
            )
    limit = policy.max_positions
    for prompts in datasets:
        if drop:
            prompts.drop_longer_than(limit - max_new_tokens)
        elif prompts.longest + max_new_tokens > limit:
            raise ValueError(
                f"the longest prompt of {prompts.settings.path} has {prompts.longest} tokens; with "
                f"max_new_tokens {max_new_tokens} that exceeds the model's context of {limit}. Lower "
                "data.sampling.max_new_tokens, or set max_prompt_tokens with on_bad_row: drop"
            )


def data_hashes(prompts: PromptDataset | None, offline: Mapping[str, RolloutBuffer]) -> dict[str, str]:
    """Hashes of what a run draws from, by name: its prompts, and the files of each offline source."""
    hashes = {f"source {name}": buffer.fingerprint for name, buffer in offline.items()}
    return hashes if prompts is None else hashes | {"prompts": prompts.fingerprint}


def check_unchanged(former: Mapping[str, str], now: Mapping[str, str], *, train: str, allowed: bool) -> None:
    """Compares the data with those of the checkpoint; sources may come and go.

    Args:
        former: data_hashes of the checkpoint's run.
        now: data_hashes of this run.
        train: path of the prompts, for the message.
        allowed: warn only.

    Raises:
        ValueError: something changed, which is not allowed.
    """
    changed = [name for name in former if now.get(name, former[name]) != former[name]]
    if not changed:
        return
    what = " and ".join(
        f"data.train ({train})" if name == "prompts" else f"the files of {name}" for name in changed
    )
    words = f"{what} changed since the checkpoint was made, so that other groups are drawn than were due"
    if not allowed:
        raise ValueError(f"{words}. Give the former data, or accept it by --allow_changed_data true")
    rank_zero_warn(words)
