"""``rms_norm_fp8_linear`` and ``silu_mul_fp8_linear``: the forward of the two ops, the straight-through gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

import tilefuse
from tilefuse.reference.fp8.linear import fp8_linear_bwd
from tilefuse.testing import assert_bit_equal, assert_close


def norm(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def silu_mul(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def run(op, *tensors, upstream, **options):
    """Outputs and the gradients of all tensors."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = op(*leaves, **options)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, upstream)
    return *(o.detach() for o in outs), *(None if t is None else t.grad for t in leaves)


def gradients_by_hand(activated, inputs, weight, dout, dh, pow2, dtype):
    """The products of fp8_linear, then autograd of the formula ``activated(*inputs)``, in this dtype."""
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    made = activated(*inputs)
    # codes are those of the float32 activation
    dmade, dweight, dbias = fp8_linear_bwd(dout, made.detach().float(), weight, pow2, dtype)
    through_h = 0 if dh is None else (inputs[0] * dh).sum()
    gradients = torch.autograd.grad((made * dmade).sum() + through_h, inputs)
    return *gradients, dweight, dbias


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_silu_mul(device, scale_format, tokens):
    gate_up, weight, bias = torch.randn(tokens, 300), torch.randn(72, 150), torch.randn(72)
    dout = torch.randn(tokens, 72)
    on = [t.to(device) for t in (gate_up, weight, bias)]
    out, *gradients = run(tilefuse.silu_mul_fp8_linear, *on, upstream=(dout.to(device),), scale_format=scale_format)
    codes = tilefuse.silu_mul_quantize(on[0], scale_format=scale_format)
    w = tilefuse.fp8_quantize(on[1], block=(128, 128), scale_format=scale_format)
    assert_bit_equal(out, tilefuse.fp8_matmul(*codes, *w, on[2], out_dtype=torch.float32))
    assert_bit_equal(tilefuse.silu_mul_fp8_linear(*on, scale_format=scale_format), out)
    oracle, naive = (
        gradients_by_hand(silu_mul, [gate_up], weight, dout, None, scale_format == "pow2", dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for got, exact, plain in zip(gradients, oracle, naive, strict=True):
        assert_close(got.cpu(), exact, plain)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_rms_norm(device, with_residual, tokens):
    x, norm_weight, weight, bias = (torch.randn(s) for s in ((tokens, 150), (150,), (72, 150), (72,)))
    residual = torch.randn(tokens, 150) if with_residual else None
    dout, dh = torch.randn(tokens, 72), torch.randn(tokens, 150)
    on = [None if t is None else t.to(device) for t in (x, norm_weight, weight, bias, residual)]
    upstream = tuple(t.to(device) for t in (dout, dh))
    out, h, dx, dnorm, dweight, dbias, dresidual = run(tilefuse.rms_norm_fp8_linear, *on, upstream=upstream)
    codes, scale, expected_h = tilefuse.rms_norm_quantize(on[0], on[1], on[4])
    w = tilefuse.fp8_quantize(on[2], block=(128, 128))
    assert_bit_equal(out, tilefuse.fp8_matmul(codes, scale, *w, on[3], out_dtype=torch.float32))
    assert_bit_equal(h, expected_h)
    again = tilefuse.rms_norm_fp8_linear(*on)
    assert_bit_equal(again[0], out)
    assert_bit_equal(again[1], h)
    if with_residual:
        assert_bit_equal(dresidual, dx)
    oracle, naive = (
        gradients_by_hand(norm, [h.cpu(), norm_weight], weight, dout, dh, False, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for got, exact, plain in zip((dx, dnorm, dweight, dbias), oracle, naive, strict=True):
        assert_close(got.cpu(), exact, plain)


def decibels(out, exact):
    return 20 * math.log10(exact.norm() / (out.double() - exact).norm())


def test_close_to_what_is_not_quantised():
    """As for fp8_linear: at least 28 dB, but that errors of gate and up meet in their product."""
    gate_up, weight, dout = torch.randn(256, 512), torch.randn(384, 256), torch.randn(256, 384)
    got = run(tilefuse.silu_mul_fp8_linear, gate_up, weight, upstream=(dout,))
    exact = run(lambda g, w: silu_mul(g) @ w.t(), gate_up.double(), weight.double(), upstream=(dout.double(),))
    for mine, right in zip(got, exact, strict=True):
        assert decibels(mine, right) > 27
    x, norm_weight, dh = torch.randn(256, 256), torch.randn(256), torch.randn(256, 256)

    def plain(x, norm_weight, weight):
        return norm(x, norm_weight) @ weight.t(), x * 1

    got = run(tilefuse.rms_norm_fp8_linear, x, norm_weight, weight, upstream=(dout, dh))
    exact = run(plain, *(t.double() for t in (x, norm_weight, weight)), upstream=(dout.double(), dh.double()))
    for mine, right in zip(got[:1] + got[2:], exact[:1] + exact[2:], strict=True):
        assert decibels(mine, right) > 27


def test_dtypes_and_leading_dims(device):
    gate_up = torch.randn(2, 5, 300, device=device).bfloat16()
    weight, dout = torch.randn(70, 150, device=device), torch.randn(2, 5, 70, device=device).bfloat16()
    out, dgate_up, dweight = run(tilefuse.silu_mul_fp8_linear, gate_up, weight, upstream=(dout,))
    assert (out.shape, out.dtype) == ((2, 5, 70), torch.bfloat16)
    assert (dgate_up.shape, dgate_up.dtype, dweight.dtype) == (gate_up.shape, torch.bfloat16, torch.float32)
    x, norm_weight = gate_up[..., :150], torch.randn(150, device=device)
    dh = torch.randn(2, 5, 150, device=device).bfloat16()
    out, h, dx, dnorm, dweight = run(tilefuse.rms_norm_fp8_linear, x, norm_weight, weight, upstream=(dout, dh))
    assert (out.dtype, h.dtype, dx.dtype, dnorm.dtype) == (*[torch.bfloat16] * 3, torch.float32)
    assert h.shape == dx.shape == x.shape and dnorm.shape == (150,) and dweight.dtype == torch.float32


def test_only_what_is_asked():
    tensors = [torch.randn(s) for s in ((9, 130), (130,), (64, 130), (64,), (9, 130))]
    upstream = torch.randn(9, 64), torch.randn(9, 130)
    full = run(tilefuse.rms_norm_fp8_linear, *tensors, upstream=upstream)[2:]
    for at in range(5):
        leaves = [t.clone().requires_grad_(i == at) for i, t in enumerate(tensors)]
        y, h = tilefuse.rms_norm_fp8_linear(*leaves)
        torch.autograd.backward([o for o in (y, h) if o.requires_grad], [upstream[0], upstream[1]])
        assert [leaf.grad is not None for leaf in leaves] == [i == at for i in range(5)]
        assert_bit_equal(leaves[at].grad, full[at])
    tensors = [torch.randn(s) for s in ((9, 260), (64, 130), (64,))]
    full = run(tilefuse.silu_mul_fp8_linear, *tensors, upstream=upstream[:1])[1:]
    for at in range(3):
        leaves = [t.clone().requires_grad_(i == at) for i, t in enumerate(tensors)]
        tilefuse.silu_mul_fp8_linear(*leaves).backward(upstream[0])
        assert_bit_equal(leaves[at].grad, full[at])


def test_outputs_used_alone():
    tensors = [torch.randn(s) for s in ((9, 130), (130,), (64, 130))]
    leaves = [t.clone().requires_grad_() for t in tensors]
    tilefuse.rms_norm_fp8_linear(*leaves)[1].sum().backward()
    assert_bit_equal(leaves[0].grad, torch.ones(9, 130))
    assert leaves[2].grad is None or not leaves[2].grad.any()
    leaves = [t.clone().requires_grad_() for t in tensors]
    tilefuse.rms_norm_fp8_linear(*leaves)[0].sum().backward()
    full = run(tilefuse.rms_norm_fp8_linear, *tensors, upstream=(torch.ones(9, 64), torch.zeros(9, 130)))[2:]
    for leaf, expected in zip(leaves, full, strict=True):
        assert_bit_equal(leaf.grad, expected)


def test_saves_the_inputs_alone():
    gate_up, weight = torch.randn(64, 512, requires_grad=True), torch.randn(32, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tilefuse.silu_mul_fp8_linear(gate_up, weight)
    assert {t.data_ptr() for t in saved} == {gate_up.data_ptr(), weight.data_ptr()}


def test_no_tokens_and_zeros(device):
    weight = torch.randn(64, 130, device=device)
    out, dgate_up, dweight = run(
        tilefuse.silu_mul_fp8_linear, torch.randn(0, 260, device=device), weight, upstream=(weight[:0, :64],)
    )
    assert (out.shape, dgate_up.shape) == ((0, 64), (0, 260)) and dweight.eq(0).all()
    zeros, ones = torch.zeros(5, 130, device=device), torch.ones(130, device=device)
    upstream = (torch.ones(5, 64, device=device), torch.zeros(5, 130, device=device))
    y, h, dx, dnorm, dweight = run(tilefuse.rms_norm_fp8_linear, zeros, ones, weight, upstream=upstream)
    assert not y.any() and not h.any() and not dnorm.any() and not dweight.any() and dx.isfinite().all()


def test_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.rms_norm_fp8_linear, backend="aot_eager", fullgraph=True)
    tensors = [torch.randn(s) for s in ((3, 150), (150,), (64, 150))]
    upstream = torch.randn(3, 64), torch.randn(3, 150)
    for got, expected in zip(
        run(step, *tensors, upstream=upstream),
        run(tilefuse.rms_norm_fp8_linear, *tensors, upstream=upstream),
        strict=True,
    ):
        assert_bit_equal(got, expected)


def test_second_derivatives_are_refused():
    gate_up, weight = torch.randn(9, 260, requires_grad=True), torch.randn(64, 130, requires_grad=True)
    out = tilefuse.silu_mul_fp8_linear(gate_up, weight)
    for gradient in torch.autograd.grad(out.square().sum(), (gate_up, weight), create_graph=True):
        with pytest.raises(RuntimeError, match="is differentiable once"):
            gradient.sum().backward(retain_graph=True)


Z = torch.zeros


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((Z(2, 4).int(), Z(3, 2)), {}, TypeError, "gate_up must be float32"),
        ((Z(2, 5), Z(3, 2)), {}, ValueError, r"gate_up must be \[\.\.\., 2I\], an even last dim"),
        ((torch.tensor(0.0), Z(3, 2)), {}, ValueError, "gate_up must be"),
        ((Z(2, 4), Z(3, 3)), {}, ValueError, r"weight must be \[N, 2\], got \[3, 3\] float32"),
        ((Z(2, 4), Z(3, 2).int()), {}, TypeError, "weight must be float32"),
        ((Z(2, 4), Z(3, 2, device="meta")), {}, ValueError, "weight must be on the device of gate_up"),
        ((Z(2, 4), Z(3, 2), Z(4)), {}, ValueError, r"bias must be \[3\]"),
        ((Z(2, 4), Z(3, 2), Z(3).int()), {}, TypeError, "bias must be float32"),
        ((Z(2, 4), Z(3, 2), Z(3, device="meta")), {}, ValueError, "bias must be on"),
        ((Z(2, 4), Z(3, 2)), {"scale_format": "e8"}, ValueError, "scale_format must be"),
        ((Z(2, 4), Z(3, 2)), {"eps": 1e-40}, ValueError, "eps must be in"),
    ],
)
def test_errors_of_silu_mul(args, kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.silu_mul_fp8_linear: {message}"):
        tilefuse.silu_mul_fp8_linear(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((Z(2, 4).int(), Z(4), Z(3, 4)), {}, TypeError, "x must be float32"),
        ((Z(2, 0), Z(0), Z(3, 0)), {}, ValueError, "x must be"),
        ((Z(2, 4), Z(5), Z(3, 4)), {}, ValueError, r"norm_weight must be \[4\]"),
        ((Z(2, 4), Z(4).int(), Z(3, 4)), {}, TypeError, "norm_weight must be float32"),
        ((Z(2, 4), Z(4, device="meta"), Z(3, 4)), {}, ValueError, "norm_weight must be on the device of x"),
        ((Z(2, 4), Z(4), Z(3, 5)), {}, ValueError, r"weight must be \[N, 4\]"),
        ((Z(2, 4), Z(4), Z(3, 4).int()), {}, TypeError, "weight must be float32"),
        ((Z(2, 4), Z(4), Z(3, 4, device="meta")), {}, ValueError, "weight must be on the device of x"),
        ((Z(2, 4), Z(4), Z(3, 4), Z(4)), {}, ValueError, r"bias must be \[3\]"),
        ((Z(2, 4), Z(4), Z(3, 4), Z(3).int()), {}, TypeError, "bias must be float32"),
        ((Z(2, 4), Z(4), Z(3, 4), Z(3, device="meta")), {}, ValueError, "bias must be on"),
        ((Z(2, 4), Z(4), Z(3, 4), None, Z(3, 4)), {}, ValueError, "residual must be of x's shape"),
        ((Z(2, 4), Z(4), Z(3, 4), None, Z(2, 4).half()), {}, TypeError, "residual must be of x's dtype"),
        ((Z(2, 4), Z(4), Z(3, 4), None, Z(2, 4, device="meta")), {}, ValueError, "residual must be on"),
        ((Z(2, 4), Z(4), Z(3, 4)), {"norm_eps": 0.0}, ValueError, "norm_eps must be positive"),
        ((Z(2, 4), Z(4), Z(3, 4)), {"scale_format": "e8"}, ValueError, "scale_format must be"),
        ((Z(2, 4), Z(4), Z(3, 4)), {"eps": 1e-40}, ValueError, "eps must be in"),
    ],
)
def test_errors_of_rms_norm(args, kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.rms_norm_fp8_linear: {message}"):
        tilefuse.rms_norm_fp8_linear(*args, **kwargs)
