"""Triton: backend `triton`, matmul tiles whose logits never leave the registers, forward and backward.

Numbers that change between calls (rows, columns, hidden size, strides, group) are plain arguments that Triton
must not specialise on: each kernel then has one compiled form per tile and epilogue, which is the one that
`bench.sm90_report` compiles without a GPU.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from agro_kernels._head import Head, Parts, Upstream
from agro_kernels._slices import Launchers, fused_buffer, fused_shape, fused_slice
from agro_kernels._tiles import DLOGITS, FORWARD, Tile, choose_tile
from agro_kernels._triton_epilogue import (
    chosen_logits,
    gradient_tile,
    kernel_factors,
    levels,
    own_targets,
    row_stats,
    tanh,  # noqa: F401  (the compiler resolves kernels' callees here)
)

PLAIN = ["row_count", "column_count", "hidden_size", "hidden_stride", "weight_stride", "group"]


@triton.jit
def tile_place(tile, row_blocks, column_blocks, group):
    """Row and column block of a tile, when `group` row blocks are swept together over the columns."""
    in_group = group * column_blocks
    first = tile // in_group * group
    height = min(row_blocks - first, group)
    return first + (tile % in_group) % height, (tile % in_group) // height


@triton.jit
def load_tile(
    source, row, column, row_count, column_count, stride,
    DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile of a row-major matrix, zeros past its edges."""
    if DESCRIPTOR:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
        # N * H and V * H pass 2^31.
        place = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tile = tl.load(source + place, mask=inside, other=0.0)
    return tile


