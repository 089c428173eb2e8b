"""Log-probs of a linear head, forward and backward: ours, and its peers, interleaved in one run.

On a GPU: bf16 over the shapes of language models, with the share of the library's matmul speed measured in
the same run. On a CPU: fp32 small shapes, time and peak memory against plain torch. `--cases 4096x512x32000`
picks shapes.

`seconds` is forward + backward; `extra_peak_bytes` the memory above the inputs at its highest, gradients
included, and `workspace_bytes` the same without the gradients, which nobody can do without. On a CPU each
shape is measured twice: with a head that is trained, and, as `SHAPE:frozen_head`, with one that is not (LoRA,
only hidden's gradient wanted). `tflops_forward` counts 2NHV operations, `tflops_6nhv` 6NHV for
forward and backward, whatever is recomputed. A failure of ours is recorded (`failed`), and the exit code is 1
at the end.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._logprob_providers import PROVIDERS, LossFunction, Provider, ours
from bench._records import absent, emit, parser, record

BENCH = "linear_logprobs"
CPU_SHAPES = ((4096, 512, 32000), (2048, 576, 49152))
GPU_SHAPES = (
    (4096, 4096, 131072),
    (16384, 2048, 151936),
    (65536, 2048, 32000),
    (8192, 4096, 131072),
    (8192, 4096, 151936),
    (32768, 4096, 128256),
    (2048, 8192, 152064),
    (8192, 4096, 32001),
)
"""The three headline shapes first: a call may end before the last."""
SPARSE_SHAPES = ((16384, 2048, 151936),)
GPU_QUICK = ((4096, 4096, 131072), (16384, 2048, 32000))
SPREADS = (1.0, 4.0, 8.0, 12.0)
"""Standard deviations of the logits for the sparse backward: from flat to peaked."""
DROPPED = (1e-4, 1e-2)
"""Dropped masses it is run at."""


class Problem:
    """Inputs of one case: unit-variance logits (times `spread`), fixed random sign-changing coefficients."""

    def __init__(
        self, shape: tuple[int, int, int], device: str, dtype: torch.dtype, spread: float = 1.0,
        frozen: bool = False,
    ):  # fmt: skip
        rows, width, columns = shape
        make = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(rows, width, generator=make, device=device).to(dtype).requires_grad_()
        weight = torch.randn(columns, width, generator=make, device=device).mul_(spread * width**-0.5)
        self.weight = weight.to(dtype).requires_grad_(not frozen)
        self.targets = torch.randint(columns, (rows,), generator=make, device=device)
        self.coefficients = torch.randn(rows, generator=make, device=device)
        self.device = device

    def step(self, function: LossFunction) -> tuple[float, float]:
        """Seconds of one forward and of its backward."""
        self.sync()
        start = time.perf_counter()
        loss, _ = function(self.hidden, self.weight, self.targets, self.coefficients)
        self.sync()
        middle = time.perf_counter()
        loss.backward()
        self.sync()
        end = time.perf_counter()
        self.hidden.grad = self.weight.grad = None
        return middle - start, end - middle

    def exact_logprobs(self) -> Tensor:
        """Log-probs in fp64 on a CPU, fp32 without TF32 on a GPU, in small blocks of rows."""
        dtype = torch.float64 if self.device == "cpu" else torch.float32
        weight, out = self.weight.detach().to(dtype), []
        block = 256 if self.device == "cpu" else 1024
        for hidden, targets in zip(self.hidden.detach().split(block), self.targets.split(block), strict=True):
            logits = hidden.to(dtype) @ weight.T
            out.append(logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, 1))
        return torch.cat(out)

    def sync(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def interleaved(
    problem: Problem,
    functions: dict[str, LossFunction],
    library: Callable[[], None],
    repeats: int,
    budget: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Times all in turns, so that a drift of the machine hits all alike.

    Args:
        problem: the inputs.
        functions: what to time, by name; each was run once before.
        library: the library's matmul, timed in the same rounds.
        repeats: rounds; fewer where the budget ends first, never below 3.
        budget: seconds for all rounds.

    Returns:
        Seconds forward and backward, (rounds, 2) by name, and the library's (rounds,).
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    matmul = []
    begun = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - begun > budget:
            break
        for name, function in functions.items():
            times[name].append(problem.step(function))
        problem.sync()
        start = time.perf_counter()
        library()
        problem.sync()
        matmul.append(time.perf_counter() - start)
    return {name: torch.tensor(pairs) for name, pairs in times.items()}, torch.tensor(matmul)


def library_matmul(problem: Problem) -> Callable[[], None]:
    """The library's own matmul of the logits, by slices of the vocabulary into one reused buffer: 2 N H V."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    width = min(16384, weight.shape[0])
    buffer = torch.empty(hidden.shape[0] * width, dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        for part in weight.split(width):
            out = buffer[: hidden.shape[0] * part.shape[0]].view(hidden.shape[0], part.shape[0])
            torch.mm(hidden, part.T, out=out)

    return run


def cpu_extra_peak(provider: Provider, shape: tuple[int, int, int], frozen: bool) -> int:
    """Highest resident memory above the inputs during one step; call it in a fresh process."""
    function = provider.build()
    Problem((64, 64, 2048), "cpu", torch.float32).step(function)  # libraries' own start-up is not the step's
    problem = Problem(shape, "cpu", torch.float32, frozen=frozen)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    before = field("VmRSS:")
    problem.step(function)
    return field("VmHWM:") - before


def gpu_extra_peak(problem: Problem, function: LossFunction) -> int:
    """Highest allocated memory above the inputs during one forward and backward."""
    torch.cuda.empty_cache()
    problem.sync()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.step(function)
    problem.sync()
    return torch.cuda.max_memory_allocated() - before


def extra_peak(
    provider: Provider, shape: tuple[int, int, int], problem: Problem, function: LossFunction
) -> int:
    """The provider's extra peak memory; on a CPU from a fresh process, free of the others' memory."""
    if problem.device != "cpu":
        return gpu_extra_peak(problem, function)
    command = [
        sys.executable,
        "-m",
        "bench.linear_logprobs",
        "--peak-of",
        provider.name,
        "--cases",
        "x".join(map(str, shape)),
        *([] if problem.weight.requires_grad else ["--frozen-head"]),
    ]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )


