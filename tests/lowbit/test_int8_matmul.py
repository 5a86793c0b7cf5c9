"""``int8_matmul``: every backend and instruction set has the bits of the rule, written here with int64 sums."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.lowbit.int8_matmul import codes, operands, scales

KERNEL = "int8_matmul_fwd"
# m, n, k and options of `operands`
SHAPES = {
    "small": (3, 5, 7, {}),
    "one_row": (1, 130, 260, {"with_bias": True}),
    "tiles": (19, 67, 96, {"with_bias": True, "asymmetric": True}),
    "groups": (7, 65, 130, {"a_groups": 2, "b_groups": 2}),
    "groups_of_5": (5, 9, 40, {"a_groups": 8, "b_groups": 8, "asymmetric": True}),
    "groups_of_a": (2, 66, 64, {"a_groups": 2, "b_groups": 1}),
    "groups_of_b": (2, 66, 192, {"b_groups": 3, "asymmetric": True}),
    "columns_1": (6, 1, 33, {"a_groups": 1}),
}
# panels of more than one piece, more rows than share a panel, more than are unpacked at a time
LARGE = {
    "deep": (13, 70, 1100, {"asymmetric": True}),
    "parts": (300, 66, 520, {"b_groups": 2, "with_bias": True}),
    "chunks": (2100, 3, 20, {"asymmetric": True}),
}


def rule(a, a_scale, b, b_scale, bias=None, a_zero=None, out_dtype=torch.bfloat16):
    """The documented rule: sums in int64, the rest in float32, one operation at a time."""
    a, a_scale, b, b_scale = (t.cpu() for t in (a, a_scale, b, b_scale))
    left = a.long() - (0 if a_zero is None else a_zero.cpu().long().view(-1, 1))
    a_scale, b_scale = (s if s.ndim == 2 else s[:, None] for s in (a_scale, b_scale))
    groups = max(a_scale.shape[1], b_scale.shape[1])
    a_scale, b_scale = a_scale.expand(-1, groups), b_scale.expand(-1, groups)
    out = torch.zeros(a.shape[0], b.shape[0])
    for g, (x, y) in enumerate(zip(left.chunk(groups, 1), b.long().chunk(groups, 1))):
        out = out + (x @ y.T).float() * (a_scale[:, g][:, None] * b_scale[:, g])
    return (out if bias is None else out + bias.cpu().float()).to(out_dtype)


def check(args, out_dtype=torch.bfloat16):
    with poisoned():
        out = tilefuse.int8_matmul(*args, out_dtype=out_dtype)
    assert out.is_contiguous()
    assert_bit_equal(out, rule(*args, out_dtype=out_dtype))
    return out


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_has_the_bits_of_the_rule(name, out_dtype, device):
    m, n, k, options = SHAPES[name]
    check(operands(m, n, k, device, **options), out_dtype)


@pytest.mark.cpu_library
@pytest.mark.parametrize("name", LARGE)
def test_large_products_have_the_bits_of_the_rule(name):
    m, n, k, options = LARGE[name]
    with tilefuse.backend("cpu"):
        check(operands(m, n, k, **options), torch.float32)


def test_reference_in_float64():
    args = operands(4, 6, 30, a_groups=3, b_groups=3, with_bias=True, asymmetric=True)
    a, a_scale, b, b_scale, bias, zero = args
    left = (a.double() - zero.double()[:, None]) * a_scale.double().repeat_interleave(10, 1)
    exact = left @ (b.double() * b_scale.double().repeat_interleave(10, 1)).T + bias.double()
    with tilefuse.backend("reference"):
        wide = tilefuse.int8_matmul(*args, out_dtype=torch.float64)
    torch.testing.assert_close(wide, exact, rtol=1e-13, atol=1e-13)


def filled(rows, k, value, dtype=torch.int8, device="cpu"):
    return torch.full((rows, k), value, dtype=dtype, device=device)


# (code of a, its zero, code of b)
EXTREMES = [
    (-128, None, -128),
    (127, None, -128),
    (-128, None, 127),
    (255, 0, -128),
    (0, 255, -128),
    (255, 255, 127),
    (0, 255, 127),
]


@pytest.mark.parametrize("k", [65_536, 200_000])
@pytest.mark.parametrize(("code", "zero", "weight"), EXTREMES, ids=str)
def test_sums_are_exact(code, zero, weight, k, device, request):
    if "interpreter" in request.node.name and (k != 65_536 or (code, zero) not in ((-128, None), (0, 255))):
        pytest.skip("the interpreter takes seconds")
    one = torch.ones(2, device=device)
    a = filled(2, k, code, torch.int8 if zero is None else torch.uint8, device)
    zeros = None if zero is None else torch.full((2,), zero, dtype=torch.uint8, device=device)
    b = filled(2, k, weight, device=device)
    # one code less: float32 alone would not see it in so long a sum
    b[1, -1] += 1 if weight < 0 else -1
    check((a, one, b, one, None, zeros), torch.float32)


def test_spans_of_a_group_in_the_interpreter(monkeypatch, triton_backend):
    """int64 sums of spans, here of 64, in groups longer than one."""
    from tilefuse.triton_kernels.lowbit import int8_matmul

    monkeypatch.setattr(int8_matmul, "SPAN", type(int8_matmul.SPAN)(64))
    for options in ({"a_groups": 2, "b_groups": 2, "asymmetric": True}, {}):
        check(operands(3, 5, 300, **options), torch.float32)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("size", [0, 1, 65])
def test_sizes(size, asymmetric, device):
    options = {"with_bias": True, "asymmetric": asymmetric}
    for m, n, k in ((size, 3, 5), (3, size, 5), (3, 5, size), (size, size, size)):
        check(operands(m, n, k, device, **options), torch.float32)


def test_no_k_is_the_bias(device):
    a, _, b, _, bias, _ = operands(3, 6, 0, device, with_bias=True)
    for groups in (0, 1):
        a_scale, b_scale = torch.ones(3, groups, device=device), torch.ones(6, groups, device=device)
        out = tilefuse.int8_matmul(a, a_scale, b, b_scale, bias, out_dtype=torch.float32)
        assert_bit_equal(out, bias.expand(3, 6))


def test_zeros_of_either_shape(device):
    a, a_scale, b, b_scale, bias, zero = operands(5, 6, 20, device, asymmetric=True)
    expected = check((a, a_scale, b, b_scale, bias, zero))
    assert_bit_equal(tilefuse.int8_matmul(a, a_scale, b, b_scale, bias, zero[:, None]), expected)
    assert_bit_equal(tilefuse.int8_matmul(a, a_scale[:, None], b, b_scale[:, None], bias, zero), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, 1e-42, 0.0, -0.0])
def test_scales_harm_their_own_row_and_column(value, device):
    a, a_scale, b, b_scale, *_ = operands(18, 67, 40, device)
    a_scale[3] = value
    b_scale[65] = value
    out = check((a, a_scale, b, b_scale), torch.float32)
    rows, columns = [i for i in range(18) if i != 3], [i for i in range(67) if i != 65]
    assert out[rows][:, columns].isfinite().all()
    assert_bit_equal(out[rows][:, columns], rule(*operands(18, 67, 40), out_dtype=torch.float32)[rows][:, columns])


def test_strides_and_neighbours(device):
    args = a, a_scale, b, b_scale, bias, zero = operands(
        9, 67, 60, device, a_groups=3, b_groups=3, with_bias=True, asymmetric=True
    )
    expected = tilefuse.int8_matmul(*args)

    def minor(x):
        return x.t().contiguous().t()

    def apart(x, fill=99):
        wide = x.new_full((*x.shape, 2), fill)
        wide[..., 0] = x
        return wide[..., 0]

    def surrounded(x):
        """What lies around the codes must not count."""
        wide = x.new_full((x.shape[0] + 2, x.shape[1] + 7), 77)
        wide[1:-1, 3:-4] = x
        return wide[1:-1, 3:-4]

    for change in (minor, apart, surrounded):
        changed = (change(a), change(a_scale), change(b), change(b_scale), apart(bias), apart(zero))
        assert_bit_equal(tilefuse.int8_matmul(*changed), expected)


def test_rows_are_independent(device):
    a, a_scale, b, b_scale, _, zero = operands(40, 67, 100, device, asymmetric=True)
    whole = tilefuse.int8_matmul(a, a_scale, b, b_scale, None, zero)
    assert_bit_equal(tilefuse.int8_matmul(a, a_scale, b, b_scale, None, zero), whole)
    for rows in (slice(3, 4), slice(10, 27)):
        assert_bit_equal(tilefuse.int8_matmul(a[rows], a_scale[rows], b, b_scale, None, zero[rows]), whole[rows])


@pytest.mark.cpu_library
def test_threads_change_no_bit():
    args = operands(70, 700, 640, asymmetric=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"), poisoned():
                found.append(tilefuse.int8_matmul(*args))
    finally:
        torch.set_num_threads(before)
    assert_bit_equal(*found)


def test_offsets_beyond_int32(device):
    """Rows of both operands 2^30 bytes apart; untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    memory = torch.empty(2 * 2**30 + 512, dtype=torch.int8, device=device)
    a, a_scale, b, b_scale, *_ = operands(3, 3, 256, device)
    far_a = memory.as_strided((3, 256), (2**30, 1)).copy_(a)
    far_b = memory[256:].as_strided((3, 256), (2**30, 1)).copy_(b)
    assert_bit_equal(tilefuse.int8_matmul(far_a, a_scale, far_b, b_scale), tilefuse.int8_matmul(a, a_scale, b, b_scale))


