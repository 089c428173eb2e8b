"""The Gluon kernels without a device: their source run by an emulator, against the naive form in fp64."""

import random

import pytest
import torch
from kernel_oracle import leaves, naive, problem, relative_error
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from gluon_emulator import Deadlock, Device, EmulatedKernel, Matrix, Pointer, Race, emulated

from agro_kernels import _gluon_fused, _linear_logprobs, _tiles, linear_logprobs
from agro_kernels._head import Head, Upstream, combined_entropy
from agro_kernels._slices import fused_buffer
from agro_kernels._triton_epilogue import kernel_factors
from bench._offline_device import offline_device

TILE = {"rows": 16, "columns": 16, "depth": 16, "slots": 3, "group": 2}
SHAPES = [(40, 48, 70), (7, 8, 5), (1, 16, 16), (33, 104, 17), (16, 40, 64), (100, 24, 33)]
"""(N, H, V): below one tile, whole tiles, and ragged at each edge; fewer steps a tile than slots, more."""
HEADS = {
    "plain": Head(),
    "scaled": Head(temperature=0.7, logit_scale=1.3),
    "flipped": Head(logit_scale=-0.8),
    "softcap": Head(softcap=2.0, temperature=0.6, logit_scale=-1.5),
}


def padded(tensor: Tensor) -> Tensor:
    """The same matrix in rows of whole 16 bytes, as the copy engine wants them."""
    rows, columns = tensor.shape
    return tensor.new_zeros(rows, -(-columns // 8) * 8)[:, :columns].copy_(tensor)


def matrices(given, tile) -> list[Matrix]:
    """hidden and weight as both kernels take them."""
    boxes = (given.hidden, tile["rows"] // 2), (given.weight, tile["columns"])
    return [Matrix(padded(matrix), [rows, tile["depth"]]) for matrix, rows in boxes]


def sizes(given, tile) -> tuple[int, int, int, int]:
    return (*given.hidden.shape[:1], *given.weight.shape, tile["group"])


def flags(head: Head, bias: bool, entropy: bool, tile) -> dict:
    """What both kernels are specialised on."""
    return {"SLOTS": tile["slots"], "BIAS": bias, "SOFTCAP": head.softcap != 0, "ENTROPY": entropy}


def run(given: tuple, constants: dict, *, seed=0, programs=2, edits=None) -> None:
    device = Device(seed)
    device.program_count = programs
    function = emulated(_gluon_fused.gluon_kernel, device, edits)
    for device.program in range(programs):
        function(*given, **constants)


def stats(given, head=HEADS["plain"], bias=True, entropy=True, tile=TILE, **how):
    """Tile logsumexp and entropy, and target logits, of the emulated forward."""
    tiles = torch.full((2, -(-given.weight.shape[0] // tile["columns"]), given.hidden.shape[0]), torch.nan)
    chosen = torch.full(given.hidden.shape[:1], torch.nan)
    arrays = [given.bias, given.targets, tiles[0], tiles[1], chosen, chosen, chosen]
    inner, outer = kernel_factors(head)
    constants = flags(head, bias, entropy, tile) | {"FLIPPED": outer < 0, "BACKWARD": False}
    left, right = matrices(given, tile)
    numbers = (*sizes(given, tile), inner, abs(outer), head.factor)
    run((left, right, left, *map(Pointer, arrays), *numbers), constants, **how)
    return tiles[0], tiles[1], chosen


def dlogits(given, upstream: Upstream, head=HEADS["plain"], bias=True, tile=TILE, **how) -> Tensor:
    """dL/du of the emulated backward."""
    out = padded(given.hidden.new_zeros(given.hidden.shape[0], given.weight.shape[0])).fill_(torch.nan)
    wanted, entropy, entropy_coefficient = upstream.entropy_arguments()
    c = upstream.coefficient
    arrays = [given.bias, given.targets, upstream.logsumexp, entropy, c, c, entropy_coefficient]
    constants = flags(head, bias, wanted, tile) | {"FLIPPED": False, "BACKWARD": True}
    numbers = (*sizes(given, tile), *kernel_factors(head), head.factor)
    boxes = (*matrices(given, tile), Matrix(out, [tile["rows"] // 2, tile["columns"]]))
    run((*boxes, *map(Pointer, arrays), *numbers), constants, **how)
    return out


def exact(given, head: Head, bias: bool):
    """Log-probs, logsumexp, entropy in fp64, and a leaf u whose gradient is dL/du."""
    hidden, weight, offset = leaves(given, torch.float64)
    products = (hidden @ weight.T + (offset if bias else 0.0)).detach().requires_grad_()
    one = torch.eye(products.shape[1], dtype=torch.float64)
    options = {
        "temperature": head.temperature,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap or None,
    }
    return products, naive(products, one, given.targets, **options)


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_forward_and_backward(dtype, head, bias):
    for seed, shape in enumerate(SHAPES):
        given = problem(*shape, dtype=dtype, seed=seed)
        tile_logsumexp, tile_entropy, chosen = stats(given, head, bias, seed=seed)
        products, (logprobs, logsumexp, entropy) = exact(given, head, bias)
        actual_logsumexp = torch.logsumexp(tile_logsumexp, 0)
        actual_entropy = combined_entropy(tile_entropy, tile_logsumexp, actual_logsumexp).sum(0)
        active = given.targets != -100
        torch.testing.assert_close(
            (chosen - actual_logsumexp)[active], logprobs[active].float(), rtol=1e-5, atol=2e-5
        )
        torch.testing.assert_close(actual_logsumexp[active], logsumexp[active].float(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(actual_entropy[active], entropy[active].float(), rtol=1e-5, atol=2e-5)
        assert chosen[~active].isnan().all()  # no tile owns such a target, so its place is left alone
        c, e = given.coefficients * active, given.entropy_coefficients * active
        (c * logprobs + e * entropy).sum().backward()
        assert products.grad is not None
        upstream = Upstream(
            logsumexp=actual_logsumexp, coefficient=c, entropy=actual_entropy, entropy_coefficient=e
        )
        actual = dlogits(given, upstream, head, bias, seed=seed)
        torch.testing.assert_close(actual.double(), products.grad, rtol=torch.finfo(dtype).eps, atol=2e-5)
        assert products.grad.abs().max() > 0.01, "the check cannot fail"


def test_rows_that_cannot_be_normal():
    """Columns masked by a bias of -inf, a whole tile of them, logits far below 0, and targets nobody owns."""
    given = problem(20, 16, 50, dtype=torch.bfloat16)
    given.bias[16:32] = given.bias[40] = -torch.inf
    given.bias[0] = -1000.0
    given.targets.remainder_(16)
    given.targets[:5] = torch.tensor([50, 1 << 40, -1, 20, 0])
    tile_logsumexp, tile_entropy, chosen = stats(given)
    assert (tile_logsumexp[1] == -torch.inf).all() and (tile_entropy[1] == 0).all()
    assert chosen[:3].isnan().all() and chosen[3] == -torch.inf and -1010 < chosen[4] < -990
    logits = given.hidden.double() @ given.weight.double().T + given.bias.double()
    logsumexp = torch.logsumexp(tile_logsumexp, 0)
    torch.testing.assert_close(logsumexp, torch.logsumexp(logits, 1).float())
    entropy = combined_entropy(tile_entropy, tile_logsumexp, logsumexp).sum(0)
    upstream = Upstream(
        logsumexp=logsumexp, coefficient=given.coefficients, entropy=entropy,
        entropy_coefficient=given.entropy_coefficients,
    )  # fmt: skip
    gradient = dlogits(given, upstream)
    assert gradient.isfinite().all() and (gradient[:, 16:32][4:] == 0).all()


@pytest.mark.parametrize("tile", ("GLUON_STATS", "GLUON_NARROW"))
def test_the_launched_tiles(tile):
    chosen = getattr(_tiles, tile)
    shape = {name: getattr(chosen, name) for name in ("rows", "columns", "depth", "group")}
    given = problem(300, 136, 700, dtype=torch.bfloat16)
    tile_logsumexp, _, target = stats(given, bias=False, tile=shape | {"slots": chosen.stages})
    _, (logprobs, logsumexp, _) = exact(given, HEADS["plain"], bias=False)
    active = given.targets != -100
    actual = torch.logsumexp(tile_logsumexp, 0)
    torch.testing.assert_close(actual[active], logsumexp[active].float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close((target - actual)[active], logprobs[active].float(), rtol=1e-5, atol=2e-5)


def test_the_schedule_over_ragged_shapes():
    """Every tile is made once, whoever runs ahead: any number of rows, columns, steps, slots, row blocks
    swept together, and programs, more than tiles too."""
    pick = random.Random(0)
    for seed in range(150):
        tile = {
            "rows": 16,
            "columns": 16,
            "depth": 16,
            "slots": pick.randint(2, 5),
            "group": pick.randint(1, 4),
        }
        given = problem(pick.randint(1, 90), 8 * pick.randint(1, 9), pick.randint(1, 90), torch.float16, seed)
        programs = pick.randint(1, 40)
        tile_logsumexp, _, _ = stats(
            given, bias=False, entropy=False, tile=tile, seed=seed, programs=programs
        )
        logits = given.hidden.double() @ given.weight.double().T
        right = torch.stack([torch.logsumexp(part, 1) for part in logits.split(16, 1)]).float()
        torch.testing.assert_close(tile_logsumexp, right, rtol=1e-5, atol=2e-5)
        upstream = Upstream(logsumexp=torch.logsumexp(tile_logsumexp, 0), coefficient=given.coefficients)
        out = dlogits(given, upstream, bias=False, tile=tile, seed=seed, programs=programs)
        assert out.isfinite().all()


MISTAKES = {
    "the producer waits for the wrong round": ("load_tiles", "parity ^ 1", "parity"),
    "the round's parity follows the step": ("slot_of", "(step // SLOTS) & 1", "step & 1"),
    "a slot is handed back while it is read": ("products_of", "empty.index(before), count=1, pred=depth > 0",
                                               "empty.index(slot), count=1, pred=depth > 0"),
    "a slot is handed back at once": ("products_of", "pred=depth > 0", "pred=True"),
    "products are not waited for": ("products_of", "num_outstanding=1", "num_outstanding=2"),
    "the last slot is kept": ("products_of", "mbarrier.arrive(empty.index(before), count=1)\n", "pass\n"),
    "one consumer frees a slot": ("open_ring", "count=2", "count=1"),
    "too few bytes are announced": ("load_tiles", "2 * ROWS + COLUMNS", "ROWS + COLUMNS"),
    "too many bytes are announced": ("load_tiles", "2 * ROWS + COLUMNS", "4 * ROWS + COLUMNS"),
    "both halves are the same": ("load_tiles", "(2 * row_block + half)", "(2 * row_block)"),
    "steps start anew in each tile": ("finish_tiles", "total, step = products_of(HALF, ring, step,",
                                      "total, _ = products_of(HALF, ring, 0,"),
    "a row block is counted twice": ("tile_place", "first + (tile % in_group) % height",
                                     "(tile % in_group) % height"),
    "a stage is overwritten": ("finish_tiles", "tma.store_wait(pendings=0)  #", "#"),
    "the copy engine sees old data": ("finish_tiles", "hopper.fence_async_shared()", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_sees(mistake):
    """Each mistake, made in the kernel's source, ends in a deadlock, a race or wrong numbers."""
    name, old, new = MISTAKES[mistake]
    given = problem(70, 72, 70, dtype=torch.float16)
    logsumexp = torch.logsumexp(given.hidden.double() @ given.weight.double().T, 1).float()
    upstream = Upstream(logsumexp=logsumexp, coefficient=given.coefficients)
    right = dlogits(given, upstream, bias=False)
    seen = 0
    for seed in range(5):
        try:
            out = dlogits(given, upstream, bias=False, seed=seed, edits={name: (old, new)})
        except (Deadlock, Race):
            seen += 1
        else:
            seen += not torch.equal(out, right)
    assert seen == 5, f"seen in {seen} of 5 runs"


@pytest.fixture
def on_the_emulator(monkeypatch):
    """backend="gluon" runs here: its kernel is emulated, and no check of the device is made."""
    monkeypatch.setattr(_gluon_fused, "gluon_kernel", EmulatedKernel(_gluon_fused.gluon_kernel))
    monkeypatch.setattr(_linear_logprobs, "choose_backend", lambda backend, *_: backend)
    with offline_device():  # whose number of multiprocessors the launchers ask for
        yield


@pytest.mark.parametrize("dropped_mass", (0.0, 0.05))
@pytest.mark.parametrize("head", HEADS)
def test_through_the_door(on_the_emulator, head, dropped_mass):
    """Everything from the public function to the kernel's arguments, slices and padded rows included."""
    options = {name: getattr(HEADS[head], name) for name in ("temperature", "logit_scale")}
    options["softcap"] = HEADS[head].softcap or None
    given = problem(150, 72, 1333, dtype=torch.bfloat16)
    hidden, weight, bias = leaves(given)
    more = {"bias": bias, "entropy": True} if dropped_mass == 0 else {"dropped_mass": dropped_mass}
    out = linear_logprobs(hidden, weight, given.targets, backend="gluon", **more, **options)
    exact_leaves = leaves(given, torch.float64)
    right = naive(*exact_leaves[:2], given.targets, exact_leaves[2] if "bias" in more else None, **options)
    torch.testing.assert_close(out.logprobs, right[0].float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.logsumexp[1:5], right[1][1:5].float(), rtol=1e-5, atol=1e-4)
    value, exact_value = (given.coefficients * out.logprobs).sum(), (given.coefficients * right[0]).sum()
    if out.entropy is not None:
        torch.testing.assert_close(out.entropy, right[2].float(), rtol=1e-5, atol=1e-4)
        value = value + (given.entropy_coefficients * out.entropy).sum()
        exact_value = exact_value + (given.entropy_coefficients * right[2]).sum()
    value.backward()
    exact_value.backward()
    for actual, wanted in zip((hidden, weight, bias), exact_leaves, strict=True):
        if actual.grad is not None and wanted.grad is not None:
            error = relative_error(actual.grad, wanted.grad)
            assert error < 1e-2 + 2 * dropped_mass and relative_error(0 * wanted.grad, wanted.grad) == 1


def test_one_form_is_launched_whatever_the_numbers():
    """Rows, columns, hidden size and group are not specialised on; a program a multiprocessor, or a tile."""
    with offline_device() as launches:
        for rows, width, columns in ((300, 1000, 50_257), (1, 64, 1024), (4096, 4096, 131_072)):
            hidden = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
            targets, row = (
                hidden.new_empty(rows, dtype=torch.int64),
                hidden.new_empty(rows, dtype=torch.float32),
            )
            given = hidden, hidden.new_empty(columns, width), None, targets, Head()
            _gluon_fused.launch_gluon_stats(*given, False, None)
            upstream, buffer = Upstream(logsumexp=row, coefficient=row), fused_buffer(hidden, rows, columns)
            out = _gluon_fused.launch_gluon_dlogits(*given, upstream, buffer)
            assert out.shape == (rows, columns) and out.stride(0) % 8 == 0
    assert [launch.grid[0] for launch in launches] == [132, 132, 4, 4, 132, 132]
    assert len({launch.cubin for launch in launches}) == 2


def test_what_the_copy_engine_cannot_read_goes_to_triton():
    hidden = torch.empty(40, 507, dtype=torch.bfloat16, device="meta")
    given = hidden, hidden.new_empty(900, 507), None, hidden.new_empty(40, dtype=torch.int64), Head()
    row = hidden.new_empty(40, dtype=torch.float32)
    with offline_device() as launches:
        _gluon_fused.launch_gluon_stats(*given, False, None, None)
        upstream = Upstream(logsumexp=row, coefficient=row)
        _gluon_fused.launch_gluon_dlogits(*given, upstream, fused_buffer(hidden, 40, 900))
    assert [launch.name for launch in launches] == ["stats_kernel", "dlogits_kernel"]
