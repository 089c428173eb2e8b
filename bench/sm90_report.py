"""Compiles every kernel and every tile of the static table for Hopper (sm_90), on a machine without a GPU.

What is compiled is what is launched: an integer that Triton specialises on is compiled both as a multiple of
16 and not, except where the launcher only ever passes multiples. Prints registers, stack (above 0: registers
spill), shared memory, tensor-core instructions and bulk copies of each, and exits with 1 where the gate
fails: stack 0, wgmma present for 16-bit inputs, shared memory at most 232,448 bytes. Gluon's kernels are
compiled through their launchers, on a device that only compiles.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # compiled kernels are what this is about

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agro_kernels import _gluon_fused, _tiles, _triton_agro, _triton_epilogue
from agro_kernels._head import Head, Upstream
from agro_kernels._slices import fused_buffer
from agro_kernels._triton_fused import dlogits_kernel, stats_kernel
from bench._offline_device import SHARED_LIMIT, offline_device
from bench._records import emit, parser, record

BENCH = "sm90_report"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "entropy": {"ENTROPY": True},
    "softcap_bias_entropy": {"SOFTCAP": True, "BIAS": True, "ENTROPY": True},
    "pointers": {"DESCRIPTOR": False},
}
TYPES = {name: "*i64" for name in ("targets", "order", "bounds", "begins", "ends")}
TYPES |= {name: "fp32" for name in ("inner", "outer", "factor")}
TYPES |= {name: "i32" for name in ("row_count", "column_count", "hidden_size", "group")}
TYPES |= {name: "i32" for name in ("hidden_stride", "weight_stride", "out_stride")}
MULTIPLES = ("out_stride",)
"""Specialised integers of which the launcher passes multiples of 16 alone."""
DOUBLES = {name: "*fp64" for name in ("log_ratios", "settings", "coefficients", "half_variances")}
"""What the loss's two kernels keep in fp64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel to compile."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    types: dict[str, str] = field(default_factory=dict)
    """Types of arguments that differ from TYPES."""
    multiples: tuple[str, ...] = MULTIPLES
    """Integers that are multiples of 16."""

    @property
    def needs_wgmma(self) -> bool:
        return self.dtype != "fp32" and "DEPTH" in self.constants


def table_case(kernel: Any, kind: str, table: Any, dtype: str, size: int, variant: str) -> Case:
    """A forward or backward kernel with the table's tile for a hidden size."""
    flags = VARIANTS[variant]
    narrow = flags.get("SOFTCAP", False) or (kind == "dlogits" and flags.get("ENTROPY", False))
    descriptor = flags.get("DESCRIPTOR", True)
    tile = _tiles.choose_tile(table, size, DTYPES[dtype], narrow=narrow, descriptor=descriptor)
    return head_case(kernel, kind, tile, dtype, variant)


def head_case(kernel: Any, kind: str, tile: _tiles.Tile, dtype: str, variant: str) -> Case:
    """A forward or backward kernel with any tile; the hidden size is a plain argument."""
    flags = {"DESCRIPTOR": True, "BIAS": False, "SOFTCAP": False, "ENTROPY": False}
    flags |= VARIANTS[variant]
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    constants = {name: value for name, value in (flags | shape).items() if name in kernel.arg_names}
    name = f"{kind}:{dtype}:{variant}:{tile.rows}x{tile.columns}x{tile.depth}"
    return Case(
        name=name, kernel=kernel, dtype=dtype, constants=constants, warps=tile.warps, stages=tile.stages
    )


def cases(quick: bool) -> Iterator[Case]:
    """Every kernel with every tile that the tables can give, in all variants; `quick` leaves out fp16, and
    fp32's variants."""
    seen = set()
    for kernel, kind, table in (
        (stats_kernel, "stats", _tiles.FORWARD),
        (dlogits_kernel, "dlogits", _tiles.DLOGITS),
    ):
        for dtype in ("bf16", "fp32") if quick else DTYPES:
            for size, variant in product([limit for limit, _ in table], VARIANTS):
                case = table_case(kernel, kind, table, dtype, size, variant)
                if case.name in seen or (quick and dtype == "fp32" and variant != "plain"):
                    continue
                seen.add(case.name)
                yield case
    yield from small_cases()


