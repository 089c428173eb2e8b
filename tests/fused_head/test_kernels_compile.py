"""The registered operators under fake tensors and torch.compile."""

import pytest
import torch
from kernel_oracle import leaves, problem
from torch._subclasses.fake_tensor import FakeTensorMode

from agro_kernels import linear_agro_loss, linear_logprobs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entropy", (False, True))
def test_operators_are_registered_rightly(entropy):
    given = problem(12, 8, 40)
    none = torch.ops.agro_kernels
    inputs = (given.hidden, given.weight, given.bias, given.targets)
    options = ((0.7, 1.0, 0.0), (0, 40, -100))
    checks = ("test_schema", "test_faketensor")
    for tiles in (False, True):
        wants = (entropy, tiles, not tiles, "chunked")
        torch.library.opcheck(none.head_stats, (*inputs, *options, *wants), test_utils=checks)
    row = torch.randn(12)
    rows = (row, given.coefficients, row if entropy else None, row if entropy else None, None)
    grads = (*inputs, *options, *rows, (True, True, True), (False, entropy), "chunked")
    torch.library.opcheck(none.head_grads, grads, test_utils=checks)
    torch.library.opcheck(none.target_logits, (*inputs, *options), test_utils=checks)
    groups = (torch.arange(12) % 4, row, torch.randn(4), torch.tensor([0, 0, 1, 1]), (0.1, 0.5, 0.0))
    torch.library.opcheck(
        none.agro_coefficients, (row, given.targets, *groups, -100, "chunked"), test_utils=checks
    )


def test_fake_tensors_give_shapes_and_take_no_memory():
    rows, width, columns = 1 << 16, 8192, 1 << 18
    with FakeTensorMode():
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(columns, width, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.long)
        out = linear_logprobs(hidden, weight, targets, entropy=True, backend="chunked")
        assert out.entropy is not None
        (out.logprobs.sum() + out.entropy.sum()).backward()
        loss = linear_agro_loss(
            hidden,
            weight,
            targets,
            targets,
            torch.zeros(rows),
            torch.zeros(8),
            torch.zeros(8, dtype=torch.long),
            beta=0.1,
            backend="chunked",
        )
        loss.loss.backward()
    assert out.logprobs.shape == (rows,) and out.logprobs.dtype == torch.float32
    assert weight.grad is not None and weight.grad.shape == (columns, width)
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
def test_torch_compile():
    given = problem(30, 16, 70)

    def value(hidden, weight, bias, temperature):
        out = linear_logprobs(hidden, weight, given.targets, bias=bias, entropy=True, temperature=temperature)
        assert out.entropy is not None
        return (given.coefficients * out.logprobs).sum() + 0.1 * out.entropy.sum()

    eager, compiled = leaves(given), leaves(given)
    expected = value(*eager, 0.7)
    expected.backward()
    actual = torch.compile(value, backend="aot_eager", fullgraph=True)(*compiled, 0.7)
    assert actual.dtype == torch.float32  # a Python float must not turn it into fp64
    actual.backward()
    assert torch.equal(actual, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_of_the_loss():
    given = problem(32, 16, 70)
    ids, groups = torch.arange(32) // 8, torch.tensor([0, 0, 1, 1])
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])

    def value(hidden, weight):
        return linear_agro_loss(
            hidden, weight, given.targets, ids, torch.zeros(32), rewards, groups, beta=0.1
        ).loss

    eager, compiled = leaves(given), leaves(given)
    value(eager[0], eager[1]).backward()
    torch.compile(value, backend="aot_eager", fullgraph=True)(compiled[0], compiled[1]).backward()
    assert torch.equal(eager[0].grad, compiled[0].grad) and torch.equal(eager[1].grad, compiled[1].grad)
