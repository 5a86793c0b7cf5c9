"""``lowbit_matmul``: floats against the float64 product of the dequantised weight, int8 rows bit for bit."""

import math

import pytest
import torch

import tilefuse
from tilefuse.reference.lowbit.quantize import int_dequantize_fwd
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.lowbit.lowbit_matmul import operands

KERNEL = "lowbit_matmul_fwd"
# m, n, k, options of `operands`
SHAPES = {
    "int4": (3, 66, 160, {"group_size": 32}),
    "int4_whole_row": (17, 5, 77, {"group_size": 0}),
    "int4_uint8_zero": (2, 65, 140, {"group_size": 64, "zero": "uint8"}),
    "int4_float_zero": (5, 20, 96, {"group_size": 32, "zero": "float"}),
    "int4_groups_of_5": (6, 9, 33, {"group_size": 5, "zero": "uint8"}),
    "int6": (4, 67, 100, {"bits": 6, "group_size": 32}),
    "int6_ragged": (7, 18, 77, {"bits": 6, "group_size": 12, "zero": "uint8"}),
    "int8": (3, 65, 130, {"bits": 8, "group_size": 128}),
    "int8_uint8_zero": (18, 7, 90, {"bits": 8, "group_size": 0, "zero": "uint8"}),
    "int8_float_zero": (2, 16, 48, {"bits": 8, "group_size": 16, "zero": "float"}),
}


def rule(options):
    return {name: options.get(name, default) for name, default in (("bits", 4), ("group_size", 32))}


def dequantised(args, options, dtype=torch.float64):
    """The weight ``[N, K]`` on the CPU."""
    x, q, scale, zero = (None if t is None else t.cpu() for t in args)
    kind = rule(options)
    return int_dequantize_fwd(q, scale.float(), zero, kind["bits"], kind["group_size"], dtype)[:, : x.shape[-1]]


def check(args, options, bias=None, out_dtype=None):
    with poisoned():
        out = tilefuse.lowbit_matmul(*args, None, bias, **rule(options), out_dtype=out_dtype)
    x = args[0].cpu()
    assert out.is_contiguous() and out.dtype == (out_dtype or x.dtype)
    shift = 0 if bias is None else bias.cpu()
    exact = x.double() @ dequantised(args, options).T + shift
    naive = x @ dequantised(args, options, x.dtype).T + shift
    assert_close(out.cpu(), exact, naive.to(out.dtype))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_dequantised_weight(name, dtype, device):
    m, n, k, options = SHAPES[name]
    check(operands(m, n, k, device, dtype, **options), options, torch.linspace(-1, 1, n, device=device))


@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.float16, None), (torch.bfloat16, torch.float32)], ids=str)
def test_dtypes(dtype, out_dtype, device):
    check(operands(5, 33, 64, device, dtype), {}, None, out_dtype)
    x, q, scale, _ = operands(5, 33, 64, device)
    for half in (torch.bfloat16, torch.float16):
        check((x, q, scale.to(half), None), {})


