"""Bad input of the public functions, autocast, and life without Triton."""

import subprocess
import sys
import warnings

import pytest
import torch
from kernel_oracle import naive, problem

from agro_kernels import _backends, linear_logprobs, linear_logprobs_known


def call(hidden=None, weight=None, targets=None, **options):
    given = problem(6, 8, 20)
    hidden = given.hidden if hidden is None else hidden
    weight = given.weight if weight is None else weight
    return linear_logprobs(hidden, weight, given.targets if targets is None else targets, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.randn(2, 3, 8)}, r"hidden has shape \(2, 3, 8\); expected \(N, H\)"),
        ({"weight": torch.randn(20, 9)}, r"weight has shape \(20, 9\); expected \(V, H\) with H = 8"),
        ({"weight": torch.randn(0, 8)}, "at least one row"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"targets has shape \(5,\); expected \(6,\)"),
        ({"targets": torch.zeros(6)}, "targets has dtype torch.float32; expected integer"),
        ({"hidden": torch.zeros(6, 8, dtype=torch.long)}, "hidden has dtype torch.int64"),
        (
            {"weight": torch.randn(20, 8).bfloat16()},
            "weight has dtype torch.bfloat16 and hidden torch.float32",
        ),
        ({"bias": torch.randn(19)}, r"bias has shape \(19,\); expected \(20,\)"),
        ({"bias": torch.zeros(20, dtype=torch.long)}, "bias has dtype torch.int64"),
        ({"weight": torch.randn(20, 8, device="meta")}, "weight is on meta and hidden on cpu"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"dropped_mass": 1.0}, r"dropped_mass is 1.0; expected a probability mass in \[0, 1\)"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of"),
        ({"backend": "triton"}, "backend='triton' needs tensors on a GPU, but hidden is on cpu"),
        ({"backend": "gluon"}, "backend='gluon' needs tensors on a GPU, but hidden is on cpu"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_known_coefficients_check_their_rows():
    given = problem(6, 8, 20)
    with pytest.raises(ValueError, match=r"logsumexp has shape \(5,\); expected \(6,\)"):
        linear_logprobs_known(given.hidden, given.weight, given.targets, torch.zeros(5), given.coefficients)
    with pytest.raises(ValueError, match="coefficients has dtype torch.int64; expected float"):
        whole = given.coefficients.long()
        linear_logprobs_known(given.hidden, given.weight, given.targets, torch.zeros(6), whole)


def test_triton_refuses_fp64_and_says_when_it_is_missing(monkeypatch):
    given = problem(6, 8, 20)
    with pytest.raises(ValueError, match="not float64"):
        call(hidden=given.hidden.double(), weight=given.weight.double(), backend="triton")
    monkeypatch.setattr(_backends, "triton_available", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed; use backend='chunked' or 'auto'"):
        call(backend="triton")
    assert call(backend="auto").logprobs.shape == (6,)


def test_gluon_gives_way_where_it_cannot_run(monkeypatch):
    _backends.warn_once.cache_clear()
    meta = torch.empty(4, 8, device="meta", dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match=r"torch.float16 on 0.0 backend='triton' runs instead"):
        assert _backends.choose_backend("gluon", meta, meta) == "triton"
    from agro_kernels import _gluon_fused, _triton_fused

    assert _backends.launchers("gluon") is _gluon_fused.GLUON
    monkeypatch.setitem(sys.modules, "agro_kernels._gluon_fused", None)  # importing it is an ImportError
    with pytest.warns(RuntimeWarning, match="this triton lacks what backend='gluon' needs"):
        assert _backends.launchers("gluon") is _triton_fused.FUSED


def test_sizes_that_the_copy_engine_cannot_read_are_said_once(monkeypatch):
    monkeypatch.setattr(_backends, "interpreted", lambda: True)
    _backends.warn_once.cache_clear()
    meta = torch.empty(4, 507, device="meta", dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="hidden size 507 in torch.float16"):
        assert _backends.choose_backend("triton", meta, meta) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _backends.choose_backend("triton", meta, meta)


def test_dtensor_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.randn(20, 8), mesh, [Replicate()])
        with pytest.raises(TypeError, match="weight is a DTensor; .*register_fsdp_forward_method"):
            call(weight=weight)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_autocast_casts_as_linear_does_and_nothing_more(backend):
    given = problem(40, 16, 70)
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, weight, given.targets, backend=backend)
    assert out.logprobs.dtype == torch.float32
    rounded = given.hidden.bfloat16().double(), given.weight.bfloat16().double()
    # bf16 logits would be wrong by 1e-3; only the operands are rounded.
    torch.testing.assert_close(out.logprobs.double(), naive(*rounded, given.targets)[0], rtol=1e-5, atol=1e-5)
    (given.coefficients * out.logprobs).sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, agro_kernels as k\n"
        "out = k.linear_logprobs(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4]))\n"
        "print(tuple(out.logprobs.shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3,)"


def test_nothing_importable_is_called_kernels():
    from pathlib import Path

    root = Path(__file__).parents[2]
    assert not (root / "kernels" / "__init__.py").exists()
    assert not (root / "tests" / "kernels" / "__init__.py").exists()
