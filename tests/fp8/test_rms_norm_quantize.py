"""``rms_norm_quantize``."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.fp8.quantize import DTYPES, magnitudes, random_bits


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        # h copies NaN payloads without a residual; with one, the sum's NaN may differ
        assert_bit_equal(a, b, nan_bits=a.dtype == torch.float8_e4m3fn)


def test_reference_is_the_formula():
    x, residual = magnitudes((5, 300), torch.float32), magnitudes((5, 300), torch.float32, 1)
    weight = torch.rand(300) + 0.5
    with tilefuse.backend("reference"):
        q, scale, h = tilefuse.rms_norm_quantize(x, weight, residual, norm_eps=1e-5)
        exact = torch.nn.functional.rms_norm((x.double() + residual.double()), (300,), weight.double(), 1e-5)
        expected = tilefuse.fp8_quantize(exact)
        wide = tilefuse.rms_norm_quantize(x.double(), weight.double(), residual.double(), norm_eps=1e-5)
    assert_bit_equal(h, x + residual)
    torch.testing.assert_close(scale, expected[1], rtol=1e-6, atol=0)
    steps = (q.view(torch.uint8).int() - expected[0].view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps != 0).float().mean() < 1e-2
    torch.testing.assert_close(wide[1], expected[1], rtol=1e-7, atol=0)
    assert wide[2].dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_all_backends_agree(device, dtype, scale_format, with_residual, reference):
    for shape in ((5, 1000), (2, 3, 130), (1, 1), (2, 128)):
        for make in (random_bits, magnitudes):
            x = make(shape, dtype)
            residual = make(shape, dtype, 1) if with_residual else None
            weight = (torch.rand(shape[-1]) + 0.5).to(dtype if with_residual else torch.float32)
            args = [None if t is None else t.to(device) for t in (x, weight, residual)]
            with poisoned():
                got = tilefuse.rms_norm_quantize(*args, scale_format=scale_format)
            expected = reference(tilefuse.rms_norm_quantize, x, weight, residual, scale_format=scale_format)
            same(got, expected)
            assert [t.stride() for t in got] == [t.stride() for t in expected]
            if not with_residual:
                assert_bit_equal(got[2], x, nan_bits=True)


def test_residual_is_not_rounded_before_the_norm():
    """1 + 2^-9 is 1 in bfloat16: the norm sees the difference, h does not."""
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    x[0, :128] = 8.0
    residual = torch.full_like(x, 2.0**-9)
    weight = torch.ones(256)
    q, scale, h = tilefuse.rms_norm_quantize(x, weight, residual)
    assert_bit_equal(h, x)
    total = x.float() + residual.float()
    with tilefuse.backend("reference"):
        expected = tilefuse.rms_norm_quantize(total, weight)
    assert_bit_equal(scale, expected[1])
    assert_bit_equal(q, expected[0])


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)], ids=str)
def test_11_empty(device, shape):
    x = torch.zeros(shape, device=device)
    q, scale, h = tilefuse.rms_norm_quantize(x, torch.ones(shape[1], device=device))
    assert q.shape == h.shape == shape
    assert scale.shape == (shape[0], -(-shape[1] // 128))


def test_6_zero_row(device):
    q, scale, _ = tilefuse.rms_norm_quantize(
        torch.zeros(2, 256, device=device), torch.ones(256, device=device), norm_eps=0.0
    )
    # 0 / 0 is NaN, as in every RMSNorm without eps
    assert q.float().isnan().all()
    q, scale, _ = tilefuse.rms_norm_quantize(torch.zeros(2, 256, device=device), torch.ones(256, device=device))
    assert q.float().eq(0).all()
    assert scale.eq(1).all()


def test_13_strides(device, reference):
    base = magnitudes((9, 3, 400), torch.bfloat16).to(device)
    weight = torch.rand(600, device=device)[::2]
    for x, residual in (
        (base[:, 1, 8:308], base[:, 2, 8:308]),
        (base[::2, 0, :300], base[1::2, 0, :300].repeat(2, 1)[:5]),
    ):
        expected = reference(
            tilefuse.rms_norm_quantize, x.cpu().contiguous(), weight.cpu(), residual.cpu().contiguous()
        )
        same(tilefuse.rms_norm_quantize(x, weight, residual), expected)


def test_12_offsets_beyond_int32(device, reference):
    """Rows 2^30 elements apart, a stride that fits int32; untouched pages of the allocation cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    stride = 2**30
    memory = torch.empty(2 * stride + 1024, dtype=torch.bfloat16, device=device)
    x, residual = (memory[i:].as_strided((3, 256), (stride, 1)) for i in (0, 256))
    for i, t in enumerate((x, residual)):
        t.copy_(magnitudes((3, 256), torch.bfloat16, i))
    args = x, torch.rand(256, device=device), residual
    same(
        tilefuse.rms_norm_quantize(*args), reference(tilefuse.rms_norm_quantize, *(t.cpu().contiguous() for t in args))
    )


