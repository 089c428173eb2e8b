"""Which tile each kernel of the fused head should have, for the table in `agro_kernels/_tiles.py`.

Every candidate is compiled for Hopper first, which needs no GPU: one that spills registers, in any epilogue
the table gives it to, or wants more shared memory than there is, is out (`fits` 0, with the reason). On a GPU
the others are then timed in turns with the library's matmul of the same shape, at each hidden size: first
all shapes with the table's group, then the fastest shape with other groups. `matmul_share` is the library's
time over the kernel's, so 1 is a kernel whose epilogue costs nothing; `best` names the fastest tile.
`--quick` takes the table's own tiles and two hidden sizes.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from agro_kernels import _tiles
from agro_kernels._gluon_fused import launch_gluon_dlogits, launch_gluon_stats
from agro_kernels._head import Head, Upstream
from agro_kernels._tiles import Tile
from agro_kernels._triton_fused import dlogits_kernel, launch_dlogits, launch_stats, stats_kernel
from bench._records import emit, parser, record
from bench.linear_logprobs import Problem, library_matmul
from bench.sm90_report import compile_case, failures, gluon_case, head_case, wide

BENCH = "tiles"
KERNELS = {"stats": stats_kernel, "dlogits": dlogits_kernel}
LAUNCHERS: dict[str, Callable[..., object]] = {
    "stats": launch_stats, "dlogits": launch_dlogits, "gluon_stats": launch_gluon_stats,
    "gluon_dlogits": launch_gluon_dlogits,
}  # fmt: skip
OWN = {
    "stats": [tile for _, tile in _tiles.FORWARD], "dlogits": [tile for _, tile in _tiles.DLOGITS],
    "gluon_stats": [_tiles.GLUON_STATS], "gluon_dlogits": [_tiles.GLUON_DLOGITS],
}  # fmt: skip
"""The table's tiles."""
EPILOGUES = {
    "stats": ("plain", "entropy"), "dlogits": ("plain",), "gluon_stats": ("plain", "entropy"),
    "gluon_dlogits": ("plain", "entropy"),
}  # fmt: skip
"""What the table's tiles are used with; softcap, the entropy's gradient and plain loads have their own."""
SIZES = (2048, 4096, 8192, 896, 1536, 2880)
"""The headline shapes' first: a call may end before the last."""
SIZES_QUICK = (896, 4096)
ROWS, COLUMNS = 8192, 65536
SLICE = 16384
"""Columns of one launch of the backward: 256 MiB of dL/du in bf16 at ROWS."""
REPEATS = 10
GROUP = _tiles.WIDE.group
OTHER_GROUPS = (4, 8, 32)
# rows, columns, depth, warps: stages
SHAPES = {
    (128, 256, 64, 8): (2, 3, 4),
    (256, 128, 64, 8): (2, 3, 4),
    (128, 256, 128, 8): (2,),
    (128, 128, 64, 8): (3, 4, 5),
    (128, 128, 64, 4): (3, 4),
    (128, 128, 128, 8): (2, 3),
    (64, 256, 64, 4): (2, 3, 4),
    (64, 128, 64, 4): (4,),
}
# of Gluon's kernels; the backward's shared memory holds a tile more
RINGS = {
    "gluon_stats": {(128, 256, 64, 4): (3, 4), (128, 256, 128, 4): (2,), (128, 128, 64, 4): (5, 6)},
    "gluon_dlogits": {(128, 256, 64, 4): (2, 3), (128, 128, 64, 4): (4, 5), (128, 128, 128, 4): (2,)},
}


def candidates(kind: str, quick: bool) -> list[Tile]:
    """The tiles to try, the table's own first."""
    own = OWN[kind]
    others = [
        Tile(rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, group=GROUP)
        for (rows, columns, depth, warps), depths in RINGS.get(kind, SHAPES).items()
        for stages in depths
    ]
    return list(dict.fromkeys(own if quick else own + others))


def name(tile: Tile) -> str:
    """Such as 128x256x64:w8:s3:g16."""
    shape = f"{tile.rows}x{tile.columns}x{tile.depth}"
    return f"{shape}:w{tile.warps}:s{tile.stages}:g{tile.group}"


