"""Gluon: backend `gluon`, the fused kernels for sm_90, persistent and specialised by warps.

A program stays on its multiprocessor and takes tile after tile. One warp loads: the copy engine fills a ring
of slots in shared memory. Two groups of four warps each multiply and finish one half of the tile's rows, on
their own, so that one's epilogue hides behind the other's products. A slot's `full` barrier counts its bytes,
its `empty` barrier the two groups that have read it.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Gluon's language, which only looks like Python.

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from agro_kernels._head import Head, Parts, Upstream
from agro_kernels._slices import fused_slice
from agro_kernels._tiles import GLUON_DLOGITS, GLUON_NARROW, GLUON_STATS, Tile
from agro_kernels._triton_epilogue import (
    chosen_logits,
    gradient_tile,
    kernel_factors,
    levels,
    own_targets,
    row_stats,
)
from agro_kernels._triton_fused import (
    FUSED,
    launch_dlogits,
    launch_stats,
    row_major,
    tile_place,
    uses_descriptors,
)

REGISTERS = gl.constexpr((232, 40))
"""Registers of a thread: two groups of 128 threads at 232 and one at 40 are the 64,512 that 12 warps have."""
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@triton.jit
def slot_of(step, SLOTS: gl.constexpr):
    """The ring's slot of a step, and the parity of the round it belongs to."""
    return step % SLOTS, (step // SLOTS) & 1


@gluon.jit
def open_ring(hidden, weight, SLOTS: gl.constexpr):
    """Slots, each for W's tile and for both halves of X's, and their full and empty barriers."""
    halves = gl.allocate_shared_memory(hidden.dtype, [2 * SLOTS] + hidden.block_type.shape, hidden.layout)
    slots = gl.allocate_shared_memory(weight.dtype, [SLOTS] + weight.block_type.shape, weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    return halves, slots, full, empty


@gluon.jit
def load_tiles(hidden, weight, ring, sizes):
    """The loading warp: for every tile of this program, a slot each step of DEPTH hidden columns."""
    halves, slots, full, empty = ring
    row_count, column_count, hidden_size, group, row_blocks, column_blocks = sizes
    SLOTS: gl.constexpr = slots.shape[0]
    COLUMNS: gl.constexpr = slots.shape[1]
    DEPTH: gl.constexpr = slots.shape[2]
    ROWS: gl.constexpr = halves.shape[1]
    step = 0
    for tile in range(gl.program_id(0), row_blocks * column_blocks, gl.num_programs(0)):
        row_block, column_block = tile_place(tile, row_blocks, column_blocks, group)
        for depth in range(0, hidden_size, DEPTH):
            slot, parity = slot_of(step, SLOTS)
            mbarrier.wait(empty.index(slot), parity ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, (2 * ROWS + COLUMNS) * DEPTH * 2)
            for half in gl.static_range(2):
                place = [(2 * row_block + half) * ROWS, depth]
                tma.async_copy_global_to_shared(hidden, place, bar, halves.index(2 * slot + half))
            tma.async_copy_global_to_shared(weight, [column_block * COLUMNS, depth], bar, slots.index(slot))
            step += 1


@gluon.jit
def products_of(HALF: gl.constexpr, ring, step, hidden_size, LAYOUT: gl.constexpr):
    """X Wᵀ of one half of a tile's rows, in fp32, and the next tile's first step.

    A slot is handed back one step late, when the products that read it are done and the next are under way.
    """
    halves, slots, full, empty = ring
    SLOTS: gl.constexpr = slots.shape[0]
    COLUMNS: gl.constexpr = slots.shape[1]
    DEPTH: gl.constexpr = slots.shape[2]
    ROWS: gl.constexpr = halves.shape[1]
    total = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    before = step % SLOTS
    for depth in range(0, hidden_size, DEPTH):
        slot, parity = slot_of(step, SLOTS)
        mbarrier.wait(full.index(slot), parity)
        x, w = halves.index(2 * slot + HALF), slots.index(slot)
        total = hopper.warpgroup_mma(x, w.permute((1, 0)), total, is_async=True)
        total = hopper.warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        mbarrier.arrive(empty.index(before), count=1, pred=depth > 0)
        before = slot
        step += 1
    total = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    mbarrier.arrive(empty.index(before), count=1)
    return total, step


@gluon.jit
def finish_tiles(
    HALF: gl.constexpr, ring, out, stages, arrays, sizes, factors, BIAS: gl.constexpr, SOFTCAP: gl.constexpr,
    ENTROPY: gl.constexpr, FLIPPED: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """One group of consumers: products, then the rows' figures, or dL/du, out through the copy engine."""
    bias, targets, logsumexp, entropy, chosen, coefficient, entropy_coefficient = arrays
    row_count, column_count, hidden_size, group, row_blocks, column_blocks = sizes
    inner, outer, factor = factors
    ROWS: gl.constexpr = ring[0].shape[1]
    COLUMNS: gl.constexpr = ring[1].shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    places = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    step = 0
    for tile in range(gl.program_id(0), row_blocks * column_blocks, gl.num_programs(0)):
        row_block, column_block = tile_place(tile, row_blocks, column_blocks, group)
        total, step = products_of(HALF, ring, step, hidden_size, LAYOUT)
        row, column = (row_block * 2 + HALF) * ROWS, column_block * COLUMNS
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        level = levels(total, bias, column + places, column_count, inner, BIAS, SOFTCAP)
        target = own_targets(targets, rows, row_count, column, column_count, COLUMNS)
        if BACKWARD:
            grad = gradient_tile(
                level, target, places, logsumexp, coefficient, entropy, entropy_coefficient, rows, row_count,
                outer, factor, SOFTCAP, ENTROPY,
            )  # fmt: skip
            tma.store_wait(pendings=0)  # the stage's former tile has left it
            stages.index(HALF).store(grad.to(out.dtype))
            hopper.fence_async_shared()
            tma.async_copy_shared_to_global(out, [row, column], stages.index(HALF))
        else:
            if FLIPPED:
                level = -level
            if column_block == column_blocks - 1:
                level = gl.where((column + places < column_count)[None, :], level, -float("inf"))
            if gl.max(target, 0) >= 0:
                gl.store(chosen + rows, chosen_logits(level, target, places, outer), mask=target >= 0)
            tile_logsumexp, tile_entropy = row_stats(level, outer, ENTROPY)
            place = gl.cast(column_block, gl.int64) * row_count + rows
            gl.store(logsumexp + place, tile_logsumexp, mask=rows < row_count)
            if ENTROPY:
                gl.store(entropy + place, tile_entropy, mask=rows < row_count)
    if BACKWARD:
        tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["row_count", "column_count", "hidden_size", "group"])
def gluon_kernel(
    hidden, weight, out, bias, targets, logsumexp, entropy, chosen, coefficient, entropy_coefficient,
    row_count, column_count, hidden_size, group, inner, outer, factor,
    SLOTS: gl.constexpr, BIAS: gl.constexpr, SOFTCAP: gl.constexpr, ENTROPY: gl.constexpr,
    FLIPPED: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Forward, for outer > 0, FLIPPED where the head's scale is negative: writes tiles' logsumexp, entropy
    (column blocks, N), and targets' logits `chosen`, (N,). Backward: writes gradient_tile to `out`."""
    ring = open_ring(hidden, weight, SLOTS)
    stages = ring[0]
    if BACKWARD:
        stages = gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)
    arrays = (bias, targets, logsumexp, entropy, chosen, coefficient, entropy_coefficient)
    row_blocks = gl.cdiv(row_count, 2 * hidden.block_type.shape[0])
    column_blocks = gl.cdiv(column_count, weight.block_type.shape[0])
    sizes = (row_count, column_count, hidden_size, group, row_blocks, column_blocks)
    factors = (inner, outer, factor)
    gl.warp_specialize([
        (finish_tiles, (0, ring, out, stages, arrays, sizes, factors, BIAS, SOFTCAP, ENTROPY, FLIPPED,
                        BACKWARD)),
        (finish_tiles, (1, ring, out, stages, arrays, sizes, factors, BIAS, SOFTCAP, ENTROPY, FLIPPED,
                        BACKWARD)),
        (load_tiles, (hidden, weight, ring, sizes)),
    ], [4, 1], REGISTERS)  # fmt: skip


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine needs to know of a matrix: its rows start on 16 bytes."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns], layout)


def gluon_tile(wide: Tile, bias: Tensor | None, head: Head) -> Tile:
    """The tile for one launch: the wide one where the epilogue leaves it its registers."""
    return wide if bias is None and not head.softcap else GLUON_NARROW


def _launch(
    hidden: Tensor, weight: Tensor, out: Tensor | None, bias: Tensor | None, rows: tuple[Tensor, ...],
    factors: tuple[float, ...], head: Head, tile: Tile, **flags: bool,
) -> None:  # fmt: skip
    """One program a multiprocessor, and no more than there are tiles."""
    count, columns = hidden.shape[0], weight.shape[0]
    active: Any = driver.active
    most = active.utils.get_device_properties(active.get_current_device())["multiprocessor_count"]
    most = min(most, -(-count // tile.rows) * -(-columns // tile.columns))
    left, right = _described(hidden, tile.rows // 2, tile.depth), _described(weight, tile.columns, tile.depth)
    gluon_kernel[(most,)](
        left, right, left if out is None else _described(out, tile.rows // 2, tile.columns),
        rows[1] if bias is None else bias, *rows, count, columns, hidden.shape[1], tile.group, *factors,
        SLOTS=tile.stages, BIAS=bias is not None, SOFTCAP=head.softcap != 0, BACKWARD=out is not None,
        num_warps=tile.warps, **flags,
    )  # fmt: skip


def launch_gluon_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool,
    most_columns: int | None, tile: Tile | None = None,
) -> Parts:  # fmt: skip
    """The forward kernel; see `_triton_fused.launch_stats`, which takes what the copy engine cannot read."""
    weight = row_major(weight)
    if not uses_descriptors(hidden, weight):
        return launch_stats(hidden, weight, bias, targets, head, entropy, most_columns)
    tile = tile or gluon_tile(GLUON_STATS, bias, head)
    logsumexp = hidden.new_empty(-(-weight.shape[0] // tile.columns), hidden.shape[0], dtype=torch.float32)
    own = torch.empty_like(logsumexp) if entropy else None
    chosen = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    inner, outer = kernel_factors(head)
    rows = targets, logsumexp, logsumexp if own is None else own, chosen, chosen, chosen
    factors = inner, abs(outer), head.factor
    _launch(hidden, weight, None, bias, rows, factors, head, tile, ENTROPY=entropy, FLIPPED=outer < 0)
    return Parts(logsumexp=logsumexp, entropy=own, target_logit=chosen, columns=tile.columns)


def launch_gluon_dlogits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, upstream: Upstream,
    buffer: Tensor, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The backward's kernel on one slice; see `_triton_fused.launch_dlogits`, which takes what the copy
    engine cannot read."""
    if not uses_descriptors(hidden, weight):
        return launch_dlogits(hidden, weight, bias, targets, head, upstream, buffer)
    tile = tile or gluon_tile(GLUON_DLOGITS, bias, head)
    out = fused_slice(buffer, hidden.shape[0], weight.shape[0])[:, : weight.shape[0]]
    known, c = upstream.logsumexp, upstream.coefficient
    has_entropy, entropy, entropy_coefficient = upstream.entropy_arguments()
    rows, factors = (targets, known, entropy, c, c, entropy_coefficient), (*kernel_factors(head), head.factor)
    _launch(hidden, weight, out, bias, rows, factors, head, tile, ENTROPY=has_entropy, FLIPPED=False)
    return out


GLUON = FUSED._replace(stats=launch_gluon_stats, dlogits=launch_gluon_dlogits)