def small_cases() -> Iterator[Case]:
    """The kernels without products: they have one shape each."""
    flags = {"plain": (False, False), "softcap_bias_entropy": (True, True)}
    for variant, (capped, entropy) in flags.items():
        shared = {"BIAS": capped, "SOFTCAP": capped, "ENTROPY": entropy}
        for kind, (rows, columns), outs in (
            ("tile_stats", _triton_epilogue.STATS_SHAPE, ("fp32",)),
            ("tile_grads", _triton_epilogue.GRADS_SHAPE, ("bf16", "fp32")),
        ):
            for out in outs:
                case = Case(
                    name=f"{kind}:{out}:{variant}:{rows}x{columns}",
                    kernel=getattr(_triton_epilogue, f"{kind}_kernel"),
                    dtype="fp32",
                    constants=shared | {"ROWS": rows, "COLUMNS": columns},
                    warps=4,
                    stages=3,
                    types={"out": f"*{out}"},
                )
                yield from specialisations(case)
    for kind, block, warps in (
        ("sequence_sums", _triton_agro.SUM_BLOCK, 4),
        ("group_coefficients", _triton_agro.GROUP_BLOCK, 2),
    ):
        yield Case(
            name=f"{kind}:{block}",
            kernel=getattr(_triton_agro, f"{kind}_kernel"),
            dtype="fp32",
            constants={"BLOCK": block},
            warps=warps,
            stages=3,
            types=DOUBLES,
        )


def specialised(kernel: Any) -> set[str]:
    """The integers that Triton compiles a form of their own for where they are multiples of 16."""
    return {
        item.name for item in kernel.params if TYPES.get(item.name) == "i32" and not item.do_not_specialize
    }


def specialisations(case: Case) -> Iterator[Case]:
    """The case with its free integers as multiples of 16, and as any numbers."""
    free = tuple(sorted(specialised(case.kernel) - set(MULTIPLES)))
    yield replace(case, multiples=(*MULTIPLES, *free))
    if free:
        yield replace(case, name=f"{case.name}:ragged")


def signature(case: Case) -> dict[str, str]:
    """The types of the kernel's arguments, as the launcher would give them."""
    constants, kinds = case.constants, {}
    for name in case.kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in case.types:
            kinds[name] = case.types[name]
        elif name in ("hidden", "weight") and constants.get("DESCRIPTOR"):
            rows = constants["ROWS"] if name == "hidden" else constants["COLUMNS"]
            kinds[name] = f"tensordesc<{case.dtype}[{rows}, {constants['DEPTH']}]>"
        elif name in ("hidden", "weight", "out", "bias"):
            kinds[name] = f"*{case.dtype}"
        else:
            kinds[name] = TYPES.get(name, "*fp32")
    return kinds


GLUON_VARIANTS: dict[str, tuple[Head, bool, bool]] = {
    "plain": (Head(), False, False),
    "entropy": (Head(), False, True),
    "flipped": (Head(logit_scale=-1.0), False, True),
    "bias": (Head(), True, True),
    "softcap_bias_entropy": (Head(softcap=30.0), True, True),
}
"""Of Gluon's kernels: the head, whether it has a bias, whether the entropy is wanted."""
GLUON_SHAPE = (300, 1000, 50_257)
"""(N, H, V) that no tile divides; they are plain arguments, and change no instruction."""


