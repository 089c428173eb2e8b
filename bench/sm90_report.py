"""Compiles every kernel and every tile of the static table for Hopper (sm_90), on a machine without a GPU.

Prints registers, stack (above 0: registers spill), shared memory, tensor-core instructions and bulk copies of
each, and exits with 1 where the gate fails: stack 0, wgmma present for 16-bit inputs, shared memory at most
232,448 bytes.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # compiled kernels are what this is about

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agro_kernels import (
    _tiles,
    _triton_combine,
    _triton_group_coefficients,
    _triton_sequence_sums,
    _triton_tile_grads,
    _triton_tile_stats,
)
from agro_kernels._triton_dlogits import dlogits_kernel
from agro_kernels._triton_stats import stats_kernel
from bench._records import emit, parser, record

BENCH = "sm90_report"
SHARED_LIMIT = 232_448
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = (896, 2048, 2880, 4096, 8192)
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "entropy": {"ENTROPY": True},
    "softcap_bias_entropy": {"SOFTCAP": True, "BIAS": True, "ENTROPY": True},
    "pointers": {"DESCRIPTOR": False},
}
TYPES = {name: "*i64" for name in ("targets", "order", "bounds", "begins", "ends")}
TYPES |= {name: "fp32" for name in ("inner", "outer", "factor")}
TYPES |= {name: "i32" for name in ("row_count", "column_count", "tile_count")}
ALIGNED = ("hidden_stride", "weight_stride", "out_stride")
TYPES |= {name: "i32" for name in ALIGNED}


DOUBLES = {name: "*fp64" for name in ("log_ratios", "beta", "num_groups", "coefficients", "half_variances")}
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

    @property
    def needs_wgmma(self) -> bool:
        return self.dtype != "fp32" and "H" in self.constants


def table_case(kernel: Any, kind: str, table: Any, dtype: str, size: int, variant: str) -> Case:
    """A forward or backward kernel at one hidden size, with the table's tile."""
    flags = VARIANTS[variant]
    softcap, descriptor = flags.get("SOFTCAP", False), flags.get("DESCRIPTOR", True)
    tile = _tiles.choose_tile(table, size, DTYPES[dtype], softcap=softcap, descriptor=descriptor)
    return head_case(kernel, kind, tile, dtype, size, variant)


def head_case(kernel: Any, kind: str, tile: _tiles.Tile, dtype: str, size: int, variant: str) -> Case:
    """A forward or backward kernel at one hidden size, with any tile."""
    flags = {"DESCRIPTOR": True, "BIAS": False, "SOFTCAP": False, "ENTROPY": False}
    flags |= VARIANTS[variant]
    shape = {"H": size, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "GROUP": tile.group}
    constants = {name: value for name, value in (flags | shape).items() if name in kernel.arg_names}
    name = f"{kind}:{dtype}:H{size}:{variant}:{tile.rows}x{tile.columns}x{tile.depth}"
    return Case(
        name=name, kernel=kernel, dtype=dtype, constants=constants, warps=tile.warps, stages=tile.stages
    )


def cases(quick: bool) -> Iterator[Case]:
    """Every kernel with every tile that the tables can give, in all variants at one size of each tile.

    `quick` leaves out fp16, fp32's variants, and the other hidden sizes.
    """
    seen = set()
    for kernel, kind, table in (
        (stats_kernel, "stats", _tiles.FORWARD),
        (dlogits_kernel, "dlogits", _tiles.DLOGITS),
    ):
        for dtype in ("bf16", "fp32") if quick else DTYPES:
            for size in SIZES:
                tile = _tiles.choose_tile(table, size, DTYPES[dtype])
                first = (kind, dtype, tile) not in seen
                seen.add((kind, dtype, tile))
                for variant in VARIANTS:
                    wanted = first if quick else first or variant == "plain"
                    if wanted and not (quick and dtype == "fp32" and variant != "plain"):
                        yield table_case(kernel, kind, table, dtype, size, variant)
    yield from small_cases()


def small_cases() -> Iterator[Case]:
    """The kernels without products: they have one shape each."""
    flags = {"plain": (False, False), "softcap_bias_entropy": (True, True)}
    for entropy in (False, True):
        constants = {"ENTROPY": entropy, "ROWS": _triton_combine.ROWS}
        name = f"combine:entropy={entropy}"
        kernel = _triton_combine.combine_kernel
        yield Case(name=name, kernel=kernel, dtype="fp32", constants=constants, warps=4, stages=3)
    for variant, (capped, entropy) in flags.items():
        shared = {"BIAS": capped, "SOFTCAP": capped, "ENTROPY": entropy}
        for kind, module in (("tile_stats", _triton_tile_stats), ("tile_grads", _triton_tile_grads)):
            shape = {"ROWS": module.ROWS, "COLUMNS": module.COLUMNS}
            for out in ("bf16", "fp32") if kind == "tile_grads" else ("fp32",):
                yield Case(
                    name=f"{kind}:{out}:{variant}:{module.ROWS}x{module.COLUMNS}",
                    kernel=getattr(module, f"{kind}_kernel"),
                    dtype="fp32",
                    constants=shared | shape,
                    warps=4,
                    stages=3,
                    types={"out": f"*{out}"},
                )
    for kind, module, warps in (
        ("sequence_sums", _triton_sequence_sums, 4),
        ("group_coefficients", _triton_group_coefficients, 2),
    ):
        kernel = getattr(module, f"{kind}_kernel")
        yield Case(
            name=f"{kind}:{module.BLOCK}",
            kernel=kernel,
            dtype="fp32",
            constants={"BLOCK": module.BLOCK},
            warps=warps,
            stages=3,
            types=DOUBLES,
        )


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


def compile_case(case: Case) -> dict[str, int]:
    """Compiles for sm_90 and reads the cost from the binary."""
    kinds = signature(case)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or (name in ALIGNED and case.constants.get("DESCRIPTOR"))
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
    for case in cases(quick):
        figures = compile_case(case)
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
