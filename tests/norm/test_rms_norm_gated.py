"""``rms_norm_gated``."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.norm.rms_norm import normal, run
from tilefuse.testing.inputs.norm.rms_norm_gated import cases

case = by_name(cases)
KERNEL = "rms_norm_gated_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
# the two 16-bit types differ in the conversion only: one of them meets every case
CASES_AND_DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or name in ("rows", "rows_other_order")
]
each_order = pytest.mark.parametrize("norm_first", [True, False])


def eager(x, gate, weight=None, eps=1e-6, norm_first=True):
    """As Qwen3-Next's and Mamba 2's models write it: in float32, rounded at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    activated = F.silu(gate.to(wide))
    value = x.to(wide) if norm_first else x.to(wide) * activated
    y = value * (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(wide)
    return (y * activated if norm_first else y).to(x.dtype)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    tensors, options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        for a, b in zip(run(tilefuse.rms_norm_gated, tensors, options), run(eager, tensors, options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@each_order
def test_gradcheck(norm_first):
    leaves = [
        normal(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate([(3, 6)] * 2 + [(6,)])
    ]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *x: tilefuse.rms_norm_gated(*x, norm_first=norm_first), leaves, fast_mode=True
        )


@pytest.mark.parametrize(("name", "dtype"), CASES_AND_DTYPES, ids=str)
def test_matches_oracle(name, dtype, device):
    tensors, options = case(name, device, dtype)
    with poisoned():
        found = run(tilefuse.rms_norm_gated, tensors, options)
    with tilefuse.backend("reference"):
        exact = run(tilefuse.rms_norm_gated, tensors, options, torch.float64)
    for a, b, c in zip(found, exact, run(eager, tensors, options), strict=True):
        assert a.dtype == c.dtype and a.is_contiguous()
        assert_close(a, b, c, name=name)


@each_order
def test_long_rows(norm_first, device):
    """Longer than a Triton program's block."""
    tensors = [normal(2, 4099, seed=seed).to(device, torch.bfloat16) for seed in (0, 1)]
    tensors.append(normal(4099, seed=2).to(device))
    options = {"norm_first": norm_first, "eps": 0.1}
    found = run(tilefuse.rms_norm_gated, tensors, options)
    exact = run(eager, tensors, options, torch.float64)
    for a, b, c in zip(found, exact, run(eager, tensors, options), strict=True):
        assert_close(a, b, c)


@each_order
def test_huge_rows(norm_first, device):
    values = torch.tensor([1.0, -0.5, 0.25, 1.0] * 20)
    gate, weight = normal(2, 80, seed=1).to(device), torch.ones(80, device=device)
    x = torch.stack((values * 1e30, values)).to(device)
    y, _, dgate, dweight = run(tilefuse.rms_norm_gated, (x, gate, weight), {"norm_first": norm_first})
    small = torch.stack((values, values)).to(device)
    expected = run(tilefuse.rms_norm_gated, (small, gate, weight), {"norm_first": norm_first, "eps": 1e-30})
    for a, b in zip((y, dweight), (expected[0], expected[3])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dgate[1], expected[2][1], rtol=1e-4, atol=1e-4)
    assert dgate.isfinite().all()


@each_order
def test_nan_stays_in_its_row(norm_first, device):
    (x, gate, weight), _ = case("rows", device)
    clean = run(tilefuse.rms_norm_gated, (x, gate, weight), {"norm_first": norm_first})[:3]
    broken = [x.clone(), gate.clone()]
    broken[0][1, 5] = broken[1][4, 7] = float("nan")
    for a, b in zip(run(tilefuse.rms_norm_gated, (*broken, weight), {"norm_first": norm_first}), clean):
        assert a[1].isnan().any() and a[4].isnan().any()
        a, b = a.detach().clone(), b.detach()
        a[[1, 4]] = b[[1, 4]]
        assert_bit_equal(a, b)


@pytest.mark.parametrize("needed", [c for n in (1, 2) for c in itertools.combinations(range(3), n)], ids=str)
def test_frozen_arguments(needed, device):
    tensors, options = case("rows", device)
    out, *everything = run(tilefuse.rms_norm_gated, tensors, options)
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    again = tilefuse.rms_norm_gated(*leaves, **options)
    upstream = normal(*out.shape, seed=7).to(device)
    for i, grad in zip(needed, torch.autograd.grad(again, [leaves[i] for i in needed], upstream)):
        assert_bit_equal(grad, everything[i])


@pytest.mark.cpu_library
@each_order
def test_large_outputs_are_whole_and_threads_change_no_bit(norm_first):
    """Above 2 MiB rows are written past the caches."""
    tensors = [normal(1100, 999, seed=i).bfloat16() for i in (0, 1)] + [normal(999, seed=2)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"), poisoned():
                found.append(run(tilefuse.rms_norm_gated, tensors, {"norm_first": norm_first}))
    finally:
        torch.set_num_threads(before)
    with tilefuse.backend("cpu"):
        few = tilefuse.rms_norm_gated(*(t[:7] for t in tensors[:2]), tensors[2], norm_first=norm_first)
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any()
        assert_bit_equal(a, b)
    assert_bit_equal(found[0][0][:7], few)


def test_rows_are_independent(device):
    (x, gate, weight), options = case("spans", device, torch.bfloat16)
    first = run(tilefuse.rms_norm_gated, (x, gate, weight), options)
    for a, b in zip(first, run(tilefuse.rms_norm_gated, (x, gate, weight), options)):
        assert_bit_equal(a, b)
    assert_bit_equal(tilefuse.rms_norm_gated(x[40:43], gate[40:43], weight, **options), first[0][40:43])


def test_second_derivatives_are_refused():
    x = normal(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(tilefuse.rms_norm_gated(x, x.detach()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        (grad.sum() + x.square().sum()).backward()


X, W = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x must be \[..., D\] with D >= 1, got \[\] float32"),
        ({"x": X.int()}, TypeError, "x must be float32 or"),
        ({"gate": X[:, 1:]}, ValueError, r"gate must be of x's shape \[4, 8\], got \[4, 7\] float32"),
        ({"gate": X.half()}, TypeError, "gate must be of x's dtype float32, got"),
        ({"gate": X.to("meta")}, ValueError, "gate must be on the device of x"),
        ({"weight": W[1:]}, ValueError, r"weight must be \[8\], got \[7\] float32"),
        ({"weight": W.int()}, TypeError, "weight must be float32 or"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_errors(change, error, message):
    for call in (tilefuse.rms_norm_gated, torch.ops.tilefuse.rms_norm_gated):
        with pytest.raises(error, match=f"^tilefuse.rms_norm_gated: {message}"):
            call(**{"x": X, "gate": X, "weight": W} | change)
