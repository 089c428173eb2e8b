"""One call for a machine with a GPU: the kernels' tests, the benchmarks, and the sanitizer, in under ten
minutes.

Each part is a process of its own with a time limit, so that one that hangs or fails takes nothing else
along. Their records, and how each part ended, go into one JSON list. `--dry-run` goes through the same
parts on a CPU with tiny shapes (tests are only collected), after compiling every kernel for sm_90; its
figures mean nothing.
"""

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

from bench._records import emit, parser, record

BENCH = "gpu_suite"
ROOT = Path(__file__).parents[1]
TESTS = "tests/fused_head/test_kernels_gpu.py"
SANITIZED = "test_small and bfloat16 and (300 or 507)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process of the suite."""

    name: str
    command: Callable[[bool, Path], list[str]]
    """From (dry run, where its JSON goes) to the command line, after the interpreter."""
    seconds: int
    """Time limit."""
    needs: str | None = None
    """A file, relative to the project, without which the part is reported as absent."""
    tool: str | None = None
    """A program on the path that runs the command, without which the part is reported as absent."""
    tool_options: tuple[str, ...] = ()


def _tests(dry: bool, _: Path) -> list[str]:
    collect = ["--collect-only"] if dry else ["-x", "--maxfail=20"]
    return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *collect, "tests/fused_head"]


def _sanitized(dry: bool, _: Path) -> list[str]:
    return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", TESTS, "-k", SANITIZED]


def _report(dry: bool, json_path: Path) -> list[str]:
    return ["-m", "bench.sm90_report", *(["--quick"] if dry else []), "--json", str(json_path)]


def _logprobs(dry: bool, json_path: Path) -> list[str]:
    tiny = ["--quick", "--budget", "1", "--cases", "96x64x1100"] if dry else ["--budget", "12"]
    return ["-m", "bench.linear_logprobs", "--sparse", *tiny, "--json", str(json_path)]


def _real_run(_: bool, json_path: Path) -> list[str]:
    return ["-m", "bench.real_run", "--quick", "--json", str(json_path)]  # the whole one takes 20 minutes


def _module(name: str) -> Callable[[bool, Path], list[str]]:
    return lambda dry, json_path: ["-m", name, *(["--quick"] if dry else []), "--json", str(json_path)]


PARTS = (
    Part(name="tests", command=_tests, seconds=150),
    Part(name="linear_logprobs", command=_logprobs, seconds=200),
    Part(name="agro_step", command=_module("bench.agro_step"), seconds=90, needs="bench/agro_step.py"),
    Part(name="real_run", command=_real_run, seconds=150, needs="bench/real_run.py"),
    Part(name="memcheck", command=_sanitized, seconds=60, tool="compute-sanitizer",
         tool_options=("--tool", "memcheck", "--error-exitcode", "7")),
    Part(name="racecheck", command=_sanitized, seconds=60, tool="compute-sanitizer",
         tool_options=("--tool", "racecheck", "--error-exitcode", "7")),
    Part(name="sm90_report", command=_report, seconds=90),
    Part(name="tiles", command=_module("bench.tiles"), seconds=200),
)  # fmt: skip
"""The limits may add up to more than the call's; what then has no time left is reported so, and `--only` runs
it in a call of its own."""


def reason_absent(part: Part, dry: bool) -> str | None:
    """Why the part cannot run here, or None."""
    if part.needs is not None and not (ROOT / part.needs).exists():
        return f"{part.needs} is not there"
    if part.tool is not None and shutil.which(part.tool) is None:
        return f"{part.tool} is not installed"
    if part.tool is not None and dry:
        return "needs a GPU"
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
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        start = time.perf_counter()
        print(f"== {part.name}: {' '.join(command)}", flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code, note = process.wait(limit), None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too: they would go on using the GPU
            process.wait()
            code, note = -1, f"stopped after its limit of {limit:.0f} s"
        seconds = time.perf_counter() - start
        inner = json.loads(json_path.read_text()) if json_path.exists() else []
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
    arguments.add_argument("--seconds", type=float, default=580.0, help="limit of the whole call")
    options = arguments.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here; `--dry-run` tries everything that needs none")
    deadline = time.perf_counter() + options.seconds
    records: list[dict[str, Any]] = []
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        left = deadline - time.perf_counter()
        if left < 5:
            records.append(record(BENCH, part.name, "ours", "absent", None, "", "no time was left"))
        else:
            records += run_part(
                part, options.dry_run, min(left, part.seconds * (4 if options.dry_run else 1))
            )
        if options.json is not None:  # after every part, so that a stopped call leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(records, indent=1) + "\n")
    emit([item for item in records if item["bench"] not in ("sm90_report", "tiles")], None)  # long lists
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    failed = [item["case"] for item in records if item["metric"] == "exit_code" and item["value"] != 0]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