def every_shape():
    found = {}
    for name, (m, n, k, options) in (SHAPES | LARGE).items():
        found[name] = tilefuse.int8_matmul(*operands(m, n, k, **options), out_dtype=torch.float32)
    one = torch.ones(2)
    for code, zero, weight in EXTREMES:
        a = filled(2, 70_000, code, torch.int8 if zero is None else torch.uint8)
        zeros = None if zero is None else torch.full((2,), zero, dtype=torch.uint8)
        b = filled(2, 70_000, weight)
        found[str((code, zero, weight))] = tilefuse.int8_matmul(a, one, b, one, None, zeros, out_dtype=torch.float32)
    return found


@pytest.mark.cpu_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni"])
def test_every_instruction_set_has_the_same_bits(isa, on_instruction_set):
    found = on_instruction_set(isa, every_shape)
    for name, expected in every_shape().items():
        assert_bit_equal(found[name], expected, name=f"{isa} {name}")


def test_configurations():
    from tilefuse.triton_kernels.lowbit.int8_matmul import config

    assert [config(m, 4096).block_m for m in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 128]
    # a block of K stays in its group, and no tensor core takes fewer than 32
    assert [config(1, group).block_k for group in (5, 32, 64, 128, 4096)] == [32, 32, 64, 128, 128]


