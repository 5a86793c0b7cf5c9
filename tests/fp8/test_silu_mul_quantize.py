"""``silu_mul_quantize``."""

import math

import pytest
import torch

import tilefuse
from tilefuse.reference.fp8.silu_mul_quantize import silu_mul
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.fp8.quantize import DTYPES, magnitudes, random_bits


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_bit_equal(a, b, nan_bits=True)


def test_silu_is_accurate():
    """Against float64, over all magnitudes where the result is a normal number."""
    gate = torch.cat([torch.linspace(-87, 88, 100_001), torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([3e38])])
    exact = torch.nn.functional.silu(gate.double())
    error = (silu_mul(gate, torch.ones_like(gate)).double() - exact).abs() / exact.abs().clamp(min=1e-300)
    assert error[exact != 0].max() < 4e-7


def test_silu_at_its_ends():
    gate = torch.tensor([-1e38, -200.0, -0.0, 0.0, 200.0, math.inf, -math.inf, math.nan])
    out = silu_mul(gate, torch.ones_like(gate))
    assert out[:2].eq(0).all()
    assert torch.signbit(out[:3]).all()
    assert out[4:6].tolist() == [200.0, math.inf]
    # as torch.nn.functional.silu
    assert out[6:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_all_backends_agree(device, dtype, scale_format, reference):
    for shape in ((5, 600), (2, 3, 250), (1, 2)):
        for make in (random_bits, magnitudes):
            x = make(shape, dtype)
            with poisoned():
                got = tilefuse.silu_mul_quantize(x.to(device), scale_format=scale_format)
            expected = reference(tilefuse.silu_mul_quantize, x, scale_format=scale_format)
            same(got, expected)
            assert [t.stride() for t in got] == [t.stride() for t in expected]


def test_is_quantisation_of_the_product(reference):
    """The float32 product, not one rounded to the input's dtype."""
    x = magnitudes((7, 600), torch.bfloat16)
    gate, up = x.float().chunk(2, -1)
    expected = reference(tilefuse.fp8_quantize, silu_mul(gate, up))
    same(reference(tilefuse.silu_mul_quantize, x), expected)
    # float64: the exact function, codes apart by at most one where a rounding flips
    q, scale = reference(tilefuse.silu_mul_quantize, x.double())
    torch.testing.assert_close(scale, expected[1], rtol=1e-6, atol=0)
    assert (q.view(torch.uint8).int() - expected[0].view(torch.uint8).int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)], ids=str)
def test_11_empty(device, shape):
    q, scale = tilefuse.silu_mul_quantize(torch.zeros(shape, device=device))
    assert q.shape == (shape[0], shape[1] // 2)
    assert scale.shape == (shape[0], -(-shape[1] // 256))


def test_13_strides(device, reference):
    base = magnitudes((9, 3, 400), torch.bfloat16).to(device)
    for x in (base[:, 1, 8:308], base[::2, 0], base[:, 0, :8].t()[:, :8]):
        same(tilefuse.silu_mul_quantize(x), reference(tilefuse.silu_mul_quantize, x.cpu().contiguous()))


def test_12_offsets_beyond_int32(device, reference):
    """Rows 2^30 elements apart, a stride that fits int32; untouched pages of the allocation cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    stride = 2**30
    x = torch.empty(2 * stride + 512, dtype=torch.bfloat16, device=device).as_strided((3, 512), (stride, 1))
    x.copy_(magnitudes((3, 512), torch.bfloat16))
    same(tilefuse.silu_mul_quantize(x), reference(tilefuse.silu_mul_quantize, x.cpu().contiguous()))


def test_17_batch_invariant(device):
    x = magnitudes((19, 400), torch.bfloat16).to(device)
    q, scale = tilefuse.silu_mul_quantize(x)
    same(tilefuse.silu_mul_quantize(x[5:6]), (q[5:6], scale[5:6]))


def test_18_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.silu_mul_quantize, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x = torch.randn(rows, 256)
        same(step(x), tilefuse.silu_mul_quantize(x))


@pytest.mark.parametrize(
    ("x", "kwargs", "error", "message"),
    [
        (torch.zeros(2, 5), {}, ValueError, "gate_up must be .* an even last dim"),
        (torch.tensor(1.0), {}, ValueError, r"gate_up must be \[\.\.\., K\], got \[\] float32"),
        (torch.zeros(2, 4, dtype=torch.int8), {}, TypeError, "gate_up must be float32"),
        (torch.zeros(2, 4), {"scale_format": "x"}, ValueError, "scale_format must be"),
        (torch.zeros(2, 4), {"eps": -1.0}, ValueError, "eps must be"),
        (torch.zeros(2, 4, requires_grad=True), {}, RuntimeError, ".*gate_up requires grad"),
    ],
)
def test_errors(x, kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.silu_mul_quantize: {message}"):
        tilefuse.silu_mul_quantize(x, **kwargs)
