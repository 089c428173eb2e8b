"""Random prompt groups from a large buffer of rollout files: memory and speed.

Each provider runs in a process of its own, over the same Parquet files: it opens them for the first time,
then draws prompt groups of 8 in random order. `resident_bytes` is the process's peak over all of that,
imports included (`import_resident_bytes` is how much of it these are; neither needs torch, whose size
depends on its build).

- `ours`: RolloutBuffer, which checks every row, packs it once, and finds the groups itself. - `datasets`:
the Hugging Face library's memory-mapped Arrow table, read by rows that are known to form a group.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench._records import absent, emit, parser, record

PROVIDERS = ("ours", "datasets")
GROUP_SIZE = 8
ROWS_PER_FILE = 100_000
VOCAB_SIZE = 32_000
PROMPT_TOKENS = 32
COMPLETION_TOKENS = (16, 112)
"""Lengths are uniform between these."""
GROUPS_PER_DRAW = 32
SECONDS = 3.0
"""How long one window of draws lasts; the median of three is reported."""


def generate(folder: Path, rows: int) -> None:
    """Writes Parquet files of `rows` random completions, 8 of each prompt, as the rollout schema has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from agro_lightning.data.buffer.schema import FILE_SCHEMA

    letters = np.frombuffer(b"etaoin shrdlu cmfwyp vbgkjqxz", np.uint8)
    for first in range(0, rows, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, rows - first)
        random = np.random.default_rng(first)
        prompts = random.integers(0, VOCAB_SIZE, (count // GROUP_SIZE, PROMPT_TOKENS), dtype=np.int32)
        lengths = random.integers(*COMPLETION_TOKENS, count, endpoint=True)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = random.integers(0, VOCAB_SIZE, ends[-1], dtype=np.int32)
        text = letters[random.integers(0, len(letters), 4 * ends[-1], dtype=np.uint8)]
        prompt_offsets = np.arange(count + 1, dtype=np.int32) * PROMPT_TOKENS
        columns = {
            "prompt_id": pa.array([f"p-{(first + row) // GROUP_SIZE}" for row in range(count)]),
            "prompt": pa.array([f"prompt {(first + row) // GROUP_SIZE}" for row in range(count)]),
            "prompt_ids": pa.ListArray.from_arrays(
                prompt_offsets, prompts.repeat(GROUP_SIZE, axis=0).ravel()
            ),
            "completion_ids": pa.ListArray.from_arrays(ends, tokens),
            "completion": pa.StringArray.from_buffers(count, pa.py_buffer(ends * 4), pa.py_buffer(text)),
            "behavior_logprobs": pa.ListArray.from_arrays(ends, -random.random(ends[-1], dtype=np.float32)),
            "reward": pa.array(random.random(count)),
            "policy_version": pa.array(np.full(count, first // ROWS_PER_FILE)),
        }
        schema = pa.schema([FILE_SCHEMA.field(name) for name in columns], metadata=FILE_SCHEMA.metadata)
        table = pa.Table.from_arrays(
            [column.cast(schema.field(name).type) for name, column in columns.items()], schema=schema
        )
        pq.write_table(table, folder / f"{first:08d}.parquet", compression="zstd")


def open_ours(folder: Path) -> Callable[[int], int]:
    """Opens the folder; the result draws the i-th batch of groups and says how many completions it holds."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from agro_lightning.data.buffer.buffer import RolloutBuffer

    words = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    buffer = RolloutBuffer(folder, tokenizer=tokenizer, vocab_size=VOCAB_SIZE, cache_dir=folder / ".cache")
    plan = buffer.plan_epoch(0, 0, GROUP_SIZE)

    def draw(batch: int) -> int:
        start = batch * GROUPS_PER_DRAW % (len(plan) - GROUPS_PER_DRAW)
        return sum(len(group) for group in buffer.groups(plan[start : start + GROUPS_PER_DRAW]))

    return draw


def open_datasets(folder: Path) -> Callable[[int], int]:
    """The same with the datasets library: each group is eight rows in a row, and the columns that we read."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    files = sorted(map(str, folder.glob("*.parquet")))
    table: Any = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / ".datasets"))
    order = np.random.default_rng(0).permutation(len(table) // GROUP_SIZE)

    def draw(batch: int) -> int:
        start = batch * GROUPS_PER_DRAW % (len(order) - GROUPS_PER_DRAW)
        drawn = 0
        for group in order[start : start + GROUPS_PER_DRAW].tolist():
            drawn += len(table[range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)]["reward"])
        return drawn

    return draw


def peak_bytes() -> int:
    """This process's peak resident memory, imports included."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(provider: str, folder: Path) -> dict[str, float]:
    """Runs in the provider's own process."""
    if provider == "ours":
        import agro_lightning.data.buffer.buffer  # noqa: F401
    else:
        import datasets  # noqa: F401
    imports = peak_bytes()
    started = time.perf_counter()
    draw = {"ours": open_ours, "datasets": open_datasets}[provider](folder)
    opened = time.perf_counter() - started
    batch, rates = 0, []
    for _ in range(3):
        drawn, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            drawn += draw(batch)
            batch += 1
        rates.append(drawn / (time.perf_counter() - started))
    return {
        "resident_bytes": peak_bytes(),
        "import_resident_bytes": imports,
        "completions_per_s": float(np.median(rates)),
        "open_seconds": opened,
    }


UNITS = {
    "resident_bytes": "bytes",
    "import_resident_bytes": "bytes",
    "completions_per_s": "1/s",
    "open_seconds": "s",
    "reopen_seconds": "s",
    "file_bytes": "bytes",
}


def in_own_process(provider: str, folder: Path) -> dict[str, float]:
    """Raises RuntimeError with the last line of its output when it fails."""
    command = [sys.executable, "-m", "bench.buffer", "--measure", provider, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run(rows: int) -> list[dict[str, Any]]:
    """The records of all providers for a buffer of that many rows."""
    case, records = str(rows), []
    with tempfile.TemporaryDirectory(prefix="agro-bench-") as name:
        folder = Path(name)
        generate(folder, rows)
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        for provider in PROVIDERS:
            try:
                found = in_own_process(provider, folder)
                if provider == "ours":
                    found["reopen_seconds"] = in_own_process(provider, folder)["open_seconds"]
                    found["file_bytes"] = size
            except RuntimeError as error:
                if provider == "ours":
                    raise
                records.append(absent("buffer", case, provider, str(error)))
                continue
            records += [
                record("buffer", case, provider, key, value, UNITS[key]) for key, value in found.items()
            ]
    return records


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--measure", choices=PROVIDERS, help="used by the benchmark itself: run one provider"
    )
    arguments.add_argument("--folder", type=Path, help="used by the benchmark itself: where its files are")
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    emit(run(200_000 if options.quick else 2_000_000), options.json)


if __name__ == "__main__":
    main()
