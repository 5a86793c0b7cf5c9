import pytest
import torch

import tilefuse
from tilefuse.nn import QATLinear
from tilefuse.testing import assert_bit_equal

OPTIONS = {
    "int4": {"bits": 4, "group_size": 32},
    "asymmetric": {"bits": 6, "group_size": 64, "symmetric": False},
    "int8": {"bits": 8, "group_size": 0, "activation_bits": 8, "scale_gradient": True},
}
each = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converts_to_what_it_trained(options, dtype):
    layer = QATLinear(75, 24, **options, dtype=dtype)
    rest = {"bits": layer.bits, "group_size": layer.group_size}
    weight = layer.quantized_weight()
    back = tilefuse.int_dequantize(*layer.convert(), **rest, out_dtype=dtype)[:, :75]
    assert_bit_equal(weight.detach(), back)
    x = torch.randn(2, 3, 75).to(dtype)
    seen = x
    if layer.activation_bits:
        seen = tilefuse.int_dequantize(*tilefuse.int_quantize(x, bits=8), out_dtype=dtype)
    assert_bit_equal(layer(x).detach(), torch.nn.functional.linear(seen, back, layer.bias.detach()))


@each
def test_gradients_are_those_of_the_op(options):
    layer = QATLinear(64, 24, **options)
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    weight, inputs = (t.detach().clone().requires_grad_() for t in (layer.weight, x))
    own = {name: options[name] for name in ("symmetric", "scale_gradient") if name in options}
    seen = inputs
    if layer.activation_bits:
        seen = tilefuse.fake_quantize(inputs, bits=8, group_size=0, scale_gradient=True)
    w = tilefuse.fake_quantize(weight, bits=layer.bits, group_size=layer.group_size, **own)
    torch.nn.functional.linear(seen, w, layer.bias.detach()).square().sum().backward()
    assert_bit_equal(layer.weight.grad, weight.grad)
    assert_bit_equal(x.grad, inputs.grad)
    assert layer.bias.grad is not None


def test_takes_over_a_linear():
    linear = torch.nn.Linear(64, 8, bias=False).eval()
    layer = QATLinear.from_linear(linear, **OPTIONS["int4"], activation_bits=6)
    assert layer.weight is linear.weight and layer.bias is None and not layer.training
    assert layer.activation_bits == 6 and "bits=4, group_size=32, symmetric, activation_bits=6" in repr(layer)
    torch.nn.Linear(64, 8, bias=False).load_state_dict(layer.state_dict(), strict=True)
    again = QATLinear(64, 8, False)
    again.reset_parameters(torch.Generator().manual_seed(3))
    first = again.weight.detach().clone()
    again.reset_parameters(torch.Generator().manual_seed(3))
    assert_bit_equal(again.weight.detach(), first)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    x, target = torch.randn(256, 32), torch.randn(32, 8)
    layer = QATLinear(32, 8, bits=4, group_size=32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(120):
        loss = (layer(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_compiles():
    layer = QATLinear(64, 16, group_size=32)
    x = torch.randn(4, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_bit_equal(compiled(x).detach(), layer(x).detach())


def test_errors():
    for options, message in (
        ({"bits": 5}, "bits must be 8, 6 or 4, got 5"),
        ({"group_size": -1}, "group_size must be at least 1"),
        ({"activation_bits": 3}, "activation_bits must be 8, 6, 4 or None, got 3"),
    ):
        with pytest.raises(ValueError, match=rf"nn\.QATLinear: {message}"):
            QATLinear(8, 8, **options)
    with pytest.raises(ValueError, match=r"nn\.QATLinear: in_features must be an int >= 1, got 0"):
        QATLinear(0, 8)
    with pytest.raises(ValueError, match=r"nn\.QATLinear: x must be \[.., 8\], got \[2, 7\]"):
        QATLinear(8, 8)(torch.zeros(2, 7))
    with pytest.raises(
        ValueError, match=r"nn\.QATLinear\.from_linear: linear must be a torch.nn.Linear, got 'Identity'"
    ):
        QATLinear.from_linear(torch.nn.Identity())
