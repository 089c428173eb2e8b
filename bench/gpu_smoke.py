"""The first 25 seconds on a GPU: does each backend run, and rightly; versions, clocks, the device's rates.

Each backend makes one forward and backward at 512x4096x32000 (whole tiles) and 512x1000x5003 (ragged ones),
held against fp32: `rms_error` of the log-probs, and `error_hidden` and `error_weight`, the norms of the
gradients' errors over the gradients'. A backend that raises, or errs, is recorded, and the next one runs; one
that hangs is for the suite to stop. On a CPU tiny shapes, and the backend that runs there.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from agro_kernels import linear_logprobs
from agro_kernels._checks import BACKENDS
from bench._records import emit, parser, record
from bench.linear_logprobs import Problem

BENCH = "gpu_smoke"
SHAPES = ((512, 4096, 32000), (512, 1000, 5003))
SHAPES_QUICK = ((64, 128, 1000), (33, 50, 203))
LIMITS = {"rms_error": 1e-3, "error_hidden": 2e-2, "error_weight": 2e-2}
"""A kernel that is right in bf16 stays far below; one that is wrong does not."""
COPY_BYTES, SIDE = 1 << 30, 8192
QUERY = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "memory.total")


def backends(gpu: bool) -> tuple[str, ...]:
    """The backends of agro_kernels that this machine is to run."""
    return tuple(name for name in BACKENDS if name not in ("auto", "reference")) if gpu else ("chunked",)


def step(problem: Problem, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradients of hidden and weight, in fp32."""
    out = linear_logprobs(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs
    torch.dot(problem.coefficients, out).backward()
    grads = problem.hidden.grad, problem.weight.grad
    problem.hidden.grad = problem.weight.grad = None
    assert grads[0] is not None and grads[1] is not None
    return out.detach(), grads[0].float(), grads[1].float()


def errors(shape: tuple[int, int, int], device: str, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """The backend's errors against plain torch in fp32."""
    problem, exact = Problem(shape, device, dtype), Problem(shape, device, dtype)
    exact.hidden = exact.hidden.detach().float().requires_grad_()
    exact.weight = exact.weight.detach().float().requires_grad_()
    right, ours = step(exact, "reference"), step(problem, backend)
    problem.sync()
    relative = [float((b - a).norm() / a.norm()) for a, b in zip(right[1:], ours[1:], strict=True)]
    rms = float((ours[0] - right[0]).square().mean().sqrt())
    return dict(zip(LIMITS, (rms, *relative), strict=True))


def checked(
    device: str, dtype: torch.dtype, backend: str, shape: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """The records of one backend at one shape; `failed` 1 with the reason where it is wrong."""
    case, start = "x".join(map(str, shape)), time.perf_counter()
    try:
        found, reason = errors(shape, device, dtype, backend), None
        wrong = [name for name, value in found.items() if not value <= LIMITS[name]]  # NaN is wrong too
        if wrong:
            reason = ", ".join(f"{name} {found[name]:.3g} above {LIMITS[name]:g}" for name in wrong)
    except Exception as error:  # any failure of a kernel is what this looks for
        found, reason = {}, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    seconds = time.perf_counter() - start
    return [
        *(record(BENCH, case, backend, name, value, "ratio") for name, value in found.items()),
        record(BENCH, case, backend, "seconds", seconds, "s", "with compilation"),
        record(BENCH, case, backend, "failed", int(reason is not None), "", reason),
    ]


def rate(function: Callable[[], object], work: float, repeats: int = 10) -> float:
    """Work a second, from the median of the device's times."""
    times = []
    function()
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return work / sorted(times)[repeats // 2]


def device_rates() -> list[dict[str, Any]]:
    """Copy bandwidth, the library's matmul rate, and what nvidia-smi says of clocks."""
    left = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = rate(lambda: target.copy_(source), 2 * COPY_BYTES)
    multiplied = rate(lambda: left @ left, 2 * SIDE**3)
    records = [
        record(BENCH, "device", "torch:copy", "bytes_per_second", copied, "B/s"),
        record(BENCH, "device", "torch:mm", "flops", multiplied, "1/s", f"{SIDE}^3 in bf16"),
    ]
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return [*records, record(BENCH, "device", "nvidia-smi", "absent", None, "", str(error)[:160])]
    for name, value in zip(QUERY, values.split(","), strict=True):
        records.append(record(BENCH, "device", "nvidia-smi", name, None, "", value.strip()))
    return records


def main() -> None:
    options = parser(__doc__).parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    records = device_rates() if gpu else []
    for shape in SHAPES_QUICK if options.quick or not gpu else SHAPES:
        for backend in backends(gpu):
            records += checked(device, dtype, backend, shape)
            emit(records, options.json, shown="")  # what is there already survives a time limit
    emit(records, options.json)
    failed = [f"{r['provider']} at {r['case']}" for r in records if r["metric"] == "failed" and r["value"]]
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
