"""``fp8_matmul``. Numbers in names: docs/known-bugs.md.

The oracle is the float64 product of the dequantised operands; naive is the float32 product, rounded to out_dtype.
"""

import math

import pytest
import torch

import tilefuse
from tilefuse.reference.fp8.quantize import expand_scale
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.fp8.matmul import operands
from tilefuse.testing.inputs.fp8.quantize import quantized


def exact(a, a_scale, b, b_scale, bias=None):
    """float64 product, written apart from the reference."""
    rows = 1 if b_scale.shape[0] == b.shape[0] else 128
    left = a.double().cpu() * expand_scale(a_scale.double().cpu(), tuple(a.shape), 1)
    right = b.double().cpu() * expand_scale(b_scale.double().cpu(), tuple(b.shape), rows)
    return left @ right.t() + (0 if bias is None else bias.double().cpu())


def naive(a, a_scale, b, b_scale, bias=None, out_dtype=torch.bfloat16):
    rows = 1 if b_scale.shape[0] == b.shape[0] else 128
    left = a.float().cpu() * expand_scale(a_scale.cpu(), tuple(a.shape), 1)
    right = b.float().cpu() * expand_scale(b_scale.cpu(), tuple(b.shape), rows)
    return (left @ right.t() + (0 if bias is None else bias.float().cpu())).to(out_dtype)


def check(args, out_dtype=torch.bfloat16):
    with poisoned():
        out = tilefuse.fp8_matmul(*args, out_dtype=out_dtype)
    assert out.is_contiguous()
    assert_close(out.cpu(), exact(*args), naive(*args, out_dtype=out_dtype))
    return out


def test_reference_is_the_formula():
    for b_rows in (1, 128):
        args = operands(9, 140, 300, b_rows=b_rows)
        bias = torch.randn(140)
        with tilefuse.backend("reference"):
            wide = tilefuse.fp8_matmul(*args, bias, out_dtype=torch.float64)
            torch.testing.assert_close(wide, exact(*args, bias), rtol=1e-13, atol=1e-13)
            for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
                check((*args, bias), out_dtype)


@pytest.mark.parametrize("m", [1, 7, 15, 17, 33, 63, 65, 127, 129, 131])
def test_1_rows(device, m):
    check(operands(m, 136, 256, device))


@pytest.mark.parametrize("k", [1, 64, 320, 384, 1152])
@pytest.mark.parametrize("b_rows", [1, 128])
def test_3_4_k(device, k, b_rows):
    check(operands(5, 72, k, device, b_rows=b_rows))


def test_3_long_k(device):
    if device == "cpu" and tilefuse.backend() == "triton":
        check(operands(2, 8, 7296, device))
    else:
        check(operands(32, 64, 7296, device))


@pytest.mark.parametrize("n", [1, 8, 64, 132, 192, 576])
@pytest.mark.parametrize("b_rows", [1, 128])
def test_5_columns(device, n, b_rows):
    check(operands(67, n, 128, device, b_rows=b_rows), torch.float32)


@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (24576, 1536), (7168, 1152), (129280, 128)])
def test_4_5_model_shapes(device, n, k):
    if device == "cpu" and tilefuse.backend() == "triton":
        pytest.skip("too large for the interpreter")
    check(operands(65, n, k, device))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_and_dtypes(device, out_dtype, bias_dtype):
    bias = torch.randn(72).to(bias_dtype).to(device)
    for m in (3, 70):
        check((*operands(m, 72, 200, device), bias), out_dtype)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 5), (5, 0, 5), (0, 0, 0)])
def test_11_empty(device, m, n, k):
    out = tilefuse.fp8_matmul(*operands(m, n, k, device))
    assert out.shape == (m, n)


def test_11_no_k_is_the_bias(device):
    with poisoned():
        assert tilefuse.fp8_matmul(*operands(3, 6, 0, device)).eq(0).all()
        bias = torch.arange(6.0, device=device)
        assert_bit_equal(
            tilefuse.fp8_matmul(*operands(70, 6, 0, device), bias, out_dtype=torch.float32), bias.expand(70, 6)
        )


def test_every_code(device):
    """256 codes of a against 1: each product is exact, NaN codes give NaN in their own row."""
    a = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].to(device)
    one = torch.ones(1, 1, device=device)
    out = tilefuse.fp8_matmul(a, one.expand(256, 1), one.to(torch.float8_e4m3fn), one, out_dtype=torch.float32)
    assert_bit_equal(out.cpu(), a.float().cpu() + 0.0)