def compiled(kind: str, tile: Tile) -> tuple[list[dict[str, Any]], bool]:
    """The tile's cost in each epilogue, read from its binary, and whether it fits."""
    records, fits = [], True
    for epilogue in EPILOGUES[kind]:
        if kind in KERNELS:
            case = head_case(KERNELS[kind], kind, tile, "bf16", epilogue)
            figures = compile_case(case)
        else:
            case, figures = gluon_case(kind, tile, "bf16", epilogue)
        faults = failures(case, figures)
        fits = fits and not faults
        label = f"{kind}:{epilogue}:{name(tile)}"
        note = "; ".join(fault.removeprefix(f"{case.name}: ") for fault in faults) or None
        records += [
            record(BENCH, label, "ours", "registers", figures["registers"], "count"),
            record(BENCH, label, "ours", "stack_bytes", figures["stack_bytes"], "bytes"),
            record(BENCH, label, "ours", "shared_bytes", figures["shared_bytes"], "bytes"),
            record(BENCH, label, "ours", "programs_at_once", at_once(kind, tile, figures), "count"),
            record(BENCH, label, "ours", "fits", int(not faults), "", note),
        ]
    return records, fits


def at_once(kind: str, tile: Tile, figures: dict[str, int]) -> int:
    """Programs that one of Hopper's multiprocessors holds at a time: 65,536 registers, which a thread gets by
    eights, and 228 KiB of shared memory, of which each program costs 1 KiB more than it asks for."""
    warps = tile.warps if kind in KERNELS else 12  # two groups of consumers, and the loading warp's group
    registers = -(-figures["registers"] // 8) * 8 * 32 * warps
    return min(65_536 // registers, 228 * 1024 // (figures["shared_bytes"] + 1024))


def launcher(kind: str, problem: Problem) -> Callable[[Tile], object]:
    """One launch of the kernel on the problem with any tile; the backward's is of one slice."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    launch, given = LAUNCHERS[kind], (hidden, weight, None, problem.targets, Head())
    if kind.endswith("stats"):
        return lambda tile: launch(*given, False, None, tile)
    out = hidden.new_empty(hidden.shape[0] * weight.shape[0])
    level = torch.full_like(problem.coefficients, 11.0)
    upstream = Upstream(logsumexp=level, coefficient=problem.coefficients)
    return lambda tile: launch(*given, upstream, out, tile)


def seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the device for each function, in turns; each runs once before."""
    times: dict[str, list[float]] = {label: [] for label in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        events[0].record()
        for function, after in zip(functions.values(), events[1:], strict=True):
            function()
            after.record()
        torch.cuda.synchronize()  # once a round: launching costs the host time only while the device works
        for label, before, after in zip(functions, events, events[1:], strict=False):
            times[label].append(before.elapsed_time(after) / 1000)
    return times


def measured(kind: str, size: int, tiles: list[Tile]) -> list[dict[str, Any]]:
    """Shares of the library's matmul at one hidden size, and the best tile."""
    problem = Problem((ROWS, size, COLUMNS if kind.endswith("stats") else SLICE), "cuda", torch.bfloat16)
    library, launch = library_matmul(problem), launcher(kind, problem)
    shares: dict[Tile, float] = {}

    def measure(chosen: list[Tile]) -> None:
        functions = {name(tile): partial(launch, tile) for tile in chosen}
        times = seconds({"library": library, **functions}, REPEATS)
        for tile in chosen:
            pairs = zip(times["library"], times[name(tile)], strict=True)
            shares[tile] = median(matmul / ours for matmul, ours in pairs)

    measure(tiles)
    fastest = best(shares)
    measure([replace(fastest, group=group) for group in OTHER_GROUPS])
    fastest = best(shares)
    case = f"{kind}:H{size}"
    return [
        *(
            record(BENCH, f"{case}:{name(tile)}", "ours", "matmul_share", share, "ratio")
            for tile, share in shares.items()
        ),
        record(BENCH, case, "ours", "best", shares[fastest], "ratio", name(fastest)),
    ]


def best(shares: dict[Tile, float]) -> Tile:
    """The fastest tile; the first of equals."""
    return max(shares, key=shares.__getitem__)


def main() -> None:
    options = parser(__doc__).parse_args()
    records: list[dict[str, Any]] = []
    fitting: dict[str, list[Tile]] = {kind: [] for kind in OWN}
    pairs = [(kind, tile) for kind in OWN for tile in candidates(kind, options.quick)]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
        results = pool.map(compiled, *zip(*pairs, strict=True))
        for (kind, tile), (found, fits) in zip(pairs, results, strict=True):
            records += found
            if fits:
                fitting[kind].append(tile)
    print(wide(records))
    if torch.cuda.is_available():
        for size in SIZES_QUICK if options.quick else SIZES:
            for kind, tiles in fitting.items():
                records += measured(kind, size, tiles)
                shown = (
                    f"{kind}, H {size}: {records[-1]['value']:.1%} of the library's, {records[-1]['note']}"
                )
                emit(records, options.json, shown)  # what is there already survives a time limit
    else:
        emit(records, options.json, "no GPU here: compiled for Hopper, and not timed")


if __name__ == "__main__":
    main()