def test_17_batch_invariant(device):
    x, weight = magnitudes((19, 400), torch.bfloat16).to(device), torch.rand(400, device=device)
    whole = tilefuse.rms_norm_quantize(x, weight, x)
    same(tilefuse.rms_norm_quantize(x[5:6], weight, x[5:6]), [t[5:6] for t in whole])


def test_18_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.rms_norm_quantize, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = torch.rand(256)
    for rows in (3, 8):
        x = torch.randn(rows, 256)
        same(step(x, weight, x), tilefuse.rms_norm_quantize(x, weight, x))


def test_long_rows_leave_triton(monkeypatch):
    from tilefuse.ops.fp8 import rms_norm_quantize as module

    x = torch.zeros(1, 65664)
    with tilefuse.backend("triton"), pytest.raises(NotImplementedError, match="rows of at most 65536"):
        module.rms_norm_quantize(x, torch.ones(65664))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((torch.zeros(2, 4), torch.ones(3)), {}, ValueError, r"weight must be \[4\], got \[3\] float32"),
        ((torch.zeros(2, 4), torch.ones(4, dtype=torch.int8)), {}, TypeError, "weight must be float32"),
        ((torch.zeros(2, 4), torch.ones(4, device="meta")), {}, ValueError, "weight must be on the device of x"),
        ((torch.zeros(2, 4), torch.ones(4), torch.zeros(4)), {}, ValueError, "residual must be of x's shape"),
        ((torch.zeros(2, 4), torch.ones(4), torch.zeros(2, 4).half()), {}, TypeError, "residual must be of x's dtype"),
        ((torch.zeros(2, 4).int(), torch.ones(4)), {}, TypeError, "x must be float32"),
        ((torch.tensor(1.0), torch.ones(4)), {}, ValueError, r"x must be \[\.\.\., K\], got \[\] float32"),
        (
            (torch.zeros(2, 4), torch.ones(4), torch.zeros(2, 4, device="meta")),
            {},
            ValueError,
            "residual must be on the device of x",
        ),
        ((torch.zeros(2, 4), torch.ones(4)), {"norm_eps": math.nan}, ValueError, "norm_eps must be finite and >= 0"),
        ((torch.zeros(2, 4), torch.ones(4)), {"norm_eps": math.inf}, ValueError, "norm_eps must be finite and >= 0"),
        ((torch.zeros(2, 4, requires_grad=True), torch.ones(4)), {}, RuntimeError, ".*x requires grad"),
        (
            (torch.zeros(2, 4), torch.ones(4), torch.zeros(2, 4, requires_grad=True)),
            {},
            RuntimeError,
            ".*residual requires grad",
        ),
        ((torch.zeros(2, 4), torch.ones(4)), {"norm_eps": -1.0}, ValueError, "norm_eps must be finite and >= 0"),
        ((torch.zeros(2, 4), torch.ones(4)), {"eps": 0.0}, ValueError, "eps must be"),
        ((torch.zeros(2, 4), torch.ones(4)), {"scale_format": ""}, ValueError, "scale_format must be"),
        ((torch.zeros(2, 4), torch.ones(4, requires_grad=True)), {}, RuntimeError, ".*weight requires grad"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.rms_norm_quantize: {message}"):
        tilefuse.rms_norm_quantize(*args, **kwargs)
