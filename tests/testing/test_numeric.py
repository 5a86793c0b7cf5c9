"""The error rule catches what it must and accepts what it must; bit comparison sees every bit."""

import math

import pytest
import torch

from tilefuse.testing import assert_bit_equal, assert_close, error_report

BLOCK = 128


@pytest.fixture(scope="module")
def gemm():
    """A 128-wide block-scaled FP8 matmul [512, 4096] x [512, 4096]^T: codes, scales and float64 oracle."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 4096, generator=generator)
    sa, sb = torch.rand(2, 512, 4096 // BLOCK, generator=generator) + 0.5
    a, b = a.to(torch.float8_e4m3fn).float(), b.to(torch.float8_e4m3fn).float()
    oracle = (a * sa.repeat_interleave(BLOCK, 1)).double() @ (b * sb.repeat_interleave(BLOCK, 1)).double().T
    return a, b, sa, sb, oracle


def multiply(a, b, sa, sb, accumulate=torch.float32):
    total = torch.zeros(a.shape[0], b.shape[0], dtype=accumulate)
    for i in range(a.shape[1] // BLOCK):
        columns = slice(i * BLOCK, (i + 1) * BLOCK)
        part = (a[:, columns] @ b[:, columns].T) * sa[:, i, None] * sb[None, :, i]
        total = (total.float() + part).to(accumulate)
    return total.bfloat16()


def one_row_scaled(out, *_):
    out[77] *= 1.05


def one_wrong_element(out, *_):
    out[300, 5] += 64


def last_row_zero(out, *_):
    out[-1] = 0


def gain(out, *_):
    out.copy_(out.float() * 1.005)


def rounded_through_fp8(out, *_):
    scale = out.abs().max().float() / 448
    out.copy_((out.float() / scale).to(torch.float8_e4m3fn).float() * scale)


def bf16_accumulator(out, a, b, sa, sb):
    out.copy_(multiply(a, b, sa, sb, torch.bfloat16))


def last_k_block_skipped(out, a, b, sa, sb):
    out.copy_(multiply(a[:, :-BLOCK], b[:, :-BLOCK], sa, sb))


def scales_of_the_neighbour(out, a, b, sa, sb):
    out.copy_(multiply(a, b, sa.roll(1, 1), sb))


FAULTS = [
    one_row_scaled,
    one_wrong_element,
    last_row_zero,
    gain,
    rounded_through_fp8,
    bf16_accumulator,
    last_k_block_skipped,
    scales_of_the_neighbour,
]


@pytest.fixture(scope="module")
def naive(gemm):
    a, b, sa, sb, _ = gemm
    # plain PyTorch: operands dequantised to bf16, product in bf16
    return (a * sa.repeat_interleave(BLOCK, 1)).bfloat16() @ (b * sb.repeat_interleave(BLOCK, 1)).bfloat16().T


def test_a_correct_kernel_passes(gemm, naive):
    *operands, oracle = gemm
    report = error_report(multiply(*operands), oracle, naive)
    assert report
    assert 0 < report.max_ratio <= 2 and 0 < report.rms_ratio <= 2
    assert report.max_error <= 2 * report.naive_max_error


def test_naive_itself_and_the_rounded_oracle_pass(gemm, naive):
    oracle = gemm[-1]
    assert_close(naive, oracle, naive)
    assert_close(oracle.bfloat16(), oracle, naive)
    # a naive result that happens to be exact does not condemn the best possible one
    assert_close(oracle.bfloat16(), oracle, oracle)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_injected_fault_is_caught(gemm, naive, fault):
    *operands, oracle = gemm
    out = multiply(*operands)
    fault(out, *operands)
    report = error_report(out, oracle, naive)
    assert not report
    assert report.message


def test_rows_catch_what_the_maximum_hides():
    oracle = torch.randn(256, 128, dtype=torch.float64)
    oracle[0] *= 1000
    naive, out = oracle.bfloat16(), oracle.bfloat16()
    # a small row is far off, by less than the rounding error of the large one
    out[100] *= 1.1
    assert error_report(out, oracle, naive, rows=False)
    report = error_report(out, oracle, naive)
    assert not report and report.row_ratio > 2 and "[100]" in report.message


def test_tiles_catch_what_rows_hide():
    oracle = torch.randn(64, 4096, dtype=torch.float64)
    out = oracle.bfloat16()
    out[:, 64:128] *= 1.008
    report = error_report(out, oracle, oracle.bfloat16())
    assert report.row_ratio <= 2 < report.tile_ratio
    assert "tiles, worst [0, 1]" in report.message


@pytest.mark.parametrize("value, ours", [(math.nan, 0.0), (0.0, math.nan), (math.inf, 1.0), (1.0, math.inf)])
def test_special_values_must_match(value, ours):
    oracle = torch.ones(3, 4, dtype=torch.float64)
    out = torch.ones(3, 4)
    oracle[1, 2], out[1, 2] = value, ours
    with pytest.raises(AssertionError, match=r"first at \[1, 2\]"):
        assert_close(out, oracle, out)
    out[1, 2] = value
    assert_close(out, oracle, out)
    if math.isinf(value):
        out[1, 2] = -value
        with pytest.raises(AssertionError, match="infinities differ"):
            assert_close(out, oracle, out)


def test_overflow_of_the_output_dtype_is_an_infinity():
    oracle = torch.tensor([[1.0, 1e6, -1e6]], dtype=torch.float64)
    out = oracle.half()
    assert out.isinf().sum() == 2
    assert_close(out, oracle, out)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_close(torch.tensor([[1.0, 65504.0, -65504.0]]).half(), oracle, out)


def test_an_overflowing_naive_result_excuses_nothing():
    oracle = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    naive = torch.tensor([[1.0, math.inf]])
    assert not error_report(torch.tensor([[1.0, 2.1]]), oracle, naive)


def test_tiny():
    oracle, naive = torch.ones(2, 64, dtype=torch.float64), torch.ones(2, 64)
    out = naive + 1e-3
    assert not error_report(out, oracle, naive)
    assert error_report(out, oracle, naive, tiny=2e-3)
    # by default a few float32 roundings are free
    assert error_report(naive + 4 * 2**-24, oracle, naive)
    assert not error_report(naive + 16 * 2**-23, oracle, naive)


def test_float64_is_held_to_float64():
    oracle = torch.randn(8, 8, dtype=torch.float64)
    assert not error_report(oracle.float().double(), oracle, oracle)
    assert error_report(oracle * (1 + 2**-52), oracle, oracle)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (3, 5, 7)])
def test_any_shape(shape):
    oracle = torch.randn(shape, dtype=torch.float64)
    assert_close(oracle.float(), oracle, oracle.float())
    if oracle.numel():
        with pytest.raises(AssertionError, match="largest error"):
            assert_close(oracle.float() + 1, oracle, oracle.float())


def test_shapes_and_dtypes_are_checked():
    x = torch.randn(3, 4)
    for out, oracle, naive, message in [
        (x, x[:2].double(), x, r"oracle has shape \[2, 4\], out has \[3, 4\]"),
        (x, x.double(), x[:2], r"naive has shape"),
        (x, x, x, "oracle must be float64"),
        (x.int(), x.double(), x, "out must be a floating-point tensor"),
    ]:
        with pytest.raises(AssertionError, match=message):
            assert_close(out, oracle, naive)


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_bit_equality(dtype):
    a = torch.randint(0, 2, (4, 6)).to(dtype)
    assert_bit_equal(a, a.clone())
    assert_bit_equal(a.t(), a.t().contiguous())
    b = a.clone()
    b.view(torch.uint8)[2, 0] ^= 1
    with pytest.raises(AssertionError, match=r"differ in 1 of 24 elements, first at \[2, 0\]"):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bit_equality_of_zeros_and_nans(dtype):
    zero = torch.zeros(3).to(dtype)
    negative = (-torch.zeros(3)).to(dtype)
    with pytest.raises(AssertionError, match="differ in 3 of 3"):
        assert_bit_equal(zero, negative)
    nan = torch.full((3,), math.nan).to(dtype)
    other = nan.clone()
    other.view(torch.uint8)[dtype.itemsize - 1 :: dtype.itemsize] ^= 0x80
    assert_bit_equal(nan, other)
    with pytest.raises(AssertionError, match="differ in 3 of 3"):
        assert_bit_equal(nan, other, nan_bits=True)
    with pytest.raises(AssertionError, match="differ in 3 of 3"):
        assert_bit_equal(nan, zero)


def test_bit_equality_of_shapes_and_dtypes():
    x = torch.zeros(4)
    for other in (torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(AssertionError, match="differ: "):
            assert_bit_equal(x, other)
    assert_bit_equal(torch.zeros(0, 3), torch.zeros(0, 3))
    assert_bit_equal(torch.tensor(1.0), torch.tensor(1.0))
    assert_bit_equal(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))
