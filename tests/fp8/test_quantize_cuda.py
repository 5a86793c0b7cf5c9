"""The CUDA C++ kernels of ``fp8_quantize`` (1 x 128) and ``silu_mul_quantize``, run on the CPU by the emulation."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, canary, emulation
from tilefuse.testing.inputs.fp8.quantize import DTYPES, magnitudes, random_bits


@pytest.fixture(scope="module")
def kernels():
    return emulation.load_or_skip("fp8", "quantize")


def emulated(kernels, x, silu, scale_format="fp32", eps=1e-12):
    rows, k = x.shape[0], x.shape[1] // (2 if silu else 1)
    blocks, pitch = -(-k // 128), -(-rows // 4) * 4
    codes = canary((rows, k), torch.uint8)
    scales = canary((blocks, pitch), torch.float32)
    stride = 0 if rows == 1 else x.stride(0)
    kernels.run(
        silu,
        DTYPES.index(x.dtype),
        x.data_ptr(),
        stride,
        rows,
        k,
        codes.tensor.data_ptr(),
        scales.tensor.data_ptr(),
        pitch,
        eps,
        scale_format == "pow2",
    )
    codes.check()
    scales.check()
    return codes.tensor.view(torch.float8_e4m3fn), scales.tensor.t()[:rows]


def expected(x, silu, **options):
    with tilefuse.backend("reference"):
        return tilefuse.silu_mul_quantize(x, **options) if silu else tilefuse.fp8_quantize(x, **options)


@pytest.mark.parametrize("silu", [False, True], ids=["quantize", "silu_mul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_same_bits_as_the_reference(kernels, dtype, scale_format, silu):
    parts = 2 if silu else 1
    for shape in ((1, 128), (5, 300), (3, 20), (9, 129)):
        for make in (random_bits, magnitudes):
            x = make((shape[0], shape[1] * parts), dtype)
            got = emulated(kernels, x, silu, scale_format)
            for a, b in zip(got, expected(x, silu, scale_format=scale_format), strict=True):
                assert_bit_equal(a, b, nan_bits=True)


@pytest.mark.parametrize("silu", [False, True], ids=["quantize", "silu_mul"])
def test_strided_rows_and_unaligned_starts(kernels, silu):
    base = magnitudes((7, 900), torch.bfloat16)
    for x in (base[:, 8:520], base[:, 1:513], base[::2, :512], base[2:3, 4:516]):
        for a, b in zip(emulated(kernels, x, silu, eps=1e-4), expected(x, silu, eps=1e-4), strict=True):
            assert_bit_equal(a, b, nan_bits=True)


def test_no_order_of_threads_changes_the_result(kernels):
    x = random_bits((3, 264), torch.float32)
    emulation.in_every_order(kernels, lambda: [t.contiguous().view(torch.uint8) for t in emulated(kernels, x, False)])