@triton.jit
def products_tile(
    hidden, weight, row, column, row_count, column_count, hidden_size, hidden_stride, weight_stride,
    DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """X Wᵀ of one tile, in fp32. (ROWS, COLUMNS)"""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, hidden_size, DEPTH):
        x = load_tile(hidden, row, step, row_count, hidden_size, hidden_stride, DESCRIPTOR, ROWS, DEPTH)
        w = load_tile(
            weight, column, step, column_count, hidden_size, weight_stride, DESCRIPTOR, COLUMNS, DEPTH
        )
        total = tl.dot(x, w.T, total, input_precision="ieee")
    return total  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def stats_kernel(
    hidden, weight, bias, targets, block_logsumexp, block_entropy, target_logit, row_count, column_count,
    hidden_size, hidden_stride, weight_stride, group, inner, outer,
    DESCRIPTOR: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """block_logsumexp and block_entropy are (column blocks, N); target_logit (N,) is written by its tile."""
    row_block, column_block = tile_place(
        tl.program_id(0), tl.cdiv(row_count, ROWS), tl.cdiv(column_count, COLUMNS), group
    )
    row, column = row_block * ROWS, column_block * COLUMNS
    products = products_tile(
        hidden, weight, row, column, row_count, column_count, hidden_size, hidden_stride, weight_stride,
        DESCRIPTOR, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    places = tl.arange(0, COLUMNS)
    level = levels(products, bias, column + places, column_count, inner, BIAS, SOFTCAP) * outer
    level = tl.where((column + places < column_count)[None, :], level, -float("inf"))
    rows = row + tl.arange(0, ROWS)
    # The targets first: later the levels' registers are wanted for their exponentials.
    target = own_targets(targets, rows, row_count, column, column_count, COLUMNS)
    if tl.max(target, 0) >= 0:
        tl.store(target_logit + rows, chosen_logits(level, target, places, 1.0), mask=target >= 0)
    tile_logsumexp, tile_entropy = row_stats(level, 1.0, ENTROPY)
    out = column_block.to(tl.int64) * row_count + rows
    tl.store(block_logsumexp + out, tile_logsumexp, mask=rows < row_count)
    if ENTROPY:
        tl.store(block_entropy + out, tile_entropy, mask=rows < row_count)


@triton.jit(do_not_specialize=PLAIN)
def dlogits_kernel(
    hidden, weight, bias, targets, logsumexp, coefficient, entropy, entropy_coefficient, out, row_count,
    column_count, hidden_size, hidden_stride, weight_stride, out_stride, group, inner, outer, factor,
    DESCRIPTOR: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dL/du of gradient_tile in out's dtype, (N, out_stride); columns from column_count on are padding."""
    row_block, column_block = tile_place(
        tl.program_id(0), tl.cdiv(row_count, ROWS), tl.cdiv(column_count, COLUMNS), group
    )
    row, column = row_block * ROWS, column_block * COLUMNS
    products = products_tile(
        hidden, weight, row, column, row_count, column_count, hidden_size, hidden_stride, weight_stride,
        DESCRIPTOR, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    level = levels(products, bias, columns, column_count, inner, BIAS, SOFTCAP)
    target = own_targets(targets, rows, row_count, column, column_count, COLUMNS)
    grad = gradient_tile(
        level, target, tl.arange(0, COLUMNS), logsumexp, coefficient, entropy, entropy_coefficient, rows,
        row_count, outer, factor, SOFTCAP, ENTROPY,
    )  # fmt: skip
    place = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    # Up to the stride, a multiple of 16 that Triton knows of: a mask by column_count would allow it single
    # elements only.
    inside = (rows < row_count)[:, None] & (columns < out_stride)[None, :]
    tl.store(out + place, grad.to(out.dtype.element_ty), mask=inside)


def uses_descriptors(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can read both: unit column strides, 16-byte aligned rows and starts."""
    return all(
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.shape[0] > 0
        for matrix in (hidden, weight)
    )


def row_major(matrix: Tensor) -> Tensor:
    """The matrix with unit column stride and separate rows, copied where it has not."""
    good = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if good else matrix.contiguous()


def _matrices(hidden: Tensor, weight: Tensor, tile: Tile, descriptor: bool) -> tuple:
    """Both matrices, or their host-built descriptors: device-built ones fail in autograd's threads."""
    if not descriptor:
        return hidden, weight
    return tuple(
        TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [height, tile.depth])
        for matrix, height in ((hidden, tile.rows), (weight, tile.columns))
    )


def _tile_for(table: tuple[tuple[int, Tile], ...], hidden: Tensor, narrow: bool, descriptor: bool) -> Tile:
    interpreted = hidden.device.type == "cpu"
    return choose_tile(
        table, hidden.shape[1], hidden.dtype, narrow=narrow, descriptor=descriptor, interpreted=interpreted
    )


def launch_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool,
    most_columns: int | None, tile: Tile | None = None,
) -> Parts:  # fmt: skip
    """The forward kernel: see `_slices.Launchers`. Every tile is narrower than the sparse backward's, so
    most_columns asks for nothing; `tile` replaces the table's."""
    weight = row_major(weight)
    rows, columns = hidden.shape[0], weight.shape[0]
    descriptor = uses_descriptors(hidden, weight)
    tile = tile or _tile_for(FORWARD, hidden, head.softcap != 0, descriptor)
    blocks = -(-columns // tile.columns)
    logsumexp = torch.empty(blocks, rows, dtype=torch.float32, device=hidden.device)
    block_entropy = torch.empty_like(logsumexp) if entropy else None
    target_logit = torch.zeros(rows, dtype=torch.float32, device=hidden.device)
    inner, outer = kernel_factors(head)
    stats_kernel[(blocks * -(-rows // tile.rows),)](
        *_matrices(hidden, weight, tile, descriptor), target_logit if bias is None else bias, targets,
        logsumexp, logsumexp if block_entropy is None else block_entropy, target_logit, rows, columns,
        hidden.shape[1], hidden.stride(0), weight.stride(0), tile.group, inner, outer, DESCRIPTOR=descriptor,
        BIAS=bias is not None, SOFTCAP=head.softcap != 0, ENTROPY=entropy, ROWS=tile.rows,
        COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Parts(logsumexp=logsumexp, entropy=block_entropy, target_logit=target_logit, columns=tile.columns)


def launch_dlogits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, upstream: Upstream,
    buffer: Tensor, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The backward's kernel on one slice: see `_slices.Launchers`; `tile` replaces the table's."""
    rows, columns = hidden.shape[0], weight.shape[0]
    out = fused_slice(buffer, rows, columns)
    descriptor = uses_descriptors(hidden, weight)
    has_entropy, entropy, entropy_coefficient = upstream.entropy_arguments()
    tile = tile or _tile_for(DLOGITS, hidden, head.softcap != 0 or has_entropy, descriptor)
    inner, outer = kernel_factors(head)
    dlogits_kernel[(-(-rows // tile.rows) * -(-columns // tile.columns),)](
        *_matrices(hidden, weight, tile, descriptor), upstream.logsumexp if bias is None else bias, targets,
        upstream.logsumexp, upstream.coefficient, entropy, entropy_coefficient, out, rows, columns,
        hidden.shape[1], hidden.stride(0), weight.stride(0), out.stride(0), tile.group, inner, outer,
        head.factor, DESCRIPTOR=descriptor, BIAS=bias is not None, SOFTCAP=head.softcap != 0,
        ENTROPY=has_entropy, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out[:, :columns]


FUSED = Launchers(
    stats=launch_stats, dlogits=launch_dlogits, operand=row_major, slice_shape=fused_shape,
    buffer=fused_buffer,
)  # fmt: skip