def test_compile():
    torch._dynamo.reset()
    step = torch.compile(tilefuse.int8_matmul, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 8):
        args = operands(m, 9, 24, a_groups=3, asymmetric=True)
        assert_bit_equal(step(*args), tilefuse.int8_matmul(*args))


A, S = codes(4, 6), scales(4)
B, T = codes(5, 6), scales(5)
ZERO = torch.zeros(4, dtype=torch.uint8)
GOOD = {"a": A, "a_scale": S, "b": B, "b_scale": T}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": A.float()}, TypeError, "a must be int8 or uint8, got"),
        ({"a": A[0]}, ValueError, r"a must be \[M, K\], got \[6\] int8"),
        ({"b": B.view(torch.uint8)}, TypeError, "b must be int8, got"),
        ({"b": B[:, 1:]}, ValueError, r"b must be \[N, 6\], got \[5, 5\] int8"),
        ({"b": B[0]}, ValueError, r"b must be \[N, 6\]"),
        ({"b": B.to("meta")}, ValueError, "b must be on the device of a"),
        ({"a_scale": S[1:]}, ValueError, r"a_scale must be \[M\] or \[M, G\] with M = 4, got \[3\] float32"),
        ({"a_scale": S[:, None, None]}, ValueError, r"a_scale must be \[M\] or \[M, G\]"),
        ({"a_scale": S.half()}, TypeError, "a_scale must be float32, got"),
        ({"a_scale": S.to("meta")}, ValueError, "a_scale must be on the device of a"),
        ({"a_scale": S.clone().requires_grad_()}, RuntimeError, ".*a_scale requires grad"),
        ({"b_scale": T[1:]}, ValueError, r"b_scale must be \[N\] or \[N, G\] with N = 5"),
        ({"b_scale": T.double()}, TypeError, "b_scale must be float32"),
        ({"b_scale": T.clone().requires_grad_()}, RuntimeError, ".*b_scale requires grad"),
        ({"a_scale": scales(4, 4)}, ValueError, "K must be a multiple of the number of groups, 4, got 6"),
        ({"b_scale": scales(5, 0)}, ValueError, "K must be a multiple of the number of groups, 0, got 6"),
        (
            {"a_scale": scales(4, 2), "b_scale": scales(5, 3)},
            ValueError,
            "b_scale must be of a_scale's 2 groups or of one, got 3 groups",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], got \[4\] float32"),
        ({"bias": torch.zeros(5, dtype=torch.int32)}, TypeError, "bias must be float32"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on the device of a"),
        ({"bias": torch.zeros(5, requires_grad=True)}, RuntimeError, ".*bias requires grad"),
        ({"a_zero": ZERO}, ValueError, "a_zero must be None with an int8 a"),
        ({"a": A.view(torch.uint8)}, ValueError, "a_zero must be given with a uint8 a, got None"),
        ({"a": A.view(torch.uint8), "a_zero": ZERO.to(torch.int8)}, TypeError, "a_zero must be uint8"),
        ({"a": A.view(torch.uint8), "a_zero": ZERO[1:]}, ValueError, r"a_zero must be \[4\] or \[4, 1\], got \[3\]"),
        ({"a": A.view(torch.uint8), "a_zero": ZERO[:, None].expand(4, 2)}, ValueError, r"a_zero must be \[4\] or"),
        ({"a": A.view(torch.uint8), "a_zero": ZERO.to("meta")}, ValueError, "a_zero must be on the device of a"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ],
)
def test_errors(change, error, message):
    for call in (tilefuse.int8_matmul, torch.ops.tilefuse.int8_matmul):
        with pytest.raises(error, match=f"^tilefuse.int8_matmul: {message}"):
            call(**GOOD | change)