@pytest.mark.cpu_library
@pytest.mark.parametrize("m", [1, 2, 4, 5, 7, 16, 31, 64, 129, 130, 300, 2100])
def test_rows_of_the_cpu(m):
    """Each path by the number of rows, and the same bits from all of them."""
    options = {"group_size": 48, "zero": "uint8"}
    args = operands(m, 70, 200, **options)
    with tilefuse.backend("cpu"):
        out = check(args, options)
        for row in {0, m // 2, m - 1}:
            part = tilefuse.lowbit_matmul(args[0][row : row + 1], *args[1:], group_size=48)
            assert_bit_equal(part, out[row : row + 1])


@pytest.mark.slow
@pytest.mark.cpu_library
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_every_width_of_the_cpu(bits):
    with tilefuse.backend("cpu"):
        for n in (1, 63, 64, 65):
            for k in range(1, 140, 6):
                for group_size in (0, 8, 13, 32):
                    options = {"bits": bits, "group_size": group_size, "zero": "uint8"}
                    check(operands(k % 9 + 1, n, k, **options), options)


def int8_rule(args, options, bias=None, out_dtype=torch.bfloat16):
    """The documented rule: sums in int64, the rest in float32, one operation at a time."""
    x, _, scale, _ = args
    size = rule(options)["group_size"] or x.shape[1]
    codes, code_scale, _ = tilefuse.int_quantize(x.cpu(), group_size=rule(options)["group_size"])
    ones = (args[0], args[1], torch.ones_like(scale), args[3])
    levels = dequantised(ones, options).long()
    out = torch.zeros(x.shape[0], levels.shape[0])
    for g, start in enumerate(range(0, x.shape[1], size)):
        sums = codes[:, start : start + size].long() @ levels[:, start : start + size].T
        out = out + sums.float() * (code_scale[:, g][:, None] * scale[:, g].cpu().float())
    return (out if bias is None else out + bias.cpu()).to(out_dtype)


def check_int8(args, options, bias=None):
    with poisoned():
        out = tilefuse.lowbit_matmul(*args, None, bias, **rule(options), activation="int8")
    assert_bit_equal(out, int8_rule(args, options, bias, args[0].dtype))
    return out


INTEGERS = [name for name in SHAPES if "float" not in name]


@pytest.mark.parametrize("name", INTEGERS)
def test_int8_rows_have_the_bits_of_the_rule(name, device):
    m, n, k, options = SHAPES[name]
    args = operands(m, n, k, device, torch.float32, **options)
    check_int8(args, options, torch.linspace(-1, 1, n, device=device))
    check_int8((args[0].bfloat16(), args[1], args[2].bfloat16(), args[3]), options)


@pytest.mark.cpu_library
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_long_int8_sums_are_exact(bits):
    """All codes at one end: K = 200,000 passes int32."""
    k = 200_000
    options = {"bits": bits, "group_size": 0, "zero": "uint8"}
    x = torch.ones(2, k)
    x[1] = -1
    q = torch.full((3, k * bits // 8), 255, dtype=torch.uint8)
    q[1, -3:] = 0
    for zero in (0, 2**bits - 1, 3):
        args = x, q, torch.ones(3, 1), torch.full((3, 1), zero, dtype=torch.uint8)
        for backend in ("cpu", "reference"):
            with tilefuse.backend(backend):
                check_int8(args, options)


def test_spans_of_a_group_in_the_interpreter(monkeypatch, triton_backend):
    from tilefuse.triton_kernels.lowbit import lowbit_matmul

    monkeypatch.setattr(lowbit_matmul, "SPAN", type(lowbit_matmul.SPAN)(64))
    options = {"group_size": 0, "zero": "uint8"}
    check_int8(operands(3, 5, 150, dtype=torch.float32, **options), options)


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("size", [0, 1, 65])
def test_sizes(size, activation, device):
    for m, n, k in ((size, 3, 5), (3, size, 5), (3, 5, size), (size, size, size)):
        args = operands(m, n, k, device, torch.float32)
        if activation == "int8":
            check_int8(args, {})
        else:
            check(args, {})


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_any_rank_and_a_permutation(activation, device):
    x, q, scale, _ = operands(6, 17, 40, device)
    perm = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"group_size": 32, "activation": activation}
    expected = tilefuse.lowbit_matmul(x[:, perm].contiguous(), q, scale, **options)
    for index in (perm, perm.int()):
        assert_bit_equal(tilefuse.lowbit_matmul(x, q, scale, None, index, **options), expected)
    plain = tilefuse.lowbit_matmul(x, q, scale, **options)
    assert_bit_equal(tilefuse.lowbit_matmul(x.view(2, 3, 40), q, scale, **options), plain.view(2, 3, 17))
    assert_bit_equal(tilefuse.lowbit_matmul(x[2], q, scale, **options), plain[2])


def test_strides_and_neighbours(device):
    x, q, scale, zero = operands(5, 17, 70, device, zero="uint8")
    expected = tilefuse.lowbit_matmul(x, q, scale, zero, group_size=32)

    def minor(t):
        return t.t().contiguous().t()

    def surrounded(t):
        wide = t.new_full((t.shape[0] + 2, t.shape[1] + 7), math.nan if t.is_floating_point() else 77)
        wide[1:-1, 3:-4] = t
        return wide[1:-1, 3:-4]

    for change in (minor, surrounded):
        assert_bit_equal(tilefuse.lowbit_matmul(*map(change, (x, q, scale, zero)), group_size=32), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row(value, device):
    for m in (3, 9):
        x, q, scale, zero = operands(m, 70, 96, device, zero="uint8")
        clean = tilefuse.lowbit_matmul(x, q, scale, zero, group_size=32)
        x[1, 40] = value
        out = tilefuse.lowbit_matmul(x, q, scale, zero, group_size=32)
        assert not out[1].isfinite().any()
        keep = [i for i in range(m) if i != 1]
        assert_bit_equal(out[keep], clean[keep])
        # the group that a scale belongs to, and its column
        scale[5, 2] = math.nan
        out = tilefuse.lowbit_matmul(x, q, scale, zero, group_size=32)
        assert out[:, 5].isnan().all() and out[keep][:, 6:].isfinite().all()


@pytest.mark.parametrize("options", [{"zero": "float"}, {"bits": 6, "zero": "uint8"}, {"bits": 8, "group_size": 0}])
def test_gradient(options, device):
    x, q, scale, zero = operands(4, 19, 45, device, torch.float32, **options)
    perm = torch.arange(44, -1, -1, device=device)
    x.requires_grad_()
    out = tilefuse.lowbit_matmul(x, q, scale, zero, perm, **rule(options))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device)
    (grad,) = torch.autograd.grad(out, x, upstream)
    exact = (upstream.cpu().double() @ dequantised((x, q, scale, zero), options)).flip(1)
    torch.testing.assert_close(grad.cpu().double(), exact, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    x, q, scale, zero = operands(3, 6, 20, dtype=torch.float64, group_size=8, zero="uint8")
    x.requires_grad_()
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: tilefuse.lowbit_matmul(x, q, scale, zero, group_size=8), x, fast_mode=True
        )


def test_second_derivatives_are_refused():
    x, q, scale, _ = operands(3, 6, 32, dtype=torch.float32)
    x.requires_grad_()
    out = tilefuse.lowbit_matmul(x, q, scale, group_size=32)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        (grad.sum() + x.square().sum()).backward()


def test_autocast():
    x, q, scale, _ = operands(3, 6, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tilefuse.lowbit_matmul(x, q, scale, group_size=32)
    assert_bit_equal(out, tilefuse.lowbit_matmul(x.bfloat16(), q, scale, group_size=32))


@pytest.mark.cpu_library
def test_threads_change_no_bit():
    args = operands(70, 700, 640)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"), poisoned():
                found.append([tilefuse.lowbit_matmul(*args, group_size=32, activation=a) for a in ("float", "int8")])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert_bit_equal(a, b)


def every_shape():
    found = {}
    for name, (m, n, k, options) in SHAPES.items():
        args = operands(m, n, k, dtype=torch.float32, **options)
        if name in INTEGERS:
            found[name, "int8"] = tilefuse.lowbit_matmul(*args, **rule(options), activation="int8")
        found[name, "float"] = tilefuse.lowbit_matmul(*args, **rule(options))
        args = operands(m + 6, n, k, dtype=torch.float32, **options)
        found[name, "rows"] = tilefuse.lowbit_matmul(*args, **rule(options))
    return found


@pytest.mark.cpu_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni"])
def test_every_instruction_set(isa, on_instruction_set):
    """Integers have the same bits, floats differ in the rounding of their sums."""
    found = on_instruction_set(isa, every_shape)
    for (name, kind), expected in every_shape().items():
        if kind == "int8":
            assert_bit_equal(found[name, kind], expected, name=f"{isa} {name}")
        else:
            torch.testing.assert_close(found[name, kind], expected, rtol=1e-5, atol=1e-4)


def test_configurations():
    from tilefuse.triton_kernels.lowbit.lowbit_matmul import config

    assert [config(m, 4096).block_m for m in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 128]
    assert [config(1, group).block_k for group in (5, 32, 64, 4096)] == [32, 32, 64, 64]


X, Q = torch.zeros(4, 40), torch.zeros(6, 20, dtype=torch.uint8)
S, ZERO = torch.ones(6, 2), torch.zeros(6, 2, dtype=torch.uint8)
GOOD = {"x": X, "q": Q, "scale": S, "group_size": 32}
Q8 = torch.zeros(6, 40, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x must be float32 or"),
        ({"x": torch.zeros(())}, ValueError, r"x must be \[..., K\], got \[\] float32"),
        ({"q": Q[:, 1:]}, ValueError, r"q must be \[N, 20\] for 40 columns of 4 bits, got \[6, 19\] uint8"),
        ({"q": Q[0]}, ValueError, r"q must be \[N, 20\]"),
        ({"q": Q.to(torch.int8)}, TypeError, "q must be uint8, got"),
        ({"q": Q.to("meta")}, ValueError, "q must be on the device of x"),
        ({"bits": 5}, ValueError, "bits must be 8, 6 or 4, got 5"),
        ({"bits": 6}, ValueError, r"q must be \[N, 30\] for 40 columns of 6 bits"),
        ({"group_size": -1}, ValueError, "group_size must be"),
        ({"group_size": 64}, ValueError, r"scale must be \[6, 1\], got \[6, 2\] float32"),
        ({"scale": S[1:]}, ValueError, r"scale must be \[6, 2\], got \[5, 2\] float32"),
        ({"scale": S.double()}, TypeError, "scale must be float32 or bfloat16 or float16"),
        ({"scale": S.to("meta")}, ValueError, "scale must be on the device of x"),
        ({"scale": S.clone().requires_grad_()}, RuntimeError, ".*but scale requires grad"),
        ({"zero": ZERO[1:]}, ValueError, r"zero must be of scale's shape \[6, 2\], got \[5, 2\] uint8"),
        ({"zero": ZERO.int()}, TypeError, "zero must be uint8 or float32"),
        ({"zero": ZERO.to("meta")}, ValueError, "zero must be on the device of x"),
        ({"zero": torch.zeros(6, 2, requires_grad=True)}, RuntimeError, ".*but zero requires grad"),
        ({"zero": torch.zeros(6, 2), "activation": "int8"}, TypeError, "zero must be uint8 with activation 'int8'"),
        ({"q": Q8, "bits": 8}, ValueError, "zero must be given with uint8 codes of 8 bits, got None"),
        ({"perm": torch.zeros(40)}, TypeError, "perm must be int32 or int64"),
        ({"perm": torch.zeros(39, dtype=torch.int64)}, ValueError, r"perm must be \[40\], got \[39\] int64"),
        ({"perm": torch.zeros(40, dtype=torch.int64, device="meta")}, ValueError, "perm must be on the device of x"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[6\], got \[5\] float32"),
        ({"bias": torch.zeros(6, dtype=torch.int32)}, TypeError, "bias must be float32 or"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must be on the device of x"),
        ({"bias": torch.zeros(6, requires_grad=True)}, RuntimeError, ".*but bias requires grad"),
        ({"activation": "fp8"}, ValueError, "activation must be 'float' or 'int8', got 'fp8'"),
        ({"x": X.clone().requires_grad_(), "activation": "int8"}, RuntimeError, ".*but x requires grad"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ],
)
def test_errors(change, error, message):
    for call in (tilefuse.lowbit_matmul, torch.ops.tilefuse.lowbit_matmul):
        with pytest.raises(error, match=f"^tilefuse.lowbit_matmul: {message}"):
            call(**GOOD | change)
