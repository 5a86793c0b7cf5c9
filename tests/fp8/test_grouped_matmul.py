"""``fp8_grouped_matmul``: every group must be ``fp8_matmul`` of its rows."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.fp8.grouped_matmul import operands

GROUPS = {
    "ragged": (40, [2, 10, 10, 38]),
    "one": (30, [0, 30]),
    "all_empty": (9, [4, 4, 4, 4]),
    "first_and_last_empty": (70, [0, 0, 65, 70, 70]),
    "none": (10, [3]),
    "no_rows": (0, [0, 0, 0]),
    "large": (150, [0, 130, 131, 150]),
}


def check(args, out_dtype=torch.bfloat16):
    a, a_scale, b, b_scale, offsets = args
    with poisoned():
        out = tilefuse.fp8_grouped_matmul(*args, out_dtype=out_dtype).cpu()
    bounds = offsets.tolist()
    assert out[: bounds[0]].eq(0).all()
    assert out[bounds[-1] :].eq(0).all()
    for e in range(b.shape[0]):
        rows = slice(bounds[e], bounds[e + 1])
        part = [t.cpu() for t in (a[rows], a_scale[rows], b[e], b_scale[e])]
        with tilefuse.backend("reference"):
            oracle = tilefuse.fp8_matmul(*part, out_dtype=torch.float64)
            naive = tilefuse.fp8_matmul(*part, out_dtype=out_dtype)
        assert_close(out[rows], oracle, naive)
    return out


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("b_rows", [1, 128])
def test_11_groups(device, groups, b_rows):
    rows, offsets = GROUPS[groups]
    check(operands(rows, 136, 200, offsets, device, b_rows=b_rows))


def test_reference():
    with tilefuse.backend("reference"):
        for rows, offsets in GROUPS.values():
            check(operands(rows, 70, 200, offsets))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_and_outputs(device, dtype):
    args = operands(40, 70, 130, [2, 10, 10, 38], device)
    for out_dtype in (torch.float32, torch.float16):
        check((*args[:4], args[4].to(dtype)), out_dtype)
    strided = args[4].to(dtype).repeat_interleave(2)[::2]
    check((*args[:4], strided))


def test_hostile_offsets(device):
    """Bounds outside of the rows are clamped: nothing is read or written out of place."""
    a, a_scale, b, b_scale, _ = operands(20, 70, 130, [0, 0, 0, 0], device)
    wild = torch.tensor([-5, 7, 12, 10**6], device=device)
    tame = torch.tensor([0, 7, 12, 20], device=device)
    assert_bit_equal(
        tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, wild),
        tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, tame),
    )
    falling = torch.tensor([15, 9, 12, 3], device=device)
    assert tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, falling).shape == (20, 70)


def test_17_row_does_not_depend_on_its_group(device):
    a, a_scale, b, b_scale, offsets = operands(40, 70, 260, [0, 13, 40], device)
    out = tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, offsets)
    assert_bit_equal(tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, offsets), out)
    assert_bit_equal(out[:13], tilefuse.fp8_matmul(a[:13], a_scale[:13], b[0], b_scale[0]))
    shorter = torch.tensor([0, 13, 20], device=device, dtype=torch.int32)
    assert_bit_equal(tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, shorter)[:20], out[:20])


def test_10_garbage_in_unused_rows(device):
    args = list(operands(40, 70, 130, [5, 10, 10, 30], device))
    expected = tilefuse.fp8_grouped_matmul(*args)
    codes = args[0].clone().view(torch.uint8)
    codes[:5] = codes[30:] = 0x7F
    args[0] = codes.view(torch.float8_e4m3fn)
    args[1] = args[1].clone()
    args[1][30:] = float("nan")
    assert_bit_equal(tilefuse.fp8_grouped_matmul(*args), expected)


def test_12_offsets_beyond_int32(device):
    """Experts, and rows of a, 2^30 bytes apart, a stride that fits int32; untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    stride = 2**30
    memory = torch.empty(2 * stride + 2048, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    a, a_scale, b, b_scale, offsets = operands(3, 5, 130, [0, 1, 2, 3], device)
    far_a = memory.as_strided((3, 130), (stride, 1)).copy_(a)
    far_b = memory[256:].as_strided((3, 5, 130), (stride, 256, 1)).copy_(b)
    assert_bit_equal(
        tilefuse.fp8_grouped_matmul(far_a, a_scale, far_b, b_scale, offsets),
        tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, offsets),
    )


def test_13_strides(device):
    a, a_scale, b, b_scale, offsets = operands(20, 70, 130, [0, 7, 20], device)
    expected = tilefuse.fp8_grouped_matmul(a, a_scale, b, b_scale, offsets)
    swapped = b.transpose(1, 2).contiguous().transpose(1, 2)
    grid = b_scale.transpose(1, 2).contiguous().transpose(1, 2)
    assert_bit_equal(tilefuse.fp8_grouped_matmul(a, a_scale.t().contiguous().t(), swapped, grid, offsets), expected)


def test_18_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.fp8_grouped_matmul, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (20, 33):
        args = operands(rows, 70, 130, [0, 7, rows])
        assert_bit_equal(step(*args), tilefuse.fp8_grouped_matmul(*args))


def test_errors():
    a, a_scale, b, b_scale, offsets = operands(20, 140, 130, [0, 7, 20])
    for args, kwargs, error, message in (
        ((a.float(), a_scale, b, b_scale, offsets), {}, TypeError, "a must be float8_e4m3fn"),
        ((a, a_scale, b.float(), b_scale, offsets), {}, TypeError, "b must be float8_e4m3fn"),
        ((a[0], a_scale, b, b_scale, offsets), {}, ValueError, r"a must be \[T, K\]"),
        ((a, a_scale, b[0], b_scale, offsets), {}, ValueError, r"b must be \[E, N, 130\]"),
        ((a, a_scale[:2], b, b_scale, offsets), {}, ValueError, r"a_scale must be \[20, 2\] float32"),
        ((a, a_scale.half(), b, b_scale, offsets), {}, TypeError, r"a_scale must be \[20, 2\] float32"),
        ((a, a_scale.to("meta"), b, b_scale, offsets), {}, ValueError, "a_scale must be on the device of a"),
        ((a, a_scale.clone().requires_grad_(), b, b_scale, offsets), {}, RuntimeError, ".*a_scale requires grad"),
        ((a, a_scale, b, b_scale.half(), offsets), {}, TypeError, "b_scale must be"),
        ((a, a_scale, b, b_scale.to("meta"), offsets), {}, ValueError, "b_scale must be on the device of b"),
        ((a, a_scale, b, b_scale.clone().requires_grad_(), offsets), {}, RuntimeError, ".*b_scale requires grad"),
        ((a, a_scale, b, b_scale[:, :1], offsets), {}, ValueError, r"b_scale must be \[2, 2, 2\] or \[2, 140, 2\]"),
        ((a, a_scale, b, b_scale, offsets[:2]), {}, ValueError, r"offsets must be \[3\] int32 or int64"),
        ((a, a_scale, b, b_scale, offsets.float()), {}, TypeError, r"offsets must be \[3\] int32 or int64"),
        ((a, a_scale, b, b_scale, offsets.to("meta")), {}, ValueError, "offsets must be on the device of a"),
        ((a, a_scale, b.to("meta"), b_scale, offsets), {}, ValueError, "b must be on the device of a"),
        ((a, a_scale, b, b_scale, offsets), {"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ):
        with pytest.raises(error, match=f"tilefuse.fp8_grouped_matmul: {message}"):
            tilefuse.fp8_grouped_matmul(*args, **kwargs)