def gluon_case(kind: str, tile: _tiles.Tile | None, dtype: str, variant: str) -> tuple[Case, dict[str, int]]:
    """One of Gluon's kernels as its launcher launches it, on a device that only compiles; `tile` None is the
    table's."""
    rows, width, columns = GLUON_SHAPE
    hidden = torch.empty(rows, width, dtype=DTYPES[dtype], device="meta")
    weight, row = hidden.new_empty(columns, width), hidden.new_empty(rows, dtype=torch.float32)
    targets = hidden.new_empty(rows, dtype=torch.int64)
    head, with_bias, entropy = GLUON_VARIANTS[variant]
    bias = hidden.new_empty(columns) if with_bias else None
    forward = kind == "gluon_stats"
    wide = _tiles.GLUON_STATS if forward else _tiles.GLUON_DLOGITS
    tile = tile or _gluon_fused.gluon_tile(wide, bias, head)
    with offline_device() as launches:
        if forward:
            _gluon_fused.launch_gluon_stats(hidden, weight, bias, targets, head, entropy, None, tile)
        else:
            more = {"entropy": row, "entropy_coefficient": row} if entropy else {}
            upstream = Upstream(logsumexp=row, coefficient=row, **more)
            buffer = fused_buffer(hidden, rows, columns)
            _gluon_fused.launch_gluon_dlogits(hidden, weight, bias, targets, head, upstream, buffer, tile)
    (launch,) = launches
    case = Case(
        name=f"{kind}:{dtype}:{variant}:{tile.rows}x{tile.columns}x{tile.depth}", kernel=launch.name,
        dtype=dtype, constants={"DEPTH": tile.depth}, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return case, launch.figures()


def gluon_cases(quick: bool) -> Iterator[tuple[Case, dict[str, int]]]:
    """Both of Gluon's kernels with the table's tiles; `quick` leaves out fp16 and three variants."""
    for kind, dtype in product(("gluon_stats", "gluon_dlogits"), ("bf16",) if quick else ("bf16", "fp16")):
        for variant in ("plain", "softcap_bias_entropy") if quick else GLUON_VARIANTS:
            yield gluon_case(kind, None, dtype, variant)


def compile_case(case: Case) -> dict[str, int]:
    """Compiles for sm_90 and reads the cost from the binary."""
    kinds = signature(case)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or (name in case.multiples and name in specialised(case.kernel))
    }
    compiled = triton.compile(
        ASTSource(fn=case.kernel, signature=kinds, constexprs=case.constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]

    def figure(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    return {
        "registers": figure("REG"),
        "stack_bytes": figure("STACK"),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
    }


def failures(case: Case, figures: dict[str, int]) -> list[str]:
    """What the gate holds against a kernel; empty is good."""
    found = []
    if figures["stack_bytes"] > 0:
        found.append(f"{case.name}: {figures['stack_bytes']} bytes of stack: registers spill")
    if figures["shared_bytes"] > SHARED_LIMIT:
        found.append(f"{case.name}: {figures['shared_bytes']} bytes of shared memory, above {SHARED_LIMIT}")
    if case.needs_wgmma and figures["wgmma"] == 0:
        found.append(f"{case.name}: no wgmma instruction")
    return found


def report(quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of all cases, and the gate's failures."""
    records, failed = [], []
    triton_cases = ((case, compile_case(case)) for case in cases(quick))
    for case, figures in chain(triton_cases, gluon_cases(quick)):
        failed += failures(case, figures)
        records += [
            record(BENCH, case.name, "ours", metric, value, "bytes" if metric.endswith("bytes") else "count")
            for metric, value in figures.items()
        ]
    return records, failed


def wide(records: list[dict[str, Any]]) -> str:
    """One line a kernel."""
    rows: dict[str, dict[str, int]] = {}
    for item in records:
        rows.setdefault(item["case"], {})[item["metric"]] = item["value"]
    lines = [f"{'kernel':58}" + "".join(f"{metric:>14}" for metric in next(iter(rows.values())))]
    lines += [f"{name:58}" + "".join(f"{value:>14}" for value in row.values()) for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__).parse_args()
    records, failed = report(options.quick)
    emit(records, options.json, wide(records))
    if failed:
        sys.exit("the gate fails:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
