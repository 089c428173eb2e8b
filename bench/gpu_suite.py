"""One call for a machine with a GPU: a smoke test, the kernels' tests, the benchmarks and the sanitizer, in
under ten minutes.

Each part is a process of its own with a time limit, so that one that hangs or fails takes nothing else along:
its failure is recorded, and the next part runs. Only a smoke test that hangs ends the call. The parts'
records, and how each ended, go into one JSON list. `--dry-run` goes through the same parts on a CPU with tiny
shapes (tests are only collected), and compiles every kernel for sm_90; its figures mean nothing.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench._records import emit, parser, record, write

BENCH = "gpu_suite"
ROOT = Path(__file__).parents[1]
TESTS = "tests/fused_head/test_kernels_gpu.py"
HUNG = -1
"""Exit code of a part that was stopped at its limit."""
SANITIZED = "test_small and bfloat16 and (300 or 507)"
"""Whole tiles whose pipeline wraps (H = 320 is more steps than it has stages), and ragged ones."""


Command = Callable[[bool, Path], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process of the suite."""

    name: str
    command: Command
    """From (dry run, where its JSON goes) to the command line, after the interpreter."""
    seconds: int
    """Time limit."""
    tool: str | None = None
    """A program on the path that runs the command, without which the part is reported as absent."""
    tool_options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    gates: bool = True
    """Whether its failure is the suite's."""
    dry_only: bool = False
    """Whether it needs no GPU, and so has no place in a device's time."""


def _pytest(*options: str) -> list[str]:
    limit = ["--timeout", "60"] if importlib.util.find_spec("pytest_timeout") else []
    return ["-m", "pytest", *"-q -m gpu -p no:cacheprovider -rfE --tb=line".split(), *limit, *options]


def _tests(dry: bool, _: Path) -> list[str]:
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    return _pytest(*(["--collect-only"] if dry else workers), "tests/fused_head")


def _sanitized(_dry: bool, _: Path) -> list[str]:
    return _pytest(TESTS, "-k", SANITIZED)


def _module(name: str, *options: str, dry: tuple[str, ...] = ("--quick",)) -> Command:
    """A benchmark, with these options on a device and those of `dry` besides in a dry run."""
    return lambda is_dry, path: ["-m", name, *options, *(dry if is_dry else ()), "--json", str(path)]


TINY_HEAD = ("--quick", "--budget", "1", "--cases", "96x64x1100")
TINY_STEP = ("--budget", "1", "--cases", "tiny:4x4:16+8")
SANITIZER_ENVIRONMENT = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
"""PyTorch's caching allocator hides what runs past a tensor's end from the sanitizer."""
PARTS = (
    Part(name="smoke", command=_module("bench.gpu_smoke"), seconds=40),
    Part(name="tiles", command=_module("bench.tiles"), seconds=110),
    Part(name="tests", command=_tests, seconds=110),
    Part(name="linear_logprobs", command=_module("bench.linear_logprobs", dry=TINY_HEAD), seconds=140),
    Part(name="agro_step", command=_module("bench.agro_step", dry=TINY_STEP), seconds=45),
    Part(name="real_run", command=_module("bench.real_run", "--quick", dry=()), seconds=60),
    Part(name="sparse", command=_module("bench.linear_logprobs", "--sparse", dry=TINY_HEAD), seconds=30),
    Part(name="memcheck", command=_sanitized, seconds=30, tool="compute-sanitizer",
         tool_options=("--tool", "memcheck", "--error-exitcode", "7"), environment=SANITIZER_ENVIRONMENT),
    Part(name="racecheck", command=_sanitized, seconds=15, tool="compute-sanitizer", gates=False,
         tool_options=("--tool", "racecheck", "--error-exitcode", "7"), environment=SANITIZER_ENVIRONMENT),
    Part(name="sm90_report", command=_module("bench.sm90_report"), seconds=90, dry_only=True),
)  # fmt: skip
"""The limits add up to less than the call's; `--only` gives some parts the whole call."""


def reason_absent(part: Part, dry: bool) -> str | None:
    """Why the part cannot run here, or None."""
    if part.tool is not None and shutil.which(part.tool) is None:
        return f"{part.tool} is not installed"
    if part.tool is not None and dry:
        return "needs a GPU"
    if part.dry_only and not dry:
        return "needs no GPU: run it elsewhere"
    return None


def run_part(part: Part, dry: bool, limit: float) -> list[dict[str, Any]]:
    """Runs one part; its records, and how it ended."""
    why = reason_absent(part, dry)
    if why is not None:
        return [record(BENCH, part.name, "ours", "absent", None, "", why)]
    with tempfile.TemporaryDirectory() as folder:
        json_path = Path(folder) / "records.json"
        prefix = [] if part.tool is None else [part.tool, *part.tool_options]
        command = [*prefix, sys.executable, *part.command(dry, json_path)]
        paths = filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(part.environment)
        start = time.perf_counter()
        print(f"== {part.name}: {' '.join(command)}", flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code, note = process.wait(limit), None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too: they would go on using the GPU
            process.wait()
            code, note = HUNG, f"stopped after its limit of {limit:.0f} s"
        seconds = time.perf_counter() - start
        inner = json.loads(json_path.read_text()) if json_path.exists() else []  # whole: it was renamed
    return [
        *inner,
        record(BENCH, part.name, "ours", "exit_code", code, "", note),
        record(BENCH, part.name, "ours", "seconds", seconds, "s"),
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--dry-run", action="store_true", help="every path that needs no GPU, on tiny shapes"
    )
    arguments.add_argument(
        "--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone"
    )
    arguments.add_argument(
        "--seconds", type=float, default=580.0, help="limit of the call; four times that dry"
    )
    options = arguments.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here; `--dry-run` tries everything that needs none")
    deadline = time.perf_counter() + options.seconds * (4 if options.dry_run else 1)
    records: list[dict[str, Any]] = []
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    for part in chosen:
        left = deadline - time.perf_counter()
        if left < 5:
            records.append(record(BENCH, part.name, "ours", "absent", None, "", "no time was left"))
        else:
            limit = left if options.only and len(chosen) == 1 else part.seconds
            records += run_part(part, options.dry_run, min(left, limit * (4 if options.dry_run else 1)))
        if options.json is not None:  # after every part, so that a stopped call leaves what it has
            write(records, options.json)
        if part.name == "smoke" and records[-2].get("value") == HUNG:
            print("the smoke test hangs: nothing else is run, give the machine back", flush=True)
            break
    emit([item for item in records if item["bench"] not in ("sm90_report", "tiles")], None)  # long lists
    gates = {part.name for part in PARTS if part.gates}
    ended = [item for item in records if item["bench"] == BENCH and item["metric"] == "exit_code"]
    failed = [item["case"] for item in ended if item["value"] != 0 and item["case"] in gates]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
