"""``fp8_linear``: forward, both backward products, what is saved, and how far from bfloat16 it is."""

import math

import pytest
import torch

import tilefuse
from tilefuse.reference.fp8.linear import fp8_linear_bwd, fp8_linear_fwd
from tilefuse.testing import assert_bit_equal, assert_close


def decibels(out, exact):
    """Signal to quantisation noise."""
    exact = exact.double()
    return 20 * math.log10(exact.norm() / (out.double() - exact).norm())


def run(x, weight, bias, grad, **options):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    out = tilefuse.fp8_linear(*leaves, **options)
    out.backward(grad)
    return out.detach(), *(None if t is None else t.grad for t in leaves)


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_forward_and_gradients(device, scale_format, tokens):
    """Against the float64 products of the quantised operands; M < 128 tokens in the weight gradient too."""
    x, weight, bias = torch.randn(tokens, 150), torch.randn(72, 150), torch.randn(72)
    grad, pow2 = torch.randn(tokens, 72), scale_format == "pow2"
    got = run(*(t.to(device) for t in (x, weight, bias, grad)), scale_format=scale_format)
    expected, naive = (
        (fp8_linear_fwd(x, weight, bias, pow2, dtype), *fp8_linear_bwd(grad, x, weight, pow2, dtype))
        for dtype in (torch.float64, torch.float32)
    )
    for out, oracle, plain in zip(got, expected, naive, strict=True):
        assert out.dtype == torch.float32
        assert_close(out.cpu(), oracle, plain)


def test_dtypes_and_leading_dims(device):
    x = torch.randn(2, 5, 150, dtype=torch.bfloat16, device=device)
    weight = torch.randn(70, 150, device=device)
    bias = torch.randn(70, dtype=torch.float16, device=device)
    out, dx, dw, db = run(x, weight, bias, torch.randn(2, 5, 70, device=device).bfloat16())
    assert (out.shape, out.dtype) == ((2, 5, 70), torch.bfloat16)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert (dw.shape, dw.dtype, db.dtype) == (weight.shape, torch.float32, torch.float16)
    assert_bit_equal(tilefuse.fp8_linear(x, weight, bias), out)
    flat = tilefuse.fp8_linear(x.flatten(0, 1), weight, bias)
    assert_bit_equal(flat.view(out.shape), out)


def test_19_close_to_bfloat16():
    """The bar is torchao's: at least 28 dB for the output and for both gradients."""
    x, weight, grad = torch.randn(256, 512), torch.randn(384, 512), torch.randn(256, 384)
    out, dx, dw, _ = run(x, weight, None, grad)
    for got, exact in ((out, x @ weight.t()), (dx, grad @ weight), (dw, grad.t() @ x)):
        assert decibels(got, exact) > 28


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_only_what_is_asked(needs):
    tensors = [torch.randn(s) for s in ((9, 130), (64, 130), (64,))]
    full = run(*tensors, torch.ones(9, 64))
    leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    tilefuse.fp8_linear(*leaves).sum().backward()
    for leaf, need, expected in zip(leaves, needs, full[1:], strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_bit_equal(leaf.grad, expected)


def test_saves_one_byte_per_activation():
    x, weight = torch.randn(256, 512, requires_grad=True), torch.randn(64, 512, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tilefuse.fp8_linear(x, weight)
    assert sum(t.nbytes for t in saved if t.data_ptr() != weight.data_ptr()) < x.numel() * 1.1
    assert not any(t.data_ptr() == x.data_ptr() for t in saved)


def test_19_zero_gradient_and_no_tokens(device):
    x, weight = torch.randn(5, 130, device=device), torch.randn(64, 130, device=device)
    _, dx, dw, _ = run(x, weight, None, torch.zeros(5, 64, device=device))
    assert dx.eq(0).all()
    assert dw.eq(0).all()
    out, dx, dw, db = run(x[:0], weight, torch.randn(64, device=device), torch.zeros(0, 64, device=device))
    assert (out.shape, dx.shape) == ((0, 64), (0, 130))
    assert dw.eq(0).all()
    assert db.eq(0).all()


def test_18_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.fp8_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = torch.randn(64, 150, requires_grad=True)
    for tokens in (3, 8):
        x = torch.randn(tokens, 150, requires_grad=True)
        out = step(x, weight)
        out.sum().backward()
        expected = run(x.detach(), weight.detach(), None, torch.ones(tokens, 64))
        assert_bit_equal(out.detach(), expected[0])
        assert_bit_equal(x.grad, expected[1])
        assert_bit_equal(weight.grad, expected[2])
        weight.grad = None


def test_second_derivatives_are_refused():
    x, weight = torch.randn(9, 130, requires_grad=True), torch.randn(64, 130, requires_grad=True)
    grads = torch.autograd.grad(tilefuse.fp8_linear(x, weight).square().sum(), (x, weight), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="is differentiable once"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_eps_of_small_gradients(device, scale_format):
    """Below about 1e-18 the default loses them; products of powers of two are the same at any scale."""
    x, weight, grad = (torch.randn(s, device=device) for s in ((9, 130), (64, 130), (9, 64)))
    tiny = 2.0**-80
    _, dx, dw, db = run(x, weight, weight[:, 0], grad * tiny, scale_format=scale_format)
    assert not dx.any() and not dw.any() and db.any()
    _, dx, dw, _ = run(x, weight, weight[:, 0], grad * tiny, scale_format=scale_format, eps=1e-30)
    want = run(x, weight, weight[:, 0], grad, scale_format=scale_format)
    for got, right in ((dx, want[1]), (dw, want[2])):
        assert_bit_equal(got / tiny, right)
    # the forward's quantisations take it too
    tiny_x = run(x * tiny, weight, None, grad, scale_format=scale_format, eps=1e-30)[0]
    assert_bit_equal(tiny_x / tiny, run(x, weight, None, grad, scale_format=scale_format)[0])


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, weight = torch.randn(9, 130, requires_grad=True), torch.randn(64, 130, requires_grad=True)
    checkpoint(tilefuse.fp8_linear, x, weight, use_reentrant=False).sum().backward()
    expected = run(x.detach(), weight.detach(), None, torch.ones(9, 64))
    assert_bit_equal(x.grad, expected[1])
    assert_bit_equal(weight.grad, expected[2])


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((torch.zeros(2, 4).int(), torch.zeros(3, 4)), {}, TypeError, "x must be float32"),
        ((torch.tensor(0.0), torch.zeros(3, 4)), {}, ValueError, r"x must be \[\.\.\., K\]"),
        ((torch.zeros(2, 4), torch.zeros(3, 5)), {}, ValueError, r"weight must be \[N, 4\], got \[3, 5\] float32"),
        ((torch.zeros(2, 4), torch.zeros(3, 4).int()), {}, TypeError, "weight must be float32"),
        ((torch.zeros(2, 4), torch.zeros(3, 4, device="meta")), {}, ValueError, "weight must be on the device of x"),
        ((torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(4)), {}, ValueError, r"bias must be \[3\]"),
        ((torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3).int()), {}, TypeError, "bias must be float32"),
        ((torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, device="meta")), {}, ValueError, "bias must be on"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), {"scale_format": "e8"}, ValueError, "scale_format must be"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), {"eps": 1e-40}, ValueError, "eps must be in"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.fp8_linear: {message}"):
        tilefuse.fp8_linear(*args, **kwargs)
