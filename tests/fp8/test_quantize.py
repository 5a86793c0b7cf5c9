"""The quantisation ops. Numbers in names: docs/known-bugs.md."""

import math

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch

import tilefuse
from tilefuse import native
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.fp8.quantize import DTYPES, magnitudes, quantized, random_bits

FORMATS = ("fp32", "pow2")
BLOCKS = ((1, 128), (128, 128))
TIES = [432.0, 2.0**-10, 3 * 2.0**-10, 13.5, 17.0, 19.0, 2.0**-9, 7.5 * 2.0**-9, -0.0, 0.0, 448.0, 447.9]


def block_rule(values, scale_format, eps=1e-12):
    """The rule of docs/fp8.md for one block of float32 values, in numpy with exact float64 steps; codes and scale."""
    values = np.asarray(values, dtype=np.float32)
    finite = np.abs(values[np.isfinite(values)])
    amax = np.float32(finite.max()) if finite.size else np.float32(0)
    if amax == 0:
        scale = np.float32(1)
    else:
        scale = np.float32(max(amax, np.float32(eps))) / np.float32(448)
        if scale_format == "pow2":
            mantissa, exponent = math.frexp(float(scale))
            scale = np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))
    with np.errstate(all="ignore"):
        quotient = np.clip(values / scale, np.float32(-448), np.float32(448))
        codes = quotient.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), codes), scale


def rule(x, block, scale_format, eps=1e-12):
    """``block_rule`` over every block of x [M, K]."""
    values = x.to(torch.float32).numpy()
    rows, columns = values.shape
    height = block[0]
    q = np.zeros(values.shape, np.uint8)
    scale = np.zeros((-(-rows // height), -(-columns // 128)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = np.s_[i * height : (i + 1) * height, j * 128 : (j + 1) * 128]
            q[part], scale[i, j] = block_rule(values[part], scale_format, eps)
    return torch.from_numpy(q).view(torch.float8_e4m3fn), torch.from_numpy(scale)


def same(got, expected):
    """Codes and scales to the bit: 0x7f is the only NaN."""
    for a, b in zip(got, expected, strict=True):
        assert_bit_equal(a, b, nan_bits=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_reference_is_the_rule(dtype, scale_format, block, reference):
    for x in (random_bits((131, 260), dtype), magnitudes((9, 257), dtype)):
        same(reference(tilefuse.fp8_quantize, x, block=block, scale_format=scale_format), rule(x, block, scale_format))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_random_bits(device, dtype, scale_format, block, reference):
    shapes = ((5, 300), (130, 136)) if block[0] > 1 else ((17, 300), (1, 1), (2, 3, 128))
    for seed, shape in enumerate(shapes):
        for make in (random_bits, magnitudes):
            x = make(shape, dtype, seed)
            with poisoned():
                got = tilefuse.fp8_quantize(x.to(device), block=block, scale_format=scale_format)
            expected = reference(tilefuse.fp8_quantize, x, block=block, scale_format=scale_format)
            same(got, expected)
            assert [t.stride() for t in got] == [t.stride() for t in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_15_dual_random_bits(device, dtype, scale_format, reference):
    for shape in ((130, 140), (128, 128), (1, 5), (2, 33, 100)):
        for make in (random_bits, magnitudes):
            x = make(shape, dtype)
            with poisoned():
                got = tilefuse.fp8_quantize_dual(x.to(device), scale_format=scale_format)
            flat = x.flatten(0, -2)
            expected = (
                *reference(tilefuse.fp8_quantize, x, scale_format=scale_format),
                *reference(tilefuse.fp8_quantize, flat.t().contiguous(), scale_format=scale_format),
            )
            same(got, expected)
            assert [t.stride() for t in got] == [t.stride() for t in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("eps", [1e-12, 1.0, 5.3e-36], ids=str)
def test_next_to_midpoints(device, dtype, scale_format, eps):
    """Values whose quotient lies within a few ulp of the middle of two codes: a division that is not exact shows."""
    generator = torch.Generator().manual_seed(0)
    rows = 96
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.tensor([448.0])])
    tiny = {torch.float32: -110, torch.bfloat16: -110, torch.float16: -20}[dtype]
    exponent = torch.randint(tiny, 16, (rows, 1), generator=generator)
    amax = torch.ldexp(1 + torch.rand((rows, 1), generator=generator), exponent).to(dtype)
    scale = tilefuse.fp8_quantize(amax.expand(rows, 128).contiguous(), scale_format=scale_format, eps=eps)[1]
    parts = []
    for steps in range(-2, 3):
        x = (middles * scale).to(dtype)
        for _ in range(abs(steps)):
            x = torch.nextafter(x, torch.full_like(x, math.copysign(math.inf, steps)))
        sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        # the first element makes the block's scale that of its row
        parts += [amax, (x * sign.to(dtype)).clamp(-amax, amax)]
    x = torch.cat(parts, -1)
    assert x.shape == (rows, 640)
    same(tilefuse.fp8_quantize(x.to(device), scale_format=scale_format, eps=eps), rule(x, (1, 128), scale_format, eps))


@hypothesis.given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=200),
    st.sampled_from(FORMATS),
)
def test_any_values(values, scale_format):
    x = torch.tensor([values], dtype=torch.float32)
    same(tilefuse.fp8_quantize(x, scale_format=scale_format), rule(x, (1, 128), scale_format))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 131])
