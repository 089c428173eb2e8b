"""The command `inspect`: what is in a buffer."""

from agro_lightning.data.discover import offline_paths
from agro_lightning.inspect_buffer import inspect_buffer
from agro_lightning.pretrained import load_tokenizer


def inspect(
    buffer: str | list[str],
    tokenizer: str = "quickstart",
    samples: int = 3,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    append_eos: bool = True,
    policy_version: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> None:
    """Prints what a run would find in a buffer: sources, rewards, lengths, bad rows, samples with masks.

    Args:
        buffer: a Parquet or JSONL file, a folder, a glob, or a list of such; "quickstart" is the buffer that
            ships with the package.
        tokenizer: the run's model folder or hub id; its tokenizer reads and writes the texts.
        samples: completions to show token by token.
        max_prompt_tokens: count longer prompts as bad rows.
        max_completion_tokens: count longer completions as bad rows.
        append_eos: end completions that are tokenised from text with EOS.
        policy_version: optimiser steps of the run so far; adds the staleness of rows.
        seed: picks the samples.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ValueError: nothing at these paths can be read as rows.
    """
    print(
        inspect_buffer(
            offline_paths([buffer] if isinstance(buffer, str) else buffer),
            load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            append_eos=append_eos,
            samples=samples,
            policy_version=policy_version,
            seed=seed,
        )
    )
