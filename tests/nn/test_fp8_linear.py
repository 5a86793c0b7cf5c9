import copy

import pytest
import torch
from torch import nn

import tilefuse
from tilefuse.nn import FP8Linear
from tilefuse.testing import assert_bit_equal, assert_close

CODES = torch.float8_e4m3fn


def linear(n=200, k=160, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=bias).to(dtype)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("bias", [True, False])
def test_inference(dtype, scale_format, bias):
    """Against float64 on the codes that the layer has and makes; any leading shape, non-contiguous input."""
    source = linear(bias=bias, dtype=dtype)
    layer = FP8Linear.from_linear(source, scale_format=scale_format)
    codes, scale = tilefuse.fp8_quantize(source.weight.detach(), block=(128, 128), scale_format=scale_format)
    assert_bit_equal(layer.weight.detach().view(torch.uint8), codes.view(torch.uint8))
    assert_bit_equal(layer.weight_scale_inv.detach(), scale)
    x = tokens(160, 2, 7, dtype=dtype).movedim(0, -1)
    out = layer(x)
    assert out.shape == (2, 7, 200) and out.dtype == dtype and not out.requires_grad
    rows = x.reshape(14, 160).contiguous()
    q, s = tilefuse.fp8_quantize(rows, scale_format=scale_format)
    a = tilefuse.fp8_dequantize(q, s, out_dtype=torch.float64)
    w = tilefuse.fp8_dequantize(codes, scale, block=(128, 128), out_dtype=torch.float64)
    exact = a @ w.T + (source.bias.detach().double() if bias else 0)
    naive = nn.functional.linear(a.to(dtype), w.to(dtype), source.bias.detach() if bias else None)
    tiny = 2**-20 * float(exact.abs().max()) if dtype == torch.float32 else None
    assert_close(out.reshape(14, 200), exact, naive, tiny=tiny)
    assert_bit_equal(layer.dequantize(torch.float32), w.float())
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.weight.dtype == (dtype if bias else torch.bfloat16)
    assert_bit_equal(layer.to_linear(torch.float32).weight.detach(), w.float())
    # the quantisation error of both operands, a few per cent
    error = (out.double() - source(x).detach().double()).norm() / out.double().norm()
    assert 0 < error < 0.06


def test_gradient_through_a_frozen_layer():
    layer = FP8Linear.from_linear(linear())
    x = tokens(3, 160).requires_grad_()
    out = layer(x)
    assert_bit_equal(out.detach(), layer(x.detach()))
    grad = tokens(3, 200)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize(torch.float32), rtol=1e-5, atol=1e-5)
    assert all(not p.requires_grad and p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(dtype):
    source = linear(dtype=dtype)
    layer = FP8Linear.from_linear(source, master_weight=True)
    assert layer.weight is source.weight and layer.bias is source.bias
    x = tokens(2, 9, 160, dtype=dtype).requires_grad_()
    out = layer(x)
    want = tilefuse.fp8_linear(x, source.weight, source.bias)
    assert_bit_equal(out.detach(), want.detach())
    grads = [torch.autograd.grad(y.square().sum(), [x, source.weight, source.bias]) for y in (out, want)]
    for a, b in zip(*grads):
        assert_bit_equal(a, b)
    # inference with the same weight computes the same
    frozen = copy.deepcopy(layer).quantize_()
    assert frozen.weight.dtype == CODES and not frozen.bias.requires_grad and frozen.quantize_() is frozen
    assert_bit_equal(frozen(x.detach()), out.detach())
    assert_bit_equal(frozen.dequantize(), layer.dequantize())
    assert_bit_equal(layer.to_linear().weight.detach(), source.weight.detach())
    assert layer.weight.requires_grad


def test_training_reduces_a_loss():
    torch.manual_seed(0)
    layer = FP8Linear(64, 32, master_weight=True, dtype=torch.bfloat16)
    target, x = torch.randn(64, 32), torch.randn(256, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=3.0)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x @ target / 8).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_state_dict_of_hugging_face():
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import FP8Linear as Theirs

    theirs = Theirs(160, 200, block_size=(128, 128), has_bias=True)
    ours = FP8Linear.from_linear(linear())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    other = FP8Linear(160, 200)
    other.load_state_dict(theirs.state_dict(), strict=True)
    x = tokens(4, 160)
    assert_bit_equal(other(x), ours(x))
    # what is not quantised does not pass for it
    with pytest.raises(RuntimeError, match="weight_scale_inv"):
        FP8Linear(160, 200).load_state_dict(linear().state_dict(), strict=True)