def test_7_8_tiny_and_huge_scales(device):
    a, a_scale, b, b_scale = operands(5, 70, 300, device)
    check((a, a_scale * 1e-23, b, b_scale), torch.float32)
    check((a, a_scale * 1e30, b, b_scale * 1e-25))
    # scales whose product overflows: zero codes stay zero
    zero = torch.zeros_like(a.view(torch.uint8)).view(torch.float8_e4m3fn)
    assert tilefuse.fp8_matmul(zero, a_scale * 1e28, b, b_scale * 1e28).eq(0).all()
    assert tilefuse.fp8_matmul(a, a_scale * 1e28, b, b_scale * 1e28).isinf().any()


def test_8_outliers(device):
    x, w = torch.randn(6, 256), torch.randn(64, 256)
    x[2, 7] = 1e30
    x[3] = torch.finfo(torch.bfloat16).max / 512
    args = (*tilefuse.fp8_quantize(x.to(device)), *tilefuse.fp8_quantize(w.to(device), block=(128, 128)))
    check(args)


def test_10_nan_stays_in_its_row(device):
    a, a_scale, b, b_scale = operands(70, 72, 300, device)
    clean = tilefuse.fp8_matmul(a, a_scale, b, b_scale)
    dirty = a.clone().view(torch.uint8)
    dirty[5, 17] = 0x7F
    dirty[6, 299] = 0xFF
    out = tilefuse.fp8_matmul(dirty.view(torch.float8_e4m3fn), a_scale, b, b_scale)
    assert out[5:7].isnan().all()
    keep = [i for i in range(70) if i not in (5, 6)]
    assert_bit_equal(out[keep], clean[keep])
    scale = a_scale.clone()
    scale[9, 1] = math.nan
    out = tilefuse.fp8_matmul(a, scale, b, b_scale)
    assert out[9].isnan().all()
    assert not out[:9].isnan().any()


def test_10_garbage_around_the_operands(device):
    """NaN codes and scales next to the operands in memory, in rows, columns and padding."""
    for m in (5, 70):
        a, a_scale, b, b_scale = operands(m, 72, 300, device)
        expected = tilefuse.fp8_matmul(a, a_scale, b, b_scale)

        def surrounded(x):
            wide = torch.full((x.shape[0] + 9, x.shape[1] + 20), math.nan, device=device).to(x.dtype)
            inside = wide[4 : 4 + x.shape[0], 16 : 16 + x.shape[1]]
            return inside.copy_(x)

        assert_bit_equal(tilefuse.fp8_matmul(*(surrounded(t) for t in (a, a_scale, b, b_scale))), expected)


def test_13_strides(device):
    a, a_scale, b, b_scale = operands(9, 140, 300, device)
    expected = tilefuse.fp8_matmul(a, a_scale, b, b_scale)

    def minor(x):
        return x.t().contiguous().t()

    assert_bit_equal(tilefuse.fp8_matmul(minor(a), minor(a_scale), minor(b), minor(b_scale)), expected)
    unaligned = torch.empty(9 * 300 + 1, dtype=torch.uint8, device=device)[1:].view(torch.float8_e4m3fn).view(9, 300)
    assert_bit_equal(tilefuse.fp8_matmul(unaligned.copy_(a), a_scale, b, b_scale), expected)
    one = a_scale[:1].expand(9, -1)
    assert_bit_equal(tilefuse.fp8_matmul(a, one, b, b_scale), tilefuse.fp8_matmul(a, one.contiguous(), b, b_scale))
    for offset in (1, 3):
        part = operands(9, 140, 300 + offset, device)[0][:, offset:]
        assert_bit_equal(
            tilefuse.fp8_matmul(part, a_scale, b, b_scale), tilefuse.fp8_matmul(part.contiguous(), a_scale, b, b_scale)
        )