def test_2_scale_layout(device, rows):
    q, scale = tilefuse.fp8_quantize(torch.randn(rows, 300, device=device))
    assert scale.shape == (rows, 3)
    assert scale.stride() == (1, -(-rows // 4) * 4)
    assert q.is_contiguous()
    _, scale = tilefuse.fp8_quantize(torch.randn(2, rows, 3, 130, device=device))
    strides = zip(scale.shape, scale.stride(), (3 * rows, 3, 1, -(-6 * rows // 4) * 4), strict=True)
    assert all(size == 1 or got == expected for size, got, expected in strides)
    _, scale = tilefuse.fp8_quantize(torch.randn(200, 300, device=device), block=(128, 128))
    assert scale.is_contiguous()


@pytest.mark.parametrize("columns", [64, 320, 384, 7296])
def test_3_k(device, columns, reference):
    x = magnitudes((3, columns), torch.bfloat16)
    same(tilefuse.fp8_quantize(x.to(device)), reference(tilefuse.fp8_quantize, x))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_6_zero_block(device, block):
    x = torch.zeros(4, 256, device=device)
    x[1, 3] = 5.0
    q, scale = tilefuse.fp8_quantize(x, block=block)
    assert q.float()[0].eq(0).all()
    assert scale[0, 1] == 1
    if block[0] == 1:
        assert scale[0, 0] == 1
    assert torch.isfinite(tilefuse.fp8_dequantize(q, scale, block=block).float()).all()


@pytest.mark.parametrize("scale_format", FORMATS)
def test_7_tiny(device, scale_format):
    """Scales near 1e-23 and below, subnormal inputs."""
    for dtype, values in ((torch.float32, [1e-20, 1e-38, 1e-44]), (torch.bfloat16, [1e-38, 9.2e-41])):
        for value in values:
            for eps in (1e-12, 5.3e-36):
                x = (torch.linspace(-1, 1, 128) * value).to(dtype)[None]
                got = tilefuse.fp8_quantize(x.to(device), scale_format=scale_format, eps=eps)
                same(got, rule(x, (1, 128), scale_format, eps))
                assert torch.isfinite(got[1]).all()


def test_8_huge(device):
    x = torch.randn(2, 256)
    x[0, 5] = 1e30
    x[1] = torch.finfo(torch.bfloat16).max
    for dtype in (torch.float32, torch.bfloat16):
        q, scale = tilefuse.fp8_quantize(x.to(dtype).to(device))
        same((q, scale), rule(x.to(dtype), (1, 128), "fp32"))
        assert q.float()[1].eq(448).all()
        assert torch.isfinite(scale).all()


def test_9_ties_and_signed_zero(device):
    """With a scale of exactly 1 the codes are those of the values."""
    x = torch.tensor([[448.0, *TIES, *(-t for t in TIES)]])
    q, scale = tilefuse.fp8_quantize(x.to(device))
    assert scale.item() == 1
    same((q, scale), rule(x, (1, 128), "fp32"))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()]
    values = torch.cat([every, every])[:, None].float()[:254].t().contiguous()
    q, scale = tilefuse.fp8_quantize(values.to(device))
    assert scale.flatten().eq(1).all()
    assert_bit_equal(q.cpu(), values.to(torch.float8_e4m3fn), nan_bits=True)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_10_nan_and_infinity_stay_in_place(device, block):
    x = torch.randn(3, 256)
    clean = tilefuse.fp8_quantize(x.to(device), block=block)
    dirty = x.clone()
    where = torch.zeros_like(x, dtype=torch.bool)
    peak = x.abs().amax()
    dirty[0, 0] = peak
    clean = tilefuse.fp8_quantize(dirty.to(device), block=block)
    dirty[1, 5], dirty[1, 6], dirty[2, 200] = math.nan, -math.inf, math.inf
    where[1, 5] = where[1, 6] = where[2, 200] = True
    keep = torch.ones_like(where)
    if block[0] == 1:
        # their own blocks may lose their largest element, the others may not change
        keep[1, :128] = keep[2, 128:] = False
    q, scale = tilefuse.fp8_quantize(dirty.to(device), block=block)
    assert q.cpu().view(torch.uint8)[1, 5] == 0x7F
    assert q.float()[1, 6] == -448
    assert q.float()[2, 200] == 448
    keep &= ~where
    if block[0] == 1:
        assert_bit_equal(q.cpu()[keep], clean[0].cpu()[keep], nan_bits=True)
    assert torch.isfinite(scale).all()
    same((q, scale), rule(dirty, block, "fp32"))


@pytest.mark.parametrize("shape", [(0, 256), (4, 0), (0, 0), (2, 0, 128)], ids=str)
def test_11_empty(device, shape):
    for block in BLOCKS:
        q, scale = tilefuse.fp8_quantize(torch.zeros(shape, device=device), block=block)
        assert q.shape == shape
        rows = shape[-2] if block[0] == 1 else -(-shape[-2] // 128)
        assert scale.shape == (*shape[:-2], rows, -(-shape[-1] // 128))
        assert tilefuse.fp8_dequantize(q, scale, block=block).shape == shape
    q, scale, q_t, scale_t = tilefuse.fp8_quantize_dual(torch.zeros(shape, device=device))
    tokens = math.prod(shape[:-1])
    assert q_t.shape == (shape[-1], tokens)
    assert scale_t.shape == (shape[-1], -(-tokens // 128))


def test_12_offsets_beyond_int32(device, reference):
    """Rows 2^30 elements apart, a stride that fits int32; untouched pages of the allocation cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    stride = 2**30
    x = torch.empty(2 * stride + 256, dtype=torch.bfloat16, device=device).as_strided((3, 256), (stride, 1))
    x.copy_(magnitudes((3, 256), torch.bfloat16))
    dense = x.cpu().contiguous()
    same(tilefuse.fp8_quantize(x), reference(tilefuse.fp8_quantize, dense))
    same(tilefuse.fp8_quantize_dual(x), reference(tilefuse.fp8_quantize_dual, dense))
    same(tilefuse.fp8_quantize(x, block=(128, 128)), reference(tilefuse.fp8_quantize, dense, block=(128, 128)))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_13_strides(device, block, reference):
    base = magnitudes((20, 3, 400), torch.bfloat16).to(device)
    for x in (
        base[:, 1, 7:307],
        base[::2, 0],
        base[:, :, :130].transpose(0, 1),
        base[:, 0].t(),
        base[:1, 0].expand(5, -1),
    ):
        got = tilefuse.fp8_quantize(x, block=block)
        expected = reference(tilefuse.fp8_quantize, x.cpu().contiguous(), block=block)
        same(got, expected)
        assert [t.stride() for t in got] == [t.stride() for t in expected]
    same(
        tilefuse.fp8_quantize_dual(base[:, 1, 7:107]),
        reference(tilefuse.fp8_quantize_dual, base[:, 1, 7:107].cpu().contiguous()),
    )


def test_14_experts_do_not_share_blocks(device, reference):
    x = magnitudes((3, 130, 200), torch.float32)
    x[1] *= 1e6
    got = tilefuse.fp8_quantize(x.to(device), block=(128, 128))
    for e in range(3):
        same((got[0][e], got[1][e]), reference(tilefuse.fp8_quantize, x[e], block=(128, 128)))


@pytest.mark.gpu
def test_16_cuda_graph_on_first_call():
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, scale = tilefuse.fp8_quantize(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    same((q, scale), tilefuse.fp8_quantize(x.cpu()))


def test_17_deterministic(device):
    x = magnitudes((130, 260), torch.bfloat16).to(device)
    first = tilefuse.fp8_quantize_dual(x)
    for _ in range(3):
        same(tilefuse.fp8_quantize_dual(x), first)
    alone = tilefuse.fp8_quantize(x[7:8])
    assert_bit_equal(alone[0], first[0][7:8], nan_bits=True)
    assert_bit_equal(alone[1], first[1][7:8])


def test_18_compile():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x):
        q, scale = tilefuse.fp8_quantize(x * 2)
        return tilefuse.fp8_dequantize(q, scale) + 1, q, scale

    for rows in (3, 8, 17):
        x = torch.randn(rows, 200)
        q, scale = tilefuse.fp8_quantize(x * 2)
        out = step(x)
        assert_bit_equal(out[0], tilefuse.fp8_dequantize(q, scale) + 1)
        same(out[1:], (q, scale))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return torch.ops.tilefuse.fp8_quantize(x, scale_format="pow2")

    x = torch.randn(4, 200)
    program = torch.export.export(Module(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("m", min=2)}})
    x = torch.randn(9, 200)
    same(program.module()(x), tilefuse.fp8_quantize(x, scale_format="pow2"))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_20_requantising_pow2_is_exact(device, block):
    x = magnitudes((150, 300), torch.bfloat16).to(device)
    q, scale = tilefuse.fp8_quantize(x, block=block, scale_format="pow2")
    again = tilefuse.fp8_dequantize(q, scale, block=block, out_dtype=torch.float32)
    q2, scale2 = tilefuse.fp8_quantize(again, block=block, scale_format="pow2")
    third = tilefuse.fp8_dequantize(q2, scale2, block=block, out_dtype=torch.float32)
    assert_bit_equal(third, again)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_20_square_blocks_transpose(device, scale_format):
    x = magnitudes((200, 300), torch.bfloat16).to(device)
    q, scale = tilefuse.fp8_quantize(x, block=(128, 128), scale_format=scale_format)
    q_t, scale_t = tilefuse.fp8_quantize(x.t(), block=(128, 128), scale_format=scale_format)
    assert_bit_equal(q.t().contiguous(), q_t, nan_bits=True)
    assert_bit_equal(scale.t().contiguous(), scale_t)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dequantize(device, out_dtype, block, reference):
    """All codes, and a float32 product rounded once more."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(130, 2)[:, :300]
    _, scale = quantized((130, 300), block[0], "cpu")
    with poisoned():
        out = tilefuse.fp8_dequantize(codes.to(device), scale.to(device), block=block, out_dtype=out_dtype)
    assert_bit_equal(out.cpu(), reference(tilefuse.fp8_dequantize, codes, scale, block=block, out_dtype=out_dtype))
    full = scale.repeat_interleave(128, 1)[:, :300]
    full = full if block[0] == 1 else full.repeat_interleave(128, 0)[:130]
    assert_bit_equal(out.cpu(), (codes.float() * full).to(out_dtype))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dequantize_random_scales(device, out_dtype, block, reference):
    """Scales of any bits: NaN payloads, infinities, subnormals, negative ones."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(130, 2)[:, :300]
    scale = random_bits((-(-130 // block[0]), 3), torch.float32)
    out = tilefuse.fp8_dequantize(codes.to(device), scale.to(device), block=block, out_dtype=out_dtype)
    assert_bit_equal(out.cpu(), reference(tilefuse.fp8_dequantize, codes, scale, block=block, out_dtype=out_dtype))


def test_13_dequantize_strides(device):
    q, scale = quantized((3, 140, 300), 128, device)
    expected = tilefuse.fp8_dequantize(q, scale, block=(128, 128))
    wide = scale.new_zeros((3, 2, 8))
    wide[:, :, ::3] = scale
    assert_bit_equal(tilefuse.fp8_dequantize(q, wide[:, :, ::3], block=(128, 128)), expected)
    q_minor = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_bit_equal(tilefuse.fp8_dequantize(q_minor, scale, block=(128, 128)), expected)
    ones = torch.ones(1, 1, device=device).expand(4, 3)
    assert_bit_equal(tilefuse.fp8_dequantize(q[0, :4], ones), q[0, :4].to(torch.bfloat16))


def test_float64_on_the_reference():
    x = torch.randn(3, 200, dtype=torch.float64)
    same(tilefuse.fp8_quantize(x), tilefuse.fp8_quantize(x.float()))
    q, scale = tilefuse.fp8_quantize(x)
    out = tilefuse.fp8_dequantize(q, scale, out_dtype=torch.float64)
    assert_bit_equal(out, q.double() * scale.double().repeat_interleave(128, 1)[:, :200])


def test_quantisation_error(device):
    """Half a unit of a 3-bit mantissa, 2^-4 of each element, and half of the smallest step times the scale."""
    x = torch.randn(64, 512)
    q, scale = tilefuse.fp8_quantize(x.to(device))
    error = (tilefuse.fp8_dequantize(q, scale, out_dtype=torch.float32).cpu() - x).abs()
    bound = x.abs() * 2.0**-4 + scale.cpu().repeat_interleave(128, 1) * 2.0**-10
    assert (error <= bound * 1.0001).all()


BAD_CALLS = {
    "dtype": (lambda f: f(torch.zeros(2, 4, dtype=torch.int32)), TypeError, "x must be float32"),
    "dims": (lambda f: f(torch.tensor(1.0)), ValueError, r"x must be \[\.\.\., K\]"),
    "format": (
        lambda f: f(torch.zeros(2, 4), scale_format="ue8m0"),
        ValueError,
        "scale_format must be 'fp32' or 'pow2'",
    ),
    "eps": (lambda f: f(torch.zeros(2, 4), eps=0.0), ValueError, "eps must be"),
    "subnormal eps": (lambda f: f(torch.zeros(2, 4), eps=5e-36), ValueError, "eps must be"),
    "nan eps": (lambda f: f(torch.zeros(2, 4), eps=math.nan), ValueError, "eps must be"),
    "infinite eps": (lambda f: f(torch.zeros(2, 4), eps=math.inf), ValueError, "eps must be"),
}


@pytest.mark.parametrize("op", ["fp8_quantize", "fp8_quantize_dual"])
@pytest.mark.parametrize("case", BAD_CALLS, ids=str)
def test_errors(op, case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=f"tilefuse.{op}: {message}"):
        call(getattr(tilefuse, op))
    with pytest.raises(error, match=f"tilefuse.{op}: {message}"):
        call(getattr(torch.ops.tilefuse, op))


def test_block_errors():
    x = torch.zeros(2, 128)
    for block in ((1, 64), (128, 1), (2, 128)):
        with pytest.raises(ValueError, match=r"fp8_quantize: block must be \(1, 128\) or \(128, 128\)"):
            tilefuse.fp8_quantize(x, block=block)
        with pytest.raises(ValueError, match=r"fp8_dequantize: block must be"):
            tilefuse.fp8_dequantize(x.to(torch.float8_e4m3fn), torch.ones(2, 1), block=block)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., M, K\]"):
        tilefuse.fp8_quantize(torch.zeros(128), block=(128, 128))


def test_dequantize_errors():
    q, scale = quantized((4, 200), 1, "cpu")
    for args, kwargs, error, message in (
        ((q.float(), scale), {}, TypeError, "q must be float8_e4m3fn"),
        ((q, scale[:3]), {}, ValueError, r"scale must be \[4, 2\] float32, got \[3, 2\]"),
        ((q, scale.double()), {}, TypeError, r"scale must be \[4, 2\] float32"),
        ((q, scale.to("meta")), {}, ValueError, "scale must be on the device of q"),
        ((q, scale), {"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
        ((q[0], scale), {"block": (128, 128)}, ValueError, r"q must be \[\.\.\., M, K\]"),
        ((q[0, 0], scale), {}, ValueError, r"q must be \[\.\.\., K\]"),
    ):
        with pytest.raises(error, match=f"tilefuse.fp8_dequantize: {message}"):
            tilefuse.fp8_dequantize(*args, **kwargs)
    # without the compiled library that is the reason given, float64 comes after it
    reason = "_cpu.abi3.so" if native.load("cpu").missing else "float64"
    with tilefuse.backend("cpu"), pytest.raises(NotImplementedError, match=reason):
        tilefuse.fp8_dequantize(q, scale, out_dtype=torch.float64)


def test_no_gradient():
    x = torch.randn(4, 128, requires_grad=True)
    for op in (tilefuse.fp8_quantize, tilefuse.fp8_quantize_dual):
        with pytest.raises(RuntimeError, match="requires grad"):
            op(x)
        with torch.no_grad():
            assert not op(x)[1].requires_grad
    q, scale = tilefuse.fp8_quantize(x.detach())
    with pytest.raises(RuntimeError, match="scale requires grad"):
        tilefuse.fp8_dequantize(q, scale.requires_grad_())


def test_sm80_conversion(monkeypatch, triton_backend):
    """The bit arithmetic that replaces the FP8 cast where a GPU has none."""
    from tilefuse.triton_kernels.common import fp8

    monkeypatch.setattr(fp8, "native_cast", lambda device: False)
    for dtype in DTYPES:
        x = random_bits((9, 300), dtype)
        same(tilefuse.fp8_quantize(x), rule(x, (1, 128), "fp32"))