def prepare(provider: Provider, problem: Problem) -> tuple[LossFunction | None, str]:
    """The provider's function after one successful step, or None and the reason."""
    if provider.gpu_only and problem.device == "cpu":
        return None, "needs a GPU"
    try:
        function = provider.build()
        problem.step(function)
        problem.sync()
    except Exception as error:  # a peer may fail in any way; the reason is reported
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        problem.hidden.grad = problem.weight.grad = None
        return None, reason
    return function, ""


def run_case(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype, repeats: int, budget: float, first: bool,
    frozen: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """All figures of one shape; `first` says that it is the first one, which slow providers run alone."""
    case = "x".join(map(str, shape)) + (":frozen_head" if frozen else "")
    problem = Problem(shape, device, dtype, frozen=frozen)
    records, functions = [], {}
    for provider in PROVIDERS:
        if provider.first_only and not first:
            records.append(absent(BENCH, case, provider.name, "compiled for the first shape alone"))
            continue
        function, reason = prepare(provider, problem)
        if function is None:
            records.append(absent(BENCH, case, provider.name, reason))
            if provider.name.startswith("ours") and not (provider.gpu_only and device == "cpu"):
                records.append(record(BENCH, case, provider.name, "failed", 1, "", reason))
        else:
            functions[provider] = function
    library = library_matmul(problem)
    library()
    times, matmuls = interleaved(
        problem,
        {provider.name: function for provider, function in functions.items()},
        library,
        repeats,
        budget,
    )
    matmul = float(matmuls.median())
    records.append(record(BENCH, case, "torch:mm", "seconds_matmul", matmul, "s", "2NHV, same run"))
    exact = problem.exact_logprobs()
    leaves = [leaf for leaf in (problem.hidden, problem.weight) if leaf.requires_grad]
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    for provider, function in functions.items():
        ahead, back = times[provider.name].median(0).values.tolist()
        seconds = float(times[provider.name].sum(1).median())
        peak, operations = extra_peak(provider, shape, problem, function), 2.0 * math.prod(shape)
        figures: list[tuple[str, float, str]] = [
            ("seconds", seconds, "s"),
            ("seconds_forward", ahead, "s"),
            ("seconds_backward", back, "s"),
            ("tflops_forward", operations / ahead / 1e12, "1e12/s"),
            ("tflops_6nhv", 3 * operations / seconds / 1e12, "1e12/s"),
            ("extra_peak_bytes", peak, "bytes"),
            ("workspace_bytes", peak - gradients, "bytes"),
            ("matmul_share_forward", matmul / ahead, "ratio"),
            ("matmul_share_8nhv", 4 * matmul / seconds, "ratio"),
        ]
        logprobs = function(problem.hidden, problem.weight, problem.targets, problem.coefficients)[1]
        if logprobs is not None:
            error = (logprobs.detach().to(exact.dtype) - exact).square().mean().sqrt()
            figures.append(("rms_error", float(error), "nat"))
        del logprobs
        records += [
            record(BENCH, case, provider.name, name, value, unit, provider.note)
            for name, value, unit in figures
        ]
    if not {"ours", "torch"} <= set(times):
        return records
    paired = float(
        (times["ours"].sum(1) / times["torch"].sum(1)).median()
    )  # by round: a busy machine hits both
    records.append(record(BENCH, case, "ours", "seconds_over_torch", paired, "ratio", "median over rounds"))
    for metric in ("extra_peak_bytes", "workspace_bytes"):
        peaks = {item["provider"]: item["value"] for item in records if item["metric"] == metric}
        share = peaks["ours"] / peaks["torch"]
        records.append(record(BENCH, case, "ours", f"{metric}_over_torch", share, "ratio"))
    return records


def run_sparse(
    shape: tuple[int, int, int], spread: float, device: str, dtype: torch.dtype, repeats: int, budget: float
) -> list[dict[str, Any]]:
    """The certified sparse backward against its own dense form; never a dense figure."""
    from agro_kernels import linear_logprobs

    case = "x".join(map(str, shape)) + f":logit_std={spread:g}"
    problem = Problem(shape, device, dtype, spread)
    functions = {f"ours:dropped_mass={mass:g}": ours("auto", mass) for mass in (0.0, *DROPPED)}
    for function in functions.values():
        problem.step(function)
    times, _ = interleaved(problem, functions, lambda: None, repeats, budget)
    dense = times["ours:dropped_mass=0"].sum(1)
    with torch.no_grad():
        out = linear_logprobs(problem.hidden, problem.weight, problem.targets, entropy=True)
    assert out.entropy is not None
    records = [
        record(BENCH, case, "ours", "mean_entropy", float(out.entropy.mean()), "nat"),
        record(BENCH, case, "ours", "seconds", float(dense.median()), "s"),
    ]
    for mass in DROPPED:
        name = f"ours:dropped_mass={mass:g}"
        seconds = times[name].sum(1)
        with torch.no_grad():
            out = linear_logprobs(problem.hidden, problem.weight, problem.targets, dropped_mass=mass)
        records += [
            record(BENCH, case, name, "seconds", float(seconds.median()), "s"),
            record(BENCH, case, name, "speedup_over_dense", float((dense / seconds).median()), "ratio"),
            record(BENCH, case, name, "skipped_fraction", float(out.skipped_fraction), "ratio"),
        ]
    return records


def _shape(text: str) -> tuple[int, int, int]:
    rows, width, columns = (int(part) for part in text.split("x"))
    return rows, width, columns


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", type=_shape, nargs="+", metavar="NxHxV", help="shapes to run instead")
    arguments.add_argument("--peak-of", metavar="PROVIDER", help="print that provider's peak memory, and end")
    arguments.add_argument("--budget", type=float, default=None, help="seconds of timing per shape")
    arguments.add_argument("--sparse", action="store_true", help="the certified sparse backward instead")
    arguments.add_argument("--frozen-head", action="store_true", help="only with a head that is not trained")
    options = arguments.parse_args()
    if options.peak_of:
        provider = next(item for item in PROVIDERS if item.name == options.peak_of)
        print(cpu_extra_peak(provider, options.cases[0], options.frozen_head))
        return
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    dense = (GPU_QUICK if options.quick else GPU_SHAPES) if gpu else CPU_SHAPES
    shapes = options.cases or (SPARSE_SHAPES if options.sparse and gpu else dense)
    repeats = 20 if gpu else 3 if options.quick else 11
    budget = options.budget or (6.0 if gpu else 20.0 if options.quick else 150.0)
    records = []
    for place, shape in enumerate(shapes):
        if options.sparse:
            for spread in SPREADS:
                records += run_sparse(shape, spread, device, dtype, repeats, budget / len(SPREADS))
                emit(records, options.json, shown="")
        else:
            for frozen in (True,) if options.frozen_head else (False,) if gpu else (False, True):
                first = place == 0 and frozen == options.frozen_head
                records += run_case(shape, device, dtype, repeats, budget, first, frozen)
        emit(records, options.json, shown="")  # what is there already survives a time limit
    emit(records, options.json)
    failed = [f"{item['provider']} at {item['case']}" for item in records if item["metric"] == "failed"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
