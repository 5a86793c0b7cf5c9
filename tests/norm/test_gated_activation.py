"""``gated_activation``."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.norm.gated_activation import cases
from tilefuse.testing.inputs.norm.rms_norm import normal, run

case = by_name(cases)
KERNEL = "gated_activation_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
# the two 16-bit types differ in the conversion only: one of them meets every case
CASES_AND_DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or name in ("silu", "interleaved", "views")
]


def eager(gate, up=None, activation="silu", alpha=1.702, limit=0.0, layout="split"):
    """As models write it, in the dtype of the operands."""
    if up is None:
        gate, up = (gate[..., ::2], gate[..., 1::2]) if layout == "interleaved" else gate.chunk(2, -1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x).square(),
    }
    return act[activation](gate) * up


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    tensors, options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        for a, b in zip(run(tilefuse.gated_activation, tensors, options), run(eager, tensors, options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_activation
def test_gradcheck(activation):
    leaves = [normal(3, 5, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1)]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *x: tilefuse.gated_activation(*x, activation=activation), leaves, fast_mode=True
        )


@pytest.mark.parametrize(("name", "dtype"), CASES_AND_DTYPES, ids=str)
def test_matches_oracle(name, dtype, device):
    tensors, options = case(name, device, dtype)
    with poisoned():
        found = run(tilefuse.gated_activation, tensors, options)
    with tilefuse.backend("reference"):
        exact = run(tilefuse.gated_activation, tensors, options, torch.float64)
    for a, b, c in zip(found, exact, run(eager, tensors, options), strict=True):
        assert a.dtype == c.dtype and a.shape == c.shape and a.is_contiguous()
        assert_close(a, b, c, name=name)


@each_activation
def test_layouts_and_separate_tensors_have_the_same_bits(activation, device):
    gate, up = (normal(5, 70, seed=seed).to(device, torch.bfloat16) for seed in (0, 1))
    options = {"activation": activation} | ({"limit": 1.0} if activation in ("silu", "swiglu_oai") else {})
    out, dgate, dup = run(tilefuse.gated_activation, (gate, up), options)
    split, dsplit = run(tilefuse.gated_activation, (torch.cat((gate, up), -1), None), options)
    turns = torch.stack((gate, up), -1).flatten(-2)
    interleaved, dturns = run(tilefuse.gated_activation, (turns, None), options | {"layout": "interleaved"})
    assert_bit_equal(split, out)
    assert_bit_equal(interleaved, out)
    assert_bit_equal(dsplit, torch.cat((dgate, dup), -1))
    assert_bit_equal(dturns, torch.stack((dgate, dup), -1).flatten(-2))


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_the_gradient_passes_at_the_boundary_of_a_clamp(activation, device):
    gate = torch.tensor([1.9, 2.0, 2.1, -5.0, 0.5, 0.5, 0.5, 0.5], device=device)
    up = torch.tensor([0.3, 0.3, 0.3, 0.3, 2.0, -2.0, 2.1, -2.1], device=device)
    options = {"activation": activation, "limit": 2.0}
    for a, b in zip(run(tilefuse.gated_activation, (gate, up), options), run(eager, (gate, up), options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert_bit_equal(a == 0, b == 0)


@each_activation
def test_nan_stays_in_its_element_and_far_values_are_right(activation, device):
    values = [0.0, -0.0, math.nan, 1.0, 88.0, -88.0, 200.0, -200.0, 3e20, -3e20, 1e-40]
    gate = torch.tensor(values, device=device)
    up = torch.ones_like(gate)
    options = {"activation": activation}
    out, dgate, dup = run(tilefuse.gated_activation, (gate, up), options)
    with tilefuse.backend("reference"):
        exact = run(tilefuse.gated_activation, (gate, up), options, torch.float64)
    for a, b in zip((out, dgate, dup), exact):
        torch.testing.assert_close(a, b.float(), rtol=2e-5, atol=1e-6, equal_nan=True)
        assert a.isnan().tolist() == [math.isnan(v) for v in values]


def test_infinite_gates_are_those_of_torch(device):
    gate = torch.tensor([-math.inf, math.inf], device=device)
    out = tilefuse.gated_activation(gate, torch.ones_like(gate))
    assert out[0].isnan() and out[1] == math.inf
    assert_bit_equal(out, F.silu(gate))


@pytest.mark.parametrize("needed", [c for n in (1, 2) for c in itertools.combinations(range(2), n)], ids=str)
def test_frozen_arguments(needed, device):
    tensors, options = case("silu", device)
    out, *everything = run(tilefuse.gated_activation, tensors, options)
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    again = tilefuse.gated_activation(*leaves, **options)
    upstream = normal(*out.shape, seed=7).to(device)
    for _ in range(2):
        # a second backward finds gate and up as they were
        grads = torch.autograd.grad(again, [leaves[i] for i in needed], upstream, retain_graph=True)
        for i, grad in zip(needed, grads):
            assert_bit_equal(grad, everything[i])


@pytest.mark.cpu_library
def test_large_outputs_are_whole():
    """Above 2 MiB results are written past the caches; threads change no bit."""
    gate_up = normal(600, 2 * 2003).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"), poisoned():
                found.append(run(tilefuse.gated_activation, (gate_up, None), {}))
    finally:
        torch.set_num_threads(before)
    with tilefuse.backend("cpu"):
        few = tilefuse.gated_activation(gate_up[:7])
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any()
        assert_bit_equal(a, b)
    assert_bit_equal(found[0][0][:7], few)


def test_rows_are_independent(device):
    tensors, options = case("gelu_tanh", device, torch.bfloat16)
    out, dgate, _ = run(tilefuse.gated_activation, tensors, options)
    assert_bit_equal(tilefuse.gated_activation(*(t[2:4] for t in tensors), **options), out[2:4])
    assert_bit_equal(run(tilefuse.gated_activation, tensors, options)[1], dgate)


def test_offsets_past_int32(device):
    """Rows 2**30 elements apart, at a stride that fits int32. Untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    storage = torch.empty(2**31 + 130, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 64), (2**30 + 1, 1))
    far.copy_(normal(3, 64))
    for a, b in zip(*(run(tilefuse.gated_activation, (x, None), {}) for x in (far, far.contiguous()))):
        assert_bit_equal(a, b)