def test_12_offsets_beyond_int32(device):
    """Rows of both operands 2^30 bytes apart, a stride that fits int32; untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    stride = 2**30
    memory = torch.empty(2 * stride + 512, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    a, a_scale, b, b_scale = operands(3, 3, 256, device)
    far_a = memory.as_strided((3, 256), (stride, 1)).copy_(a)
    far_b = memory[256:].as_strided((3, 256), (stride, 1)).copy_(b)
    assert_bit_equal(tilefuse.fp8_matmul(far_a, a_scale, far_b, b_scale), tilefuse.fp8_matmul(a, a_scale, b, b_scale))
    expected = tilefuse.fp8_dequantize(a, a_scale)
    assert_bit_equal(tilefuse.fp8_dequantize(far_a, a_scale), expected)


def test_2_quantised_activation_layout(device):
    """The M-major scales that ``fp8_quantize`` returns, M not a multiple of 4."""
    x, w = torch.randn(7, 300, device=device), torch.randn(70, 300, device=device)
    check((*tilefuse.fp8_quantize(x), *tilefuse.fp8_quantize(w, block=(128, 128))))
    check((*tilefuse.fp8_quantize(x), *tilefuse.fp8_quantize(w)))


def test_17_deterministic_and_batch_invariant(device):
    a, a_scale, b, b_scale = operands(40, 136, 520, device)
    first = tilefuse.fp8_matmul(a, a_scale, b, b_scale)
    for _ in range(2 if device == "cpu" else 20):
        assert_bit_equal(tilefuse.fp8_matmul(a, a_scale, b, b_scale), first)
    for rows in (slice(3, 4), slice(10, 23)):
        assert_bit_equal(tilefuse.fp8_matmul(a[rows], a_scale[rows], b, b_scale), first[rows])


@pytest.mark.cpu_library
def test_17_batch_invariant_across_sizes_on_the_cpu():
    a, a_scale, b, b_scale = operands(1100, 72, 300)
    whole = tilefuse.fp8_matmul(a, a_scale, b, b_scale, out_dtype=torch.float32)
    for rows in (slice(0, 1), slice(510, 515), slice(1095, 1100)):
        assert_bit_equal(tilefuse.fp8_matmul(a[rows], a_scale[rows], b, b_scale, out_dtype=torch.float32), whole[rows])


def test_accumulation_is_float32(device):
    """4096 products of one sign: a 14-bit accumulator loses whole percents."""
    k = 1024 if device == "cpu" else 4096
    a = torch.full((70, k), 1.125, device=device).to(torch.float8_e4m3fn)
    b = torch.full((64, k), 1.25, device=device).to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.ones(70, k // 128, device=device), torch.ones(1, k // 128, device=device)
    out = tilefuse.fp8_matmul(a, scale_a, b, scale_b, out_dtype=torch.float32)
    assert out.eq(k * 1.125 * 1.25).all()


@pytest.mark.gpu
def test_16_cuda_graph_on_first_call():
    for m in (4, 300):
        args = operands(m, 256, 512, "cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tilefuse.fp8_matmul(*args)
        args[0].copy_(quantized((m, 512), 1, "cuda", 9)[0])
        graph.replay()
        assert_close(out.cpu(), exact(*args), naive(*args))


@pytest.mark.gpu
def test_16_two_streams():
    """Calls on two streams at once do not share scratch memory."""
    calls = [operands(m, 256, 512, "cuda", seed=m) for m in (4, 300)]
    expected = [tilefuse.fp8_matmul(*args) for args in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outs = []
    for stream, args in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            outs.append([tilefuse.fp8_matmul(*args) for _ in range(20)])
    torch.cuda.synchronize()
    for out, one in zip(outs, expected, strict=True):
        for again in out:
            assert_bit_equal(again, one)


def test_upcast_path_of_sm80(monkeypatch, triton_backend):
    """Bytes widened to bfloat16, and the tiles of sm_80, in the interpreter."""
    from tilefuse.triton_kernels.fp8 import matmul

    monkeypatch.setattr(matmul, "upcasts", lambda device: True)
    monkeypatch.setattr(matmul, "capability_of", lambda device: 80)
    for m in (3, 70):
        check(operands(m, 72, 300))


@pytest.mark.parametrize("b_rows", [1, 128])
def test_tma_kernel_in_the_interpreter(monkeypatch, triton_backend, b_rows):
    from tilefuse.triton_kernels.fp8 import matmul

    monkeypatch.setattr(matmul, "capability_of", lambda device: 90)
    tiny = matmul.Config(64, 64, 4, 2, tma=True)
    monkeypatch.setattr(matmul, "config", lambda *args, **kwargs: tiny)
    args = operands(70, 136, 320, b_rows=b_rows)
    assert matmul.fits_tma(90, args[0], args[2])
    check((*args, torch.randn(136)))
    check((*args, torch.randn(136)), torch.float32)


@pytest.mark.parametrize("b_rows", [1, 128])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_split_k_in_the_interpreter(monkeypatch, triton_backend, b_rows, parts):
    """Parts of uneven length, some of them empty; rows keep their bits among calls of up to 64 rows."""
    from tilefuse.triton_kernels.fp8 import matmul

    monkeypatch.setattr(matmul, "split_of", lambda n, k, num_sms: parts)
    args = a, a_scale, b, b_scale = operands(20, 72, 500, b_rows=b_rows)
    with poisoned():
        out = check((*args, torch.randn(72)), torch.float32)
        check(args)
    assert not out.isnan().any()
    whole = tilefuse.fp8_matmul(*args)
    for rows in (slice(0, 1), slice(3, 17)):
        assert_bit_equal(tilefuse.fp8_matmul(a[rows], a_scale[rows], b, b_scale), whole[rows])


def test_split_of_decode_shapes():
    from tilefuse.triton_kernels.fp8.matmul import config, split_of

    assert [split_of(n, 7168, 132) for n in (576, 2112, 7168, 24576)] == [4, 4, 2, 1]
    assert [split_of(7168, k, 132) for k in (0, 128, 2048, 18432)] == [1, 1, 2, 2]
    assert split_of(64, 1 << 20, 132) == 8
    assert [config(m, 2112, 90, tma=True, k=7168).split for m in (1, 16, 64, 65, 4096)] == [4, 4, 4, 1, 1]


def test_configurations():
    """A pure table: which tile for which shape."""
    from tilefuse.triton_kernels.fp8.matmul import config, fits_tma

    assert all(config(m, 7168, 90, tma=True).swap for m in (1, 16, 64))
    assert not config(65, 7168, 90, tma=True).swap
    assert config(4096, 7168, 90, tma=True).tma
    assert not config(4096, 7168, 90, tma=False).tma
    assert not config(4096, 7168, 89, tma=False).tma
    assert config(128, 256, 90, tma=True).block_m == 64
    a = torch.zeros(4, 320).to(torch.float8_e4m3fn)
    assert fits_tma(90, a)
    assert not fits_tma(89, a)
    assert not fits_tma(120, a)
    assert not fits_tma(90, a[:, 1:])
    assert not fits_tma(90, torch.zeros(4, 300).to(torch.float8_e4m3fn))


def test_18_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.fp8_matmul, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 8):
        args = operands(m, 72, 300)
        assert_bit_equal(step(*args), tilefuse.fp8_matmul(*args))


def test_errors():
    a, a_scale, b, b_scale = operands(5, 140, 300)
    bias = torch.zeros(140)
    for args, kwargs, error, message in (
        ((a.float(), a_scale, b, b_scale), {}, TypeError, "a must be float8_e4m3fn"),
        ((a, a_scale, b.float(), b_scale), {}, TypeError, "b must be float8_e4m3fn"),
        ((a[0], a_scale, b, b_scale), {}, ValueError, r"a must be \[M, K\]"),
        ((a, a_scale, b[:, :200], b_scale), {}, ValueError, r"b must be \[N, 300\], got \[140, 200\] float8_e4m3fn"),
        ((a, a_scale[:, :2], b, b_scale), {}, ValueError, r"a_scale must be \[5, 3\] float32"),
        ((a, a_scale.half(), b, b_scale), {}, TypeError, r"a_scale must be \[5, 3\] float32"),
        ((a, a_scale, b, b_scale[:1]), {}, ValueError, r"b_scale must be \[2, 3\] or \[140, 3\] float32"),
        ((a, a_scale, b, b_scale.double()), {}, TypeError, "b_scale must be"),
        ((a, a_scale, b.to("meta"), b_scale), {}, ValueError, "b must be on the device of a"),
        ((a, a_scale.to("meta"), b, b_scale), {}, ValueError, "a_scale must be on the device of a"),
        ((a, a_scale, b, b_scale.to("meta")), {}, ValueError, "b_scale must be on the device of b"),
        ((a, a_scale, b[0], b_scale), {}, ValueError, r"b must be \[N, 300\], got \[300\] float8_e4m3fn"),
        ((a, a_scale, b, b_scale.clone().requires_grad_()), {}, RuntimeError, ".*b_scale requires grad"),
        ((a, a_scale, b, b_scale, bias[:3]), {}, ValueError, r"bias must be \[140\]"),
        ((a, a_scale, b, b_scale, bias.int()), {}, TypeError, "bias must be float32"),
        ((a, a_scale, b, b_scale, bias.to("meta")), {}, ValueError, "bias must be on the device of a"),
        ((a, a_scale, b, b_scale), {"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
        ((a, a_scale, b, b_scale, bias.clone().requires_grad_()), {}, RuntimeError, ".*bias requires grad"),
        ((a, a_scale.clone().requires_grad_(), b, b_scale), {}, RuntimeError, ".*a_scale requires grad"),
    ):
        with pytest.raises(error, match=f"tilefuse.fp8_matmul: {message}"):
            tilefuse.fp8_matmul(*args, **kwargs)
        with pytest.raises(error, match=f"tilefuse.fp8_matmul: {message}"):
            torch.ops.tilefuse.fp8_matmul(*args, **kwargs)
