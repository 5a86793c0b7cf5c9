"""``int_quantize`` and ``int_dequantize``."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.fp8.quantize import DTYPES, magnitudes, random_bits

KERNEL = "int_quantize_fwd"
BITS = (8, 6, 4)
each_bits = pytest.mark.parametrize("bits", BITS)
each_symmetric = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
F32 = np.float32
INF, NAN = math.inf, math.nan


def group_rule(values, bits, symmetric, eps):
    """The rule of one group in numpy's float32: codes from 0 on (8 symmetric bits: signed), scale and zero."""
    finite = values[np.isfinite(values)]
    largest = F32(2 ** (bits - 1) - 1)
    zero = 0 if bits == 8 else 2 ** (bits - 1)
    with np.errstate(all="ignore"):
        if symmetric:
            span, steps = np.abs(finite).max(initial=F32(0)), largest
        else:
            low, high = finite.min(initial=F32(0)), finite.max(initial=F32(0))
            span, steps = min(F32(high - low), np.finfo(F32).max), F32(2**bits - 1)
        scale = F32(1) if span == 0 else F32(max(span, F32(eps)) / steps)
        if not symmetric:
            zero = int(np.clip(np.rint(-low / scale), 0, steps))
        quotient = values / scale
        assert quotient.dtype == scale.dtype == F32
        if symmetric:
            codes = np.rint(np.clip(quotient, -largest, largest)) + zero
        else:
            codes = np.clip(np.rint(quotient) + zero, 0, steps)
    return [zero if math.isnan(v) else int(c) for v, c in zip(values, codes)], scale, zero


