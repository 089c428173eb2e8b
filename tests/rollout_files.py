"""Row files and groups as users and runs write them, for the buffer's tests."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.types import Completion, Prompt, PromptGroup

VOCAB_SIZE = 17
"""Of the quick start's tokenizer: digits, + - =, and four special tokens."""


def text_rows(prompts: int = 3, each: int = 4) -> list[dict]:
    """Rows with nothing but text, such as anybody's file has."""
    return [
        {"prompt": f"{prompt}+{prompt}=", "completion": f"{2 * prompt + copy}", "reward": float(copy == 0)}
        for prompt in range(prompts)
        for copy in range(each)
    ]


def token_row(**changes) -> dict:
    """A complete row of the schema; None takes a column out."""
    row = {
        "prompt_id": "1+1",
        "prompt": "1+1=",
        "prompt_ids": [1, 5, 14, 5, 16],
        "completion": "2",
        "completion_ids": [6, 2],
        "reward": 1.0,
        "finish_reason": "stop",
        "source": "teacher",
        "policy_version": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 10,
        "behavior_logprobs": [-0.5, -0.25],
        "ref_logprobs": [-1.5, -2.5],
        "reference_id": "ref",
        "answer": "2",
    }
    row.update(changes)
    return {name: value for name, value in row.items() if value is not None}


def write_jsonl(path: Path, rows: list) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[dict], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def open_buffer(paths, tokenizer, tmp_path: Path, **options) -> RolloutBuffer:
    options = {"vocab_size": VOCAB_SIZE, "cache_dir": tmp_path / ".cache", **options}
    return RolloutBuffer(paths, tokenizer=tokenizer, **options)


def group(prompt: int = 1, *, version: int = 0, each: int = 4, **changes) -> PromptGroup:
    """A group as a rollout makes it."""
    completions = tuple(
        Completion(
            **{
                "completion": str(copy),
                "completion_ids": (4 + copy % 10, 2),
                "reward": copy / 2,
                "reward_parts": {"exact": copy / 2, "format": 1.0},
                "source": "live",
                "policy_version": version,
                "temperature": 0.75,
                "behavior_logprobs": (-0.125 * copy, -0.5),
                **changes,
            }
        )
        for copy in range(each)
    )
    ids = (1, 4 + prompt % 10, 16)
    return PromptGroup(
        prompt=Prompt(prompt_id=f"p{prompt}", prompt=f"{prompt % 10}=", prompt_ids=ids, answer="7"),
        completions=completions,
    )


def word_tokenizer(words: str = "0 1 2 3 4 5 6 7 8 9 + - =") -> PreTrainedTokenizerFast:
    """Another tokenizer than the quick start's, over the same characters, without BOS."""
    vocabulary = {"</s>": 0, "?": 1, **{word: place for place, word in enumerate(words.split(), start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