def test_second_derivatives_are_refused():
    gate = normal(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(tilefuse.gated_activation(gate).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        (grad.sum() + gate.square().sum()).backward()


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((torch.zeros(()), None), {}, ValueError, r"gate must be \[..., D\] with D >= 1"),
        ((X[:, 1:], None), {}, ValueError, r"gate must be \[..., 2I\], an even last dim, without up, got \[4, 7\]"),
        ((X.int(), None), {}, TypeError, "gate must be float32 or"),
        ((X, X[1:]), {}, ValueError, r"up must be of gate's shape \[4, 8\], got \[3, 8\] float32"),
        ((X, X.half()), {}, TypeError, "up must be of gate's dtype float32"),
        ((X, X.to("meta")), {}, ValueError, "up must be on the device of gate"),
        ((X, X), {"activation": "swish"}, ValueError, "activation must be 'silu' or .*, got 'swish'"),
        ((X, X), {"limit": -1.0}, ValueError, "limit must be at least 0, got -1.0"),
        ((X, X), {"limit": math.nan}, ValueError, "limit must be at least 0, got nan"),
        ((X, X), {"limit": 1.0, "activation": "gelu"}, ValueError, "limit must be 0 with 'gelu', got 1.0"),
        ((X, None), {"layout": "mixed"}, ValueError, "layout must be 'split' or 'interleaved', got 'mixed'"),
        ((X, X), {"layout": "interleaved"}, ValueError, "layout must be 'split' where up is given"),
    ],
)
def test_errors(args, options, error, message):
    for call in (tilefuse.gated_activation, torch.ops.tilefuse.gated_activation):
        with pytest.raises(error, match=f"^tilefuse.gated_activation: {message}"):
            call(*args, **options)
