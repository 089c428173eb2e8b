"""What the fused kernels share: which tile comes next, and the logits of one tile."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_place(tile, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row and column block of a tile, when GROUP row blocks are swept together over the columns."""
    in_group = GROUP * column_blocks
    group = tile // in_group
    first = group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return first + (tile % in_group) % height, (tile % in_group) // height


@triton.jit
def load_tile(
    source,
    row,
    column,
    row_count,
    column_count,
    stride,
    DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A (ROWS, COLUMNS) tile of a row-major matrix, zeros past its edges."""
    if DESCRIPTOR:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
        # N * H and V * H pass 2^31.
        tile = tl.load(
            source + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0
        )
    return tile


@triton.jit
def products_tile(
    hidden,
    weight,
    row,
    column,
    row_count,
    column_count,
    hidden_stride,
    weight_stride,
    H: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """X Wᵀ of one tile, in fp32. (ROWS, COLUMNS)"""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, H, DEPTH):
        x = load_tile(hidden, row, step, row_count, H, hidden_stride, DESCRIPTOR, ROWS, DEPTH)
        w = load_tile(weight, column, step, column_count, H, weight_stride, DESCRIPTOR, COLUMNS, DEPTH)
        total = tl.dot(x, w.T, total, input_precision="ieee")
    return total


@triton.jit
def tanh(x):
    """tanh without overflow, from exp(-2|x|)."""
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def logits_tile(
    products,
    bias,
    column,
    column_count,
    inner,
    outer,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From X Wᵀ to logits in units of log 2.

    Without softcap z = outer * u; with it z = outer * tanh(inner * u); outer carries 1 / log 2.
    """
    if BIAS:
        columns = column + tl.arange(0, COLUMNS)
        products += tl.load(bias + columns, mask=columns < column_count, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        products = tanh(products * inner)
    return products * outer


def uses_descriptors(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can read both: unit column strides, 16-byte aligned rows and starts."""
    return all(
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.shape[0] > 0
        for matrix in (hidden, weight)
    )


def matrix_argument(matrix: Tensor, block: list[int], descriptor: bool) -> TensorDescriptor | Tensor:
    """The tensor, or its host-built descriptor: device-built ones fail in autograd's threads."""
    if not descriptor:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block)


def row_major(matrix: Tensor) -> Tensor:
    """The matrix with unit column stride and separate rows, copied where it has not."""
    good = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if good else matrix.contiguous()