def stored(codes, zero, bits):
    """The bytes of a row of codes, by the words of the docstring."""
    if bits == 8:
        return codes
    unit = 2 if bits == 4 else 4
    codes = codes + [zero] * (-len(codes) % unit)
    out = []
    for start in range(0, len(codes), 32):
        block = codes[start : start + 32]
        out += [low % 16 + 16 * (high % 16) for low, high in zip(block[::2], block[1::2])]
        if bits == 6:
            for quad in zip(*(block[i::4] for i in range(4))):
                out.append(sum(code // 16 * 4**i for i, code in enumerate(quad)))
    return out


def rule(x, bits=8, group_size=0, symmetric=True, eps=1e-12):
    """(q, scale, zero) of x, row by row and group by group."""
    lead, k = x.shape[:-1], x.shape[-1]
    size = group_size or max(k, 1)
    q, scales, zeros = [], [], []
    for row in x.reshape(math.prod(lead), k).float().numpy():
        starts = range(0, k, size) if k or group_size else [0]
        found = [group_rule(row[start : start + size], bits, symmetric, eps) for start in starts]
        q.append(stored([code for codes, *_ in found for code in codes], found[-1][2] if found else 0, bits))
        scales.append([scale for _, scale, _ in found])
        zeros.append([zero for *_, zero in found])
    dtype = torch.int8 if bits == 8 and symmetric else torch.uint8
    made = (torch.tensor(q, dtype=dtype), torch.from_numpy(np.array(scales, F32)), torch.tensor(zeros).to(torch.uint8))
    width = {8: k, 6: -(-k // 4) * 3, 4: -(-k // 2)}[bits]
    groups = -(-k // group_size) if group_size else 1
    return made[0].reshape(*lead, width), made[1].reshape(*lead, groups), made[2].reshape(*lead, groups)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.is_contiguous()
        assert_bit_equal(a.cpu(), b)


def check(x, device, **options):
    with poisoned():
        got = tilefuse.int_quantize(x.to(device), **options)
    same(got, rule(x, **options))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_bits
@each_symmetric
def test_any_bits(dtype, bits, symmetric, device):
    """Every exponent, NaN, infinities, subnormals; ragged groups and bytes."""
    for shape, group_size in (((3, 45), 32), ((2, 2, 39), 0), ((3, 70), 8)):
        for make in (random_bits, magnitudes):
            check(make(shape, dtype), device, bits=bits, group_size=group_size, symmetric=symmetric)


@each_bits
@pytest.mark.parametrize("group_size", [32, 64, 128, 0])
def test_columns_around_vectors_and_pieces(bits, group_size, device):
    few = device == "cpu" and tilefuse.backend() == "triton"
    for columns in (1, 31, 64, 129) if few else (*range(1, 36), 63, 64, 65, 127, 128, 129, 1023, 1024, 1028, 2081):
        check(magnitudes((2, columns), torch.bfloat16), device, bits=bits, group_size=group_size)


@pytest.mark.parametrize("group_size", [1, 3, 5, 7, 33])
@each_bits
def test_groups_that_share_bytes(bits, group_size):
    """Triton leaves them to the reference."""
    x = magnitudes((3, 71), torch.float32)
    for symmetric in (True, False):
        check(x, "cpu", bits=bits, group_size=group_size, symmetric=symmetric)
    if bits != 8:
        with tilefuse.backend("triton"), pytest.raises(NotImplementedError, match="groups that share a byte"):
            tilefuse.int_quantize(x, bits=bits, group_size=group_size)


@each_bits
@each_symmetric
def test_extremes_at_every_exponent(bits, symmetric, device):
    exponents = torch.arange(-149, 128)
    values = torch.tensor([1.0, -0.7, 0.31, 0.0])
    x = (values.double() * torch.ldexp(torch.ones(277).double(), exponents)[:, None]).float()
    check(x, device, bits=bits, symmetric=symmetric)
    check(x, device, bits=bits, symmetric=symmetric, eps=1e-35)


@each_bits
@each_symmetric
def test_values_that_are_no_numbers(bits, symmetric, device):
    big = 3e38
    rows = [
        [0.0, -0.0, 0.0, 0.0],
        [NAN, 1.0, -2.0, 0.5],
        [INF, 1.0, -2.0, -INF],
        [NAN, NAN, INF, -INF],
        [1e-40, -1e-40, 0.0, 1e-45],
        [big, -big, big / 2, 0.0],
        [-big, -big, -1.0, -0.0],
        [1e-13, -1e-20, 1e-12, 0.0],
    ]
    x = torch.tensor(rows)
    q, scale, zero = check(x, device, bits=bits, symmetric=symmetric)
    clean = x.clone()
    clean[1, 0] = 0.0
    # NaN is 0 in its own element, and changes nothing beside it
    same([t[:2].cpu() for t in (q, scale, zero)], [t[:2] for t in rule(clean, bits=bits, symmetric=symmetric)])
    back = tilefuse.int_dequantize(q, scale, zero, bits=bits, out_dtype=torch.float32).cpu()
    assert back[0].eq(0).all() and not back[0].signbit().any()
    assert back[1, 0] == 0 and back[3, :2].eq(0).all()
    assert back[2, 0] >= back[2, 1] and back[2, 3] <= back[2, 2]


@each_bits
@each_symmetric
def test_next_to_midpoints(bits, symmetric, device):
    """Quotients within some ulp of the middle of two codes: a product with the reciprocal would show."""
    generator = torch.Generator().manual_seed(0)
    end = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    amax = torch.ldexp(1 + torch.rand((6, 1), generator=generator), torch.randint(-20, 20, (6, 1), generator=generator))
    scale = amax / torch.full_like(amax, end)
    middles = (torch.arange(end, dtype=torch.float32) + 0.5)[None] * scale
    parts = [amax]
    for steps in range(-2, 3):
        x = middles
        for _ in range(abs(steps)):
            x = torch.nextafter(x, torch.full_like(x, math.copysign(INF, steps)))
        sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        parts.append(torch.minimum(x, amax) * (sign if symmetric else 1))
    check(torch.cat(parts, 1), device, bits=bits, symmetric=symmetric)


@hypothesis.given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=70),
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from([0, 1, 6, 32]),
)
def test_any_values(values, bits, symmetric, group_size):
    x = torch.tensor([values], dtype=torch.float32)
    check(x, "cpu", bits=bits, symmetric=symmetric, group_size=group_size)


def test_symmetric_codes_leave_the_lowest_out():
    x = torch.cat((torch.linspace(-1, 1, 513), torch.tensor([-INF])))[None]
    assert tilefuse.int_quantize(x)[0].min() == -127
    q, _, zero = tilefuse.int_quantize(x, bits=4)
    assert min((q & 15).min(), (q >> 4).min()) == 1 and zero.item() == 8


@each_bits
def test_empty(bits, device):
    unit = {8: 1, 6: 4, 4: 2}[bits]
    empty = ((0, 64), 32, 2), ((3, 0), 0, 1), ((3, 0), 32, 0), ((0, 0), 0, 1), ((2, 0, 5), 0, 1)
    for shape, group_size, groups in empty:
        q, scale, zero = check(torch.zeros(shape), device, bits=bits, group_size=group_size)
        assert scale.shape == zero.shape == (*shape[:-1], groups)
        out = tilefuse.int_dequantize(q, scale, zero, bits=bits, group_size=group_size)
        assert out.shape == (*shape[:-1], unit * -(-shape[-1] // unit))
    # a group without values has a scale of 1
    _, scale, zero = tilefuse.int_quantize(torch.zeros(2, 0, device=device), bits=bits)
    assert scale.eq(1).all() and zero.eq(0 if bits == 8 else 2 ** (bits - 1)).all()


def test_strides(device):
    base = magnitudes((9, 3, 100), torch.bfloat16)
    views = base[:, 1, 7:77], base[::2, 0], base[:, 0].t(), base[:1, 0].expand(4, -1), base[:, :, :40].transpose(0, 1)
    for x in views:
        view = x.to(device)
        got = tilefuse.int_quantize(view, bits=6, group_size=32)
        same(got, rule(x, bits=6, group_size=32))
    view = base.to(device)[:, 1, 7:77]
    assert view.stride() == (300, 1)
    same(tilefuse.int_quantize(view, bits=4, group_size=16), rule(base[:, 1, 7:77], bits=4, group_size=16))


def test_offsets_beyond_int32(device):
    """Rows 2^30 elements apart, a stride that fits int32; untouched pages of the allocation cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    x = torch.empty(2 * 2**30 + 64, dtype=torch.bfloat16, device=device).as_strided((3, 64), (2**30, 1))
    x.copy_(magnitudes((3, 64), torch.bfloat16))
    same(tilefuse.int_quantize(x, bits=4, group_size=32), rule(x.cpu().contiguous(), bits=4, group_size=32))
    codes = torch.empty(2 * 2**30 + 24, dtype=torch.uint8, device=device).as_strided((3, 24), (2**30, 1))
    codes.copy_(torch.arange(72, dtype=torch.uint8).view(3, 24))
    scale = torch.ones(3, 1, device=device)
    assert_bit_equal(
        tilefuse.int_dequantize(codes, scale, bits=6), tilefuse.int_dequantize(codes.contiguous(), scale, bits=6)
    )


@pytest.mark.cpu_library
@each_bits
def test_large_outputs_are_whole(bits):
    """Above 2 MiB results are written past the caches; threads change no bit."""
    x = magnitudes((300, {8: 7003, 6: 9402, 4: 14101}[bits]), torch.bfloat16)
    options = {"bits": bits, "group_size": 128}
    with tilefuse.backend("reference"):
        expected = tilefuse.int_quantize(x, **options)
        back = tilefuse.int_dequantize(*expected, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"), poisoned():
                same(tilefuse.int_quantize(x, **options), expected)
                assert_bit_equal(tilefuse.int_dequantize(*expected, **options), back)
    finally:
        torch.set_num_threads(before)


def codes_of_every_kind():
    """What the instruction sets must agree on."""
    found = []
    for dtype in DTYPES:
        for bits in BITS:
            for symmetric in (True, False):
                options = {"bits": bits, "group_size": 24, "symmetric": symmetric}
                for x in (random_bits((5, 1077), dtype), magnitudes((5, 1077), dtype)):
                    q, scale, zero = tilefuse.int_quantize(x, **options)
                    back = tilefuse.int_dequantize(q, scale, zero, bits=bits, group_size=24, out_dtype=dtype)
                    found += [q, scale, zero, back]
    return found


@pytest.mark.cpu_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa, on_instruction_set):
    with tilefuse.backend("reference"):
        expected = codes_of_every_kind()
    for a, b in zip(on_instruction_set(isa, codes_of_every_kind), expected, strict=True):
        assert_bit_equal(a, b)


def decoded(q, bits, columns):
    """Codes by the words of the docstring, one at a time."""
    if bits == 8:
        return [int(v) for v in q]
    codes = []
    for i in range(columns):
        start, at = i // 32 * 32, i % 32
        if bits == 4:
            codes.append(int(q[i // 2]) // 16 ** (i % 2) % 16)
            continue
        planes = q[start // 32 * 24 :]
        half = min(32, columns - start) // 2
        low, high = int(planes[at // 2]), int(planes[half + at // 4])
        codes.append(low // 16 ** (at % 2) % 16 + high // 4 ** (at % 4) % 4 * 16)
    return codes


@each_bits
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float", "none"])
def test_dequantized_values(bits, out_dtype, kind, device):
    generator = torch.Generator().manual_seed(bits)
    size, columns = {8: (75, 75), 6: (57, 76), 4: (38, 76)}[bits]
    q = torch.randint(0, 256, (3, size), generator=generator, dtype=torch.uint8)
    if bits == 8 and kind == "none":
        q = q.view(torch.int8)
    scale = torch.rand((3, 3), generator=generator) + 0.1
    zero = {
        "uint8": torch.randint(0, 2**bits, (3, 3), generator=generator, dtype=torch.uint8),
        "float": torch.randn((3, 3), generator=generator) * 5,
        "none": None,
    }[kind]
    middle = torch.full((3, 3), 0 if bits == 8 else 2 ** (bits - 1))
    group = torch.arange(columns) // 32
    codes = torch.tensor([decoded(row, bits, columns) for row in q], dtype=torch.float32)
    expected = (codes - (middle if zero is None else zero)[:, group].float()) * scale[:, group]
    with poisoned():
        out = tilefuse.int_dequantize(
            q.to(device),
            scale.to(device),
            None if zero is None else zero.to(device),
            bits=bits,
            group_size=32,
            out_dtype=out_dtype,
        )
    assert_bit_equal(out.cpu(), expected.to(out_dtype))


@each_bits
@pytest.mark.parametrize("columns", [1, 2, 3, 33, 70, 71])
def test_filling_is_zero(bits, columns, device):
    """Also where it would begin another group."""
    x = magnitudes((2, columns), torch.float32) + 1
    for group_size in (0, columns, 7, 32):
        for symmetric in (True, False):
            with tilefuse.backend("reference"):
                q, scale, zero = tilefuse.int_quantize(x, bits=bits, group_size=group_size, symmetric=symmetric)
            args = (q.to(device), scale.to(device), zero.to(device))
            back = tilefuse.int_dequantize(*args, bits=bits, group_size=group_size, out_dtype=torch.float32).cpu()
            assert back[:, columns:].eq(0).all()
            size = group_size or columns
            step = scale[:, torch.arange(columns) // size]
            # an asymmetric end may round past the codes
            assert ((back[:, :columns] - x).abs() <= step * (0.5001 if symmetric else 1.001)).all()


def test_narrow_scales_are_read_as_float32(device):
    q, scale, zero = tilefuse.int_quantize(magnitudes((3, 64), torch.float32).to(device), bits=4, group_size=32)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = scale.to(dtype)
        assert_bit_equal(
            tilefuse.int_dequantize(q, narrow, zero, bits=4, group_size=32),
            tilefuse.int_dequantize(q, narrow.float(), zero, bits=4, group_size=32),
        )
    one = torch.ones(1, 1, device=device).expand(3, 2)
    assert_bit_equal(
        tilefuse.int_dequantize(q, one, zero, bits=4, group_size=32),
        tilefuse.int_dequantize(q, one.contiguous(), bits=4, group_size=32),
    )


def test_rows_are_independent(device):
    x = magnitudes((9, 200), torch.bfloat16).to(device)
    whole = tilefuse.int_quantize(x, bits=4, group_size=64)
    same([t.cpu() for t in tilefuse.int_quantize(x[4:5], bits=4, group_size=64)], [t[4:5].cpu() for t in whole])


def test_float64_on_the_reference():
    x = torch.randn(3, 70, dtype=torch.float64)
    same(tilefuse.int_quantize(x, bits=4), tilefuse.int_quantize(x.float(), bits=4))
    q, scale, zero = tilefuse.int_quantize(x, bits=8, group_size=32)
    out = tilefuse.int_dequantize(q, scale, zero, group_size=32, out_dtype=torch.float64)
    assert_bit_equal(out, q.double() * scale.double().repeat_interleave(32, 1)[:, :70])
    with tilefuse.backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        tilefuse.int_dequantize(q, scale, zero, group_size=32, out_dtype=torch.float64)


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X.int(), {}, TypeError, "x must be float32 or"),
        (torch.tensor(1.0), {}, ValueError, r"x must be \[..., K\]"),
        (X, {"bits": 5}, ValueError, "bits must be 8, 6 or 4, got 5"),
        (X, {"bits": 16}, ValueError, "bits must be 8, 6 or 4, got 16"),
        (X, {"group_size": -1}, ValueError, "group_size must be at least 1, or 0 for the whole last dim, got -1"),
        (X, {"eps": 0.0}, ValueError, "eps must be in"),
        (X, {"eps": -1e-3}, ValueError, "eps must be in"),
        (X, {"eps": 1e-37}, ValueError, "eps must be in"),
        (X, {"eps": NAN}, ValueError, "eps must be in"),
        (X, {"eps": INF}, ValueError, "eps must be in"),
    ],
)
def test_errors(x, options, error, message):
    for call in (tilefuse.int_quantize, torch.ops.tilefuse.int_quantize):
        with pytest.raises(error, match=f"^tilefuse.int_quantize: {message}"):
            call(x, **options)


Q, SCALE, ZERO = torch.zeros(2, 12, dtype=torch.uint8), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Q.int(), SCALE), {}, TypeError, "q must be uint8 or int8"),
        ((Q.view(torch.int8), SCALE), {"bits": 4}, TypeError, "q must be uint8, got"),
        ((Q[0, 0], SCALE), {"bits": 4}, ValueError, r"q must be \[..., bytes of K codes\]"),
        ((Q[:, 1:], SCALE), {"bits": 6}, ValueError, r"q must be \[..., a multiple of 3 bytes\] with 6 bits"),
        ((Q, SCALE, ZERO), {"bits": 7}, ValueError, "bits must be"),
        ((Q, SCALE, ZERO), {"group_size": -2}, ValueError, "group_size must be"),
        ((Q, SCALE.double(), ZERO), {"group_size": 4}, TypeError, "scale must be float32 or"),
        ((Q, SCALE, ZERO), {"group_size": 0}, ValueError, r"scale must be \[2\] with 1 groups, got \[2, 3\]"),
        ((Q, SCALE[:1], ZERO), {"group_size": 4}, ValueError, r"scale must be \[2\] with 3 groups"),
        ((Q, SCALE[:, :2], ZERO), {"group_size": 4}, ValueError, r"scale must be \[2\] with 3 groups"),
        ((Q, SCALE, ZERO), {"group_size": 23, "bits": 4}, ValueError, r"scale must be \[2\] with 1 to 2 groups"),
        ((Q, SCALE.to("meta"), ZERO), {"group_size": 4}, ValueError, "scale must be on the device of q"),
        ((Q, SCALE, ZERO.int()), {"group_size": 4}, TypeError, "zero must be uint8 or float32"),
        ((Q, SCALE, ZERO[:, :1]), {"group_size": 4}, ValueError, r"zero must be of scale's shape \[2, 3\]"),
        ((Q, SCALE, ZERO.to("meta")), {"group_size": 4}, ValueError, "zero must be on the device of q"),
        ((Q, SCALE), {"group_size": 4}, ValueError, "zero must be given with uint8 codes of 8 bits, got None"),
        ((Q, SCALE, ZERO), {"group_size": 4, "out_dtype": torch.int8}, TypeError, "out_dtype must be float32 or"),
    ],
)
def test_dequantize_errors(args, options, error, message):
    for call in (tilefuse.int_dequantize, torch.ops.tilefuse.int_dequantize):
        with pytest.raises(error, match=f"^tilefuse.int_dequantize: {message}"):
            call(*args, **options)


def test_no_gradient():
    x = torch.randn(4, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"fake_quantize has one.*x requires grad"):
        tilefuse.int_quantize(x)
    with torch.no_grad():
        q, scale, zero = tilefuse.int_quantize(x)
    with pytest.raises(RuntimeError, match="scale requires grad"):
        tilefuse.int_dequantize(q, scale.requires_grad_(), zero)
    with pytest.raises(RuntimeError, match="zero requires grad"):
        tilefuse.int_dequantize(q, scale.detach(), zero.float().requires_grad_())