def test_dtypes_stay():
    layer = FP8Linear.from_linear(linear())
    names, x = list(layer.state_dict()), tokens(4, 160)
    want = layer(x)
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), copy.deepcopy):
        layer = change(layer)
        assert layer.weight.dtype == CODES and layer.weight_scale_inv.dtype == torch.float32
        assert list(layer.state_dict()) == names == [name for name, _ in layer.named_parameters()]
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer(x) - want).abs().max() < 0.05
    layer.to("meta")
    assert all(p.is_meta for p in layer.parameters())
    assert FP8Linear(8, 8, master_weight=True, dtype=torch.bfloat16).half().weight.dtype == torch.float16


def test_autocast_and_compile():
    x = tokens(6, 160)
    for master in (False, True):
        layer = FP8Linear.from_linear(linear(), master_weight=master)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        assert_bit_equal(out.detach(), layer(x.bfloat16()).detach())
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        leaf = x.clone().requires_grad_()
        want, got = layer(leaf), compiled(leaf)
        assert_bit_equal(want.detach(), got.detach())
        assert_bit_equal(*(torch.autograd.grad(y.sum(), leaf)[0] for y in (want, got)))


@pytest.mark.parametrize("master_weight", [False, True])
def test_initialisation(initialisation, master_weight):
    layer = initialisation(lambda **kwargs: FP8Linear(160, 200, master_weight=master_weight, **kwargs))
    assert float(layer.dequantize(torch.float32).std()) == pytest.approx(160**-0.5, rel=0.05)
    assert ("float8_e4m3fn" in repr(layer)) == (not master_weight)


@pytest.mark.parametrize("master_weight", [True, False])
def test_eps(master_weight):
    layer = nn.Linear(130, 64)
    x = 2.0**-80 * torch.randn(9, 130)
    with torch.no_grad():
        layer.bias.zero_()
        assert not FP8Linear.from_linear(layer, master_weight=master_weight)(x).any()
        small = FP8Linear.from_linear(layer, master_weight=master_weight, eps=1e-30)
        torch.testing.assert_close(small(x) * 2.0**80, layer(x * 2.0**80), rtol=0, atol=0.1)
    assert FP8Linear(8, 8, eps=1e-30).eps == 1e-30
    if master_weight:
        grads = []
        for eps in (1e-12, 1e-30):
            fp8 = FP8Linear(130, 64, master_weight=True, eps=eps)
            (fp8(torch.randn(9, 130)) * 2.0**-80).sum().backward()
            grads.append(bool(fp8.weight.grad.any()))
        assert grads == [False, True]


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"in_features": 0}, "in_features must be an int >= 1, got 0"),
        ({"out_features": 0}, "out_features must be an int >= 1, got 0"),
        ({"scale_format": "e8m0"}, "scale_format must be fp32 or pow2, got 'e8m0'"),
        ({"eps": 0.0}, "eps must be in"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=f"tilefuse.nn.FP8Linear: {message}"):
        FP8Linear(**{"in_features": 8, "out_features": 8} | kwargs)


def test_call_errors():
    layer = FP8Linear(16, 8)
    with pytest.raises(ValueError, match=r"tilefuse.nn.FP8Linear: x must be \[.., 16\], got \[2, 15\] float32"):
        layer(torch.zeros(2, 15))
    with pytest.raises(TypeError, match=r"tilefuse.nn.FP8Linear: x must be float32"):
        layer(torch.zeros(2, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"nn.FP8Linear.from_linear: linear must be a torch.nn.Linear, got 'Conv1d'"):
        FP8Linear.from_linear(nn.Conv1d(1, 1, 1))
