"""The repaired interpreter is exact: on every 8- and 16-bit pattern, and on float32 where rounding is hard."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch

from tilefuse.testing import assert_bit_equal, interpreter

triton = pytest.importorskip("triton", reason="needs Triton")
tl = triton.language
from tilefuse.testing import interpreter_repairs  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

BLOCK = 1 << 16
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
FP8 = tuple(LARGEST)
NUMPY = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}


@triton.jit
def cast_kernel(x, y, n, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    v = tl.load(x + offsets, mask=mask)
    if ROUNDING is None:
        v = v.to(y.dtype.element_ty)
    else:
        v = v.to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(y + offsets, v, mask=mask)


def cast(x, dtype, rounding=None):
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), rounding, BLOCK)
    return y


def every_pattern(dtype):
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    return torch.arange(1 << 16).to(torch.uint16).view(dtype)


def hard_float32(dtype):
    """Every value of dtype, every tie between two neighbours, both float32 neighbours of each, and random bits."""
    values = every_pattern(dtype).float()
    values = values[values.isfinite()].unique()
    ties = (values[1:].double() + values[:-1].double()).mul(0.5).float()
    near = torch.cat((values, ties))
    infinity = torch.tensor(float("inf"))
    random = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    specials = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 448, 464, 465, 500])
    beyond = torch.tensor([57344.0, 61439.0, 61440.0, 65504.0, 65519.99, 65520.0, 3.4e38, 1e-45, -1e-45, 1.17e-38])
    return torch.cat(
        (near, torch.nextafter(near, infinity), torch.nextafter(near, -infinity), random, specials, beyond, -beyond)
    )


def saturated(x, dtype):
    """The expected result: torch's and ml_dtypes' conversion of the value clamped to the finite range."""
    if dtype in LARGEST:
        x = x.clamp(-LARGEST[dtype], LARGEST[dtype])
    expected = x.to(dtype)
    if dtype in NUMPY:
        stored = np.uint8 if dtype.itemsize == 1 else np.uint16
        with np.errstate(invalid="ignore"):
            again = torch.from_numpy(x.numpy().astype(NUMPY[dtype]).view(stored)).view(dtype)
        assert_bit_equal(again, expected)
    return expected


@pytest.mark.parametrize("dtype", [*FP8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_bit_pattern_widens_exactly(dtype, target):
    x = every_pattern(dtype)
    if dtype.itemsize == 2 and target.itemsize == 2 and dtype != target:
        assert_bit_equal(cast(x, target), x.float().to(target))
    else:
        assert_bit_equal(cast(x, target), x.to(target))


@pytest.mark.parametrize("dtype", [*FP8, torch.bfloat16, torch.float16])
def test_float32_narrows_exactly(dtype):
    x = hard_float32(dtype)
    assert_bit_equal(cast(x, dtype), saturated(x, dtype))


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_narrows_to_fp8_exactly(dtype, source):
    x = every_pattern(source)
    assert_bit_equal(cast(x, dtype), saturated(x.float(), dtype))


@pytest.mark.parametrize("dtype", FP8)
def test_nan_becomes_the_hardware_nan(dtype):
    out = cast(torch.tensor([float("nan"), -float("nan")]), dtype)
    assert out.view(torch.uint8).tolist() == [0x7F, 0x7F]


@pytest.mark.parametrize("dtype", [*FP8, torch.bfloat16])
def test_truncation(dtype):
    values = every_pattern(dtype).float()
    values = values[values.isfinite() & (values >= 0)].unique()
    middle = torch.nextafter(values[1:], torch.tensor(0.0))
    assert_bit_equal(cast(middle, dtype, "rtz"), values[:-1].to(dtype))
    assert_bit_equal(cast(-middle, dtype, "rtz"), (-values[:-1]).to(dtype))


def test_float64_to_bf16_rounds_once():
    # just above a bf16 tie by less than float32 can see: rounding to float32 first would fall back onto the tie
    x = torch.tensor(
        [1 + 2**-8 + 2**-40, 1 + 2**-8, -(1 + 2**-8 + 2**-40), 1 + 3 * 2**-8 - 2**-40], dtype=torch.float64
    )
    expected = torch.tensor([1 + 2**-7, 1, -(1 + 2**-7), 1 + 2**-7], dtype=torch.bfloat16)
    assert_bit_equal(cast(x, torch.bfloat16), expected)


@pytest.mark.parametrize("source", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_integers_to_floats(source, target):
    x = torch.arange(-300, 300).to(source)
    assert_bit_equal(cast(x, target), x.to(target))


def test_large_integers_to_bf16_round_once():
    # 2**24 + 2**16 is a bf16 tie; one more is lost by float32, which would round it down
    x = torch.tensor([2**24 + 2**16, 2**24 + 2**16 + 1, -(2**24 + 2**16 + 1), 2**62 + 2**54 + 1], dtype=torch.int64)
    expected = [2.0**24, 2.0**24 + 2**17, -(2.0**24 + 2**17), 2.0**62 + 2**55]
    assert_bit_equal(cast(x, torch.bfloat16), torch.tensor(expected, dtype=torch.bfloat16))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_floats_to_integers(source, target):
    info = torch.iinfo(target)
    x = torch.tensor([0.0, -0.0, 1.9, 100.5, 127.0] + ([] if target is torch.uint8 else [-1.9, -100.5])).to(source)
    assert_bit_equal(cast(x, target), x.to(target))
    if target.itemsize >= 2:
        special = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(source)
        assert cast(special, target).tolist() == [0, info.max, info.min]


@triton.jit
def binary_kernel(a, b, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(a + offsets)
    y = tl.load(b + offsets)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "maximum_nan":
        z = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        z = tl.clamp(x, -1.0, 1.0)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "negate":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "add_scalar":
        z = x * 1.7 + 0.3
    elif OP == "cumsum":
        z = tl.cumsum(x, 0)
    elif OP == "sort":
        z = tl.sort(x)
    elif OP == "exp":
        z = tl.exp(x.to(tl.float32))
    tl.store(out + offsets, z.to(out.dtype.element_ty))


def binary(op, a, b, dtype=None):
    out = torch.empty(a.shape, dtype=dtype or a.dtype)
    binary_kernel[(1,)](a, b, out, op, a.numel())
    return out


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x.float() / y.float(),
    "fma": lambda x, y: x.double() * y.double() + x.double(),
    "maximum": torch.fmax,
    "minimum": torch.fmin,
    "maximum_nan": torch.maximum,
    "clamp": lambda x, y: torch.fmin(torch.fmax(x, x.new_tensor(-1)), x.new_tensor(1)),
    "where": lambda x, y: torch.where(x < y, x, y),
    "negate": lambda x, y: 0 - x,
    "abs": lambda x, y: x.abs(),
    "exp": lambda x, y: x.float().exp(),
}


@pytest.mark.parametrize("op", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elementwise(op, dtype):
    a, b = (torch.randn(2, 1024) * 3).to(dtype)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e38, 1.0])
    a[:64], b[:64] = special.repeat_interleave(8).to(dtype), special.repeat(8).to(dtype)
    expected = EXPECTED[op](a, b).to(dtype)
    out = binary(op, a, b)
    if op in ("maximum", "minimum", "maximum_nan", "clamp", "negate"):
        # the sign of a zero is not specified, Triton's negation differs between versions
        out, expected = out + 0.0, expected + 0.0
    if op == "exp":
        # libraries differ in the last place
        torch.testing.assert_close(out, expected, equal_nan=True)
    else:
        assert_bit_equal(out, expected)


def test_scalar_constants_take_the_type_of_the_tensor():
    a = torch.randn(64).bfloat16()
    expected = a * torch.tensor(1.7, dtype=torch.bfloat16) + torch.tensor(0.3, dtype=torch.bfloat16)
    assert_bit_equal(binary("add_scalar", a, a), expected)


def test_sort_and_scan_on_bf16():
    a = torch.randn(64).bfloat16()
    assert_bit_equal(binary("sort", a, a), a.sort().values)
    # Triton 3.9 keeps bf16, earlier versions return float32
    torch.testing.assert_close(binary("cumsum", a, a, torch.float32), a.float().cumsum(0), rtol=2**-8, atol=2**-8)


@triton.jit
def compare_kernel(a, b, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(a + offsets)
    y = tl.load(b + offsets)
    tl.store(out + offsets, x < y)
    tl.store(out + BLOCK + offsets, x <= y)
    tl.store(out + 2 * BLOCK + offsets, x > y)
    tl.store(out + 3 * BLOCK + offsets, x >= y)
    tl.store(out + 4 * BLOCK + offsets, x == y)
    tl.store(out + 5 * BLOCK + offsets, x != y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comparisons(dtype):
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1.0078125], dtype=dtype)
    a, b = special.repeat_interleave(8), special.repeat(8)
    out = torch.empty(6, 64, dtype=torch.bool)
    compare_kernel[(1,)](a, b, out, 64)
    assert torch.equal(out, torch.stack((a < b, a <= b, a > b, a >= b, a == b, a != b)))


@triton.jit
def product(a, b):
    return a * b


@triton.jit
def reduce_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, M)
    v = tl.load(x + rows[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + rows, tl.sum(v, 1).to(tl.float32))
    tl.store(out + M + rows, tl.max(v, 1).to(tl.float32))
    tl.store(out + 2 * M + rows, tl.min(v, 1).to(tl.float32))
    tl.store(out + 3 * M + rows, tl.argmax(v, 1).to(tl.float32))
    tl.store(out + 4 * M + rows, tl.argmin(v, 1).to(tl.float32))
    tl.store(out + 5 * M + rows, tl.reduce(v, 1, tl.standard._sum_combine).to(tl.float32))
    tl.store(out + 6 * M + rows, tl.reduce(v, 1, tl.standard._elementwise_max).to(tl.float32))
    tl.store(out + 7 * M + rows, tl.reduce(v, 1, product).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reductions(dtype):
    x = torch.randn(4, 16).to(dtype)
    out = torch.empty(8, 4)
    reduce_kernel[(1,)](x, out, 4, 16)
    exact = x.double()
    error = exact.abs().sum(1) * torch.finfo(dtype).eps
    assert ((out[0] - exact.sum(1)).abs() <= error).all()
    assert torch.equal(out[1], x.amax(1).float())
    assert torch.equal(out[2], x.amin(1).float())
    assert torch.equal(out[3], x.argmax(1).float())
    assert torch.equal(out[4], x.argmin(1).float())
    assert ((out[5] - exact.sum(1)).abs() <= error).all()
    assert torch.equal(out[6], x.amax(1).float())
    running = x[:, 0]
    for j in range(1, 16):
        running = running * x[:, j]
    assert torch.equal(out[7], running.float())


def test_argmax_over_nan_is_refused():
    x = torch.zeros(4, 16)
    x[1, 2] = float("nan")
    with pytest.raises(Exception, match="argmax or argmin over NaN"):
        reduce_kernel[(1,)](x, torch.empty(8, 4), 4, 16)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x = tl.load(a + m * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n)
    if PRECISION is None:
        z = tl.dot(x, y, out_dtype=c.dtype.element_ty)
    else:
        z = tl.dot(x, y, input_precision=PRECISION)
    tl.store(c + m * N + n, z)


def dot(a, b, out_dtype=torch.float32, precision=None):
    c = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype)
    dot_kernel[(1,)](a, b, c, a.shape[0], b.shape[1], a.shape[1], precision)
    return c


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8])
def test_dot_multiplies_exactly_and_sums_in_float32(dtype):
    a, b = (torch.randn(2, 32, 64, dtype=torch.float32) * 4).to(dtype)
    b = b.T.contiguous()
    error = (dot(a, b).double() - a.double() @ b.double()).abs()
    assert (error <= 64 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()
    # integers of moderate size: every order of summation is exact
    a, b = torch.randint(-8, 9, (32, 64)).to(dtype), torch.randint(-8, 9, (64, 32)).to(dtype)
    assert torch.equal(dot(a, b).double(), a.double() @ b.double())


def test_dot_int8():
    a, b = torch.randint(-128, 128, (32, 64), dtype=torch.int8), torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    assert torch.equal(dot(a, b, torch.int32).long(), a.long() @ b.long())


def test_dot_float16_accumulator():
    a, b = torch.randn(32, 64).half(), torch.randn(64, 32).half()
    torch.testing.assert_close(dot(a, b, torch.float16), (a.float() @ b.float()).half())


def test_dot_float32_is_tf32_unless_asked_otherwise():
    a, b = torch.eye(32), torch.full((32, 32), 1 + 2.0**-12)
    assert torch.equal(dot(a, b), torch.ones(32, 32))
    assert torch.equal(dot(a, b, precision="ieee"), b)


@triton.jit
def atomic_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(out + offsets % 4, tl.load(x + offsets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_atomic_add(dtype):
    x = torch.randint(-4, 5, (64,)).to(dtype)
    out = torch.zeros(4, dtype=dtype)
    atomic_kernel[(1,)](x, out, 64)
    assert torch.equal(out.double(), x.double().view(16, 4).sum(0))


def test_fp8_arithmetic_is_refused():
    a = torch.ones(16).to(torch.float8_e4m3fn)
    with pytest.raises(Exception, match="convert to a wider type first"):
        binary("add", a, a)


@triton.jit
def pad_kernel(x, out, n, BLOCK: tl.constexpr):
    pointer = tl.make_block_ptr(x, (n,), (1,), (0,), (BLOCK,), (0,))
    v = tl.load(pointer, boundary_check=(0,), padding_option="nan")
    tl.store(out + tl.arange(0, BLOCK), v.to(tl.float32))


@pytest.mark.skipif(
    not hasattr(triton.runtime.interpreter, "BlockPointerHandle"), reason="this Triton has no block pointers"
)
@pytest.mark.filterwarnings("ignore:.*make_block_ptr.*")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_padding(dtype):
    x = torch.randn(5).to(dtype)
    out = torch.empty(16)
    pad_kernel[(1,)](x, out, 5, 16)
    assert torch.equal(out[:5], x.float())
    assert out[5:].isnan().all()


@triton.jit
def descriptor_kernel(descriptor, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), descriptor.load([0]).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_descriptor_nan_padding(dtype):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.randn(32).to(dtype)
    out = torch.empty(16)
    descriptor = TensorDescriptor(x, shape=[5], strides=[1], block_shape=[16], padding="nan")
    descriptor_kernel[(1,)](descriptor, out, 16)
    assert torch.equal(out[:5], x[:5].float())
    assert out[5:].isnan().all()


@triton.jit
def copy_kernel(x, y, n, m, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n), mask=offsets < m)


def test_a_masked_lane_without_other_is_not_zero():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32):
        out = torch.zeros(16, dtype=torch.float32).to(dtype)
        copy_kernel[(1,)](torch.ones(8).to(dtype), out, 8, 16, 16)
        assert (out[8:].float().isnan() if dtype.is_floating_point else out[8:] == -1).all()
        assert (out[:8].float() == 1).all()


@triton.jit
def one_kernel(x, out):
    offsets = tl.arange(0, 1)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets > 0, other=0.0))


def test_other_of_a_single_element_block_counts():
    out = torch.ones(1)
    one_kernel[(1,)](torch.ones(1), out)
    assert out.item() == 0


@pytest.mark.parametrize("n, m, what", [(16, 8, "load"), (8, 16, "store")])
def test_access_out_of_bounds_is_caught(n, m, what):
    with pytest.raises(Exception, match=f"{what} of 4 bytes outside every argument's memory in 8 of 16 active lanes"):
        copy_kernel[(1,)](torch.ones(8), torch.ones(8), n, m, 16)


@triton.jit
def integer_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(out + offsets, tl.cumsum(v, 0, reverse=True))
    tl.store(out + BLOCK + offsets, v >> 1)
    tl.store(out + 2 * BLOCK + offsets, tl.umulhi(v, v))
    positive = v > 0
    tl.store(out + 3 * BLOCK + offsets, (positive + positive).to(tl.int32))
    tl.store(out + 4 * BLOCK + offsets, tl.histogram(v, BLOCK))
    tl.store(out + 5 * BLOCK + offsets, v)


def test_integers():
    x = torch.tensor([5, -7, 0, 2**31 - 1, 8, -(2**31), 3, 3], dtype=torch.int32)
    out = torch.empty(6, 8, dtype=torch.int32)
    integer_kernel[(1,)](x, out, 8)
    unsigned = x.long() & 0xFFFFFFFF
    high = [(int(v) * int(v)) >> 32 for v in unsigned]
    assert torch.equal(out[0].long(), x.flip(0).cumsum(0).flip(0).to(torch.int32).long())
    assert torch.equal(out[1], x >> 1)
    assert out[2].tolist() == [h - 2**32 if h >= 2**31 else h for h in high]
    assert (out[3] == 0).all()
    # 8 is past the last bin, negative values before the first
    assert out[4].tolist() == [1, 0, 0, 2, 0, 1, 0, 0]
    assert torch.equal(out[5], x)


@triton.jit
def scalar_condition_kernel(x, n, limit, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = limit < 4
    mask = (at < n) & inside
    tl.store(x + at, tl.load(x + at, mask=mask, other=0) + 1, mask=mask)
    # one bit: true + true is false
    tl.store(x + BLOCK + at, ((at < n) + inside).to(tl.int32))


@pytest.mark.parametrize("limit", [3, 4])
def test_a_scalar_condition_is_a_mask(limit):
    x = torch.zeros(2, 8, dtype=torch.int32)
    scalar_condition_kernel[(1,)](x, 5, limit, 8)
    inside, first = limit < 4, torch.arange(8) < 5
    assert x.tolist() == [(first & inside).int().tolist(), (first ^ inside).int().tolist()]


def test_fma_rounds_once():
    # x * y = 1 + 2**-11 + 2**-24 lies just above the middle of two float32 once z is added
    x = torch.full((16,), 1 + 2.0**-12)
    z = torch.full((16,), 2.0**12)
    expected = (x.double() * x.double() + z.double()).float()
    out = torch.empty(16)

    fma_kernel[(1,)](x, z, out, 16)
    assert torch.equal(out, expected)
    # the float64 sum falls on a tie, what it lost decides
    x = torch.full((16,), 1 + 2.0**-23)
    z = torch.full((16,), 2.0**24)
    fma_kernel[(1,)](x, z, out, 16)
    # 2**24 + 1 + 2**-22 + 2**-46: above the tie between 2**24 and 2**24 + 2
    assert torch.equal(out, torch.full((16,), 2.0**24 + 2))


@triton.jit
def fma_kernel(x, z, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(out + offsets, tl.fma(v, v, tl.load(z + offsets)))


@triton.jit
def truth_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(out + offsets, tl.where(v > 0 and v < 1, v, 0.0))


def test_truth_of_a_block_is_refused():
    with pytest.raises(Exception, match="truth of a block is ambiguous"):
        truth_kernel[(1,)](torch.rand(16), torch.empty(16), 16)


@triton.jit
def calling_kernel(x, out, BLOCK: tl.constexpr):
    v = tl.load(x + tl.arange(0, BLOCK))
    tl.store(out, tl.sum(product(v, tl.zeros_like(v) + 2), 0))


def test_the_language_is_patched_once_a_launch_and_then_as_it_was(monkeypatch):
    x, out = torch.randint(-8, 9, (64,)).float(), torch.empty(1)
    calling_kernel[(1,)](x, out, 64)
    patched = []
    upstream = triton.runtime.interpreter
    original = upstream._LangPatchScope.set_attr
    monkeypatch.setattr(
        upstream._LangPatchScope, "set_attr", lambda self, *patch: patched.append(patch) or original(self, *patch)
    )
    owners = tl, tl.core, tl.tensor
    before = [dict(vars(owner)) for owner in owners]
    calling_kernel[(3,)](x, out, 64)
    assert out == 2 * x.sum() and [dict(vars(owner)) for owner in owners] == before
    once = len(patched)
    calling_kernel[(5,)](x, out, 64)
    assert once > 0 and len(patched) == 2 * once
    with pytest.raises(Exception, match="truth of a block is ambiguous"):
        truth_kernel[(1,)](x, x, 16)
    assert [dict(vars(owner)) for owner in owners] == before


def test_install_twice_changes_nothing():
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = dict(vars(builder))
    interpreter.install()
    assert dict(vars(builder)) == before


def test_every_row_of_the_docstring_has_a_repair():
    _, _, body, _ = re.split(r"^=[= ]+$", interpreter.__doc__, flags=re.M)
    documented = [row[:28].strip().replace("`", "") for row in body.strip().splitlines()]
    repaired = {row for repair in interpreter_repairs.REPAIRS for row in repair.rows}
    assert {row for row in documented if row} == repaired


def test_nothing_is_repaired_twice():
    replaced = [(repair.owner, name) for repair in interpreter_repairs.REPAIRS for name in repair.replacements]
    assert len(replaced) == len(set(replaced))
    assert all(hasattr(owner, name) for owner, name in replaced)
