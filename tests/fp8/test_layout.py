"""Scale layouts of other libraries."""

import pytest
import torch
import torch.nn.functional as F

import tilefuse
from tilefuse import fp8_layout
from tilefuse.testing import assert_bit_equal


def test_deepgemm():
    for rows in (1, 7, 128):
        _, scale = tilefuse.fp8_quantize(torch.randn(rows, 300))
        there = fp8_layout.to_deepgemm(scale)
        # already in place: M contiguous, blocks round_up(M, 4) apart
        assert there.data_ptr() == scale.data_ptr()
        plain = fp8_layout.to_deepgemm(scale.contiguous())
        assert plain.stride() == (1, -(-rows // 4) * 4)
        assert_bit_equal(plain, scale)
        assert_bit_equal(fp8_layout.from_deepgemm(plain), scale)
    _, scale = tilefuse.fp8_quantize(torch.randn(200, 300), block=(128, 128))
    assert_bit_equal(fp8_layout.from_deepgemm(fp8_layout.to_deepgemm(scale, (128, 128)), (128, 128)), scale)


@pytest.mark.parametrize("k", [128, 300, 1152])
def test_deepgemm_packed(k):
    _, scale = tilefuse.fp8_quantize(torch.randn(7, k) * 1e-3, scale_format="pow2")
    packed = fp8_layout.to_deepgemm(scale, packed=True)
    blocks = -(-k // 128)
    assert packed.dtype == torch.int32
    assert packed.shape == (7, -(-blocks // 4))
    assert packed.stride() == (1, 8)
    # byte j of word i is the exponent of block 4 * i + j
    for block in range(blocks):
        exponent = (packed[:, block // 4] >> (8 * (block % 4))) & 0xFF
        assert_bit_equal(torch.exp2(exponent.float() - 127), scale[:, block].contiguous())
    assert_bit_equal(fp8_layout.from_deepgemm(packed, k=k), scale)


@pytest.mark.parametrize("k", [256, 384, 1152])
def test_scaled_mm(k):
    """torch's own checks accept the layouts (run on the meta device, where no GPU is needed)."""
    a, a_scale = tilefuse.fp8_quantize(torch.randn(16, k))
    b, b_scale = tilefuse.fp8_quantize(torch.randn(256, k), block=(128, 128))
    left, right = fp8_layout.to_scaled_mm(a_scale), fp8_layout.to_scaled_mm(b_scale, (128, 128))
    padded = -(-(k // 128) // 4) * 4
    assert (left.shape, left.stride()) == ((16, k // 128), (1, 16))
    assert (right.shape, right.stride()) == ((padded, 2), (1, padded))
    assert right[k // 128 :].eq(0).all()
    assert_bit_equal(fp8_layout.from_scaled_mm(left, k=k), a_scale)
    assert_bit_equal(fp8_layout.from_scaled_mm(right, (128, 128), k=k), b_scale)
    out = F.scaled_mm(
        a.to("meta"),
        b.to("meta").t(),
        left.to("meta"),
        F.ScalingType.BlockWise1x128,
        right.to("meta"),
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    assert out.shape == (16, 256)


def test_huggingface():
    weight = torch.randn(200, 300)
    q, scale = tilefuse.fp8_quantize(weight, block=(128, 128))
    stored = fp8_layout.to_huggingface(scale)
    assert stored.is_contiguous()
    loaded = fp8_layout.from_huggingface(stored, weight.shape)
    assert_bit_equal(
        tilefuse.fp8_dequantize(q, loaded, block=(128, 128)), tilefuse.fp8_dequantize(q, scale, block=(128, 128))
    )
    half = fp8_layout.from_huggingface(stored.bfloat16(), weight.shape)
    assert half.dtype == torch.float32


def test_errors():
    scale = torch.ones(4, 3)
    words = fp8_layout.to_deepgemm(scale, packed=True)
    infinite = scale.clone()
    infinite[1, 2] = float("inf")
    for call, error, message in (
        (lambda: fp8_layout.row_layout(scale.half()), TypeError, "row_layout: scale must be float32"),
        (lambda: fp8_layout.to_deepgemm(scale.half()), TypeError, "to_deepgemm: scale must be float32"),
        (lambda: fp8_layout.to_deepgemm(scale[0]), ValueError, "to_deepgemm: scale must be 2-D"),
        (lambda: fp8_layout.to_deepgemm(scale, (1, 64)), ValueError, "to_deepgemm: block must be"),
        (lambda: fp8_layout.to_deepgemm(scale * 3, packed=True), ValueError, "powers of two"),
        (lambda: fp8_layout.to_deepgemm(-scale, packed=True), ValueError, "positive powers of two"),
        (lambda: fp8_layout.to_deepgemm(infinite, packed=True), ValueError, "positive powers of two"),
        (lambda: fp8_layout.from_deepgemm(scale.int()), ValueError, "from_deepgemm: k must be"),
        (lambda: fp8_layout.from_deepgemm(words, k=4 * 128 + 1), ValueError, "from_deepgemm: k must be"),
        (lambda: fp8_layout.from_deepgemm(words[0], k=128), ValueError, "from_deepgemm: scale must be 2-D"),
        (lambda: fp8_layout.from_deepgemm(scale[0]), ValueError, "from_deepgemm: scale must be 2-D"),
        (lambda: fp8_layout.from_deepgemm(scale.half()), TypeError, "from_deepgemm: scale must be float32"),
        (lambda: fp8_layout.from_deepgemm(scale, (64, 1)), ValueError, "from_deepgemm: block must be"),
        (lambda: fp8_layout.to_scaled_mm(scale.half()), TypeError, "to_scaled_mm: scale must be float32"),
        (lambda: fp8_layout.to_scaled_mm(scale[0]), ValueError, "to_scaled_mm: scale must be 2-D"),
        (lambda: fp8_layout.to_scaled_mm(scale, (128, 1)), ValueError, "to_scaled_mm: block must be"),
        (lambda: fp8_layout.from_scaled_mm(scale, (128, 128), k=1024), ValueError, r"scale must be \[8, ceil"),
        (lambda: fp8_layout.from_scaled_mm(scale.half(), k=300), TypeError, "from_scaled_mm: scale must be float32"),
        (lambda: fp8_layout.from_scaled_mm(scale[0], k=300), ValueError, "from_scaled_mm: scale must be 2-D"),
        (lambda: fp8_layout.from_scaled_mm(scale, (2, 128), k=300), ValueError, "from_scaled_mm: block must be"),
        (lambda: fp8_layout.to_huggingface(scale.half()), TypeError, "to_huggingface: scale must be float32"),
        (lambda: fp8_layout.from_huggingface(scale, (200, 300)), ValueError, r"weight_scale_inv must be \[2, 3\]"),
        (lambda: fp8_layout.from_huggingface(scale.int(), (512, 300)), TypeError, "weight_scale_inv must be"),
    ):
        with pytest.raises(error, match=message):
            call()
