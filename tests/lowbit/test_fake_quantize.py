"""``fake_quantize``."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.fp8.quantize import DTYPES, magnitudes, random_bits
from tilefuse.testing.inputs.lowbit.fake_quantize import cases, given
from tilefuse.testing.inputs.norm.rms_norm import normal

case = by_name(cases)
KERNEL = "fake_quantize_fwd"
BITS = (8, 6, 4)
each_bits = pytest.mark.parametrize("bits", BITS)
each_symmetric = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
NAN, INF = math.nan, math.inf
EPS = 1e-12


class Straight(torch.autograd.Function):
    """Rounding whose derivative is 1."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, dout):
        return dout


def spread(values, group_size):
    """[.., G, elements] of values, the last group filled up with NaN, and the number of columns."""
    k = values.shape[-1]
    size = group_size or k
    padded = torch.nn.functional.pad(values, (0, -k % size), value=NAN)
    return padded.unflatten(-1, (-1, size))


def eager(x, scale=None, zero=None, bits=4, group_size=128, symmetric=True, scale_gradient=False):
    """As modules for quantisation-aware training write it, in the dtype of the arithmetic, for finite values."""
    wide = x if x.dtype == torch.float64 else x.float()
    groups = spread(wide, group_size)
    there = ~groups.isnan()
    values = torch.where(there, groups, 0.0)
    qmax, top = 2 ** (bits - 1) - 1, 2**bits - 1
    own = scale is None
    if own and symmetric:
        amax = values.abs().amax(-1)
        scale = torch.where(amax == 0, 1.0, amax.clamp(min=EPS) / qmax)
    elif own:
        high = torch.where(there, groups, -INF).amax(-1).clamp(min=0)
        low = torch.where(there, groups, INF).amin(-1).clamp(max=0)
        scale = torch.where(high == low, 1.0, (high - low).clamp(min=EPS) / top)
        zero = (-low / scale).round().clamp(0, top).detach()
    if own and not scale_gradient:
        scale = scale.detach()
    y = values / scale.unsqueeze(-1)
    if own and symmetric:
        level = Straight.apply(y).clamp(-qmax - 1e-3, qmax + 1e-3)
    elif symmetric:
        level = Straight.apply(y.clamp(-qmax, qmax))
    else:
        code = Straight.apply(y) + zero.unsqueeze(-1)
        # the derivative of a clamp, but 0 outside alone
        level = code.clamp(0, top) - zero.unsqueeze(-1)
    out = level * scale.unsqueeze(-1)
    return out.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def run(function, tensors, options, dtype=None):
    """The output and the gradients of x and, where it is given, scale, for a fixed upstream gradient."""
    x, scale, zero = tensors
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, scale)]
    out = function(*leaves, zero, **options)
    upstream = normal(*out.shape, seed=7).to(x.device, x.dtype).to(out.dtype)
    return out, *torch.autograd.grad(out, [t for t in leaves if t is not None], upstream)


CASES = [case[0] for case in cases("cpu", torch.float32)]
CASES_AND_DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16 or name in ("own", "own_asymmetric", "amax", "given_asymmetric")
]


@pytest.mark.parametrize("name", CASES)
def test_reference_is_autograd_of_the_formula(name):
    """In float64 from values whose float32 codes are those of float64."""
    tensors, options = case(name, dtype=torch.float32)
    tensors = tuple(t if t is None or t.dtype == torch.uint8 else t.double() for t in tensors)
    with tilefuse.backend("reference"):
        for a, b in zip(run(tilefuse.fake_quantize, tensors, options), run(eager, tensors, options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), CASES_AND_DTYPES, ids=str)
def test_matches_oracle(name, dtype, device):
    tensors, options = case(name, device, dtype)
    with poisoned():
        found = run(tilefuse.fake_quantize, tensors, options)
    with tilefuse.backend("reference"):
        exact = run(tilefuse.fake_quantize, tensors, options, torch.float64)
        plain = run(tilefuse.fake_quantize, tensors, options)
    assert_bit_equal(found[0], plain[0])
    for a, b, c in zip(found, exact, run(eager, tensors, options), strict=True):
        assert a.dtype == c.dtype and a.shape == c.shape and a.is_contiguous()
        assert_close(a, b, c, name=name)
    if not options.get("scale_gradient"):
        # dx is the upstream gradient or nothing
        assert_bit_equal(found[1], plain[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_bits
@each_symmetric
def test_equals_quantize_and_dequantize(dtype, bits, symmetric, device):
    for shape, group_size in (((3, 77), 32), ((2, 2, 40), 0)):
        for make in (random_bits, magnitudes):
            x = make(shape, dtype).to(device)
            options = {"bits": bits, "group_size": group_size}
            with poisoned():
                out = tilefuse.fake_quantize(x, **options, symmetric=symmetric)
            codes = tilefuse.int_quantize(x, **options, symmetric=symmetric)
            back = tilefuse.int_dequantize(*codes, **options, out_dtype=dtype)
            assert_bit_equal(out, back[..., : shape[-1]], nan_bits=True)
            # the same scales, given
            zero = None if symmetric else codes[2]
            assert_bit_equal(tilefuse.fake_quantize(x, codes[1], zero, **options, symmetric=symmetric), out)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1023, 1024, 1025, 2100])
def test_masks_around_vectors_and_pieces(columns, where):
    """The gradient is 0 exactly where the quotient is outside, and the mask has the same bits on every backend."""
    x = normal(2, columns).to(where)
    scale = torch.full((2, 1), 0.1, device=where)
    leaf = x.clone().requires_grad_()
    with poisoned():
        out = tilefuse.fake_quantize(leaf, scale, group_size=0)
        (dx,) = torch.autograd.grad(out.sum(), leaf)
    assert_bit_equal(dx, ((x / 0.1).abs() <= 7).float())
    _, mask = torch.ops.tilefuse.fake_quantize_fwd(x, scale, None, 4, 0, True, False, True)
    bits = torch.stack([mask >> i & 1 for i in range(8)], -1).flatten(1)
    assert_bit_equal(bits[:, :columns].float(), dx)
    assert bits[:, columns:].eq(0).all()


def test_clamps_at_the_ends(device):
    """|x / s| = qmax is inside; asymmetric codes count after rounding."""
    scale, zero = torch.ones(1, 1, device=device), torch.full((1, 1), 3, dtype=torch.uint8, device=device)
    x = torch.tensor([[7.0, -7.0, 7.0000005, 7.4, -7.5, 0.3, -0.0, NAN, INF, -INF]], device=device)
    leaf = x.clone().requires_grad_()
    out = tilefuse.fake_quantize(leaf, scale)
    assert out.tolist() == [[7.0, -7.0, 7.0, 7.0, -7.0, 0.0, 0.0, 0.0, 7.0, -7.0]]
    assert not out[0, 6].signbit()
    assert torch.autograd.grad(out.sum(), leaf)[0].tolist() == [[1, 1, 0, 0, 0, 1, 1, 1, 0, 0]]
    x = torch.tensor([[12.0, 12.5, 12.500001, -3.0, -3.5, -3.4999, 100.0, NAN, INF, -INF]], device=device)
    leaf = x.clone().requires_grad_()
    out = tilefuse.fake_quantize(leaf, scale, zero, symmetric=False)
    assert out.tolist() == [[12.0, 12.0, 12.0, -3.0, -3.0, -3.0, 12.0, 0.0, 12.0, -3.0]]
    assert torch.autograd.grad(out.sum(), leaf)[0].tolist() == [[1, 1, 0, 1, 0, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_symmetric_scales_never_clamp(dtype, device):
    """Although the largest quotient can lie an ulp past the end."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand((400, 2), generator=generator) + 0.5).to(dtype)
    scale = x.float().amax(-1) / torch.full((400,), 127.0)
    past = x.float().amax(-1) / scale > 127
    assert dtype != torch.float32 or past.any()
    leaf = x.to(device).requires_grad_()
    out = tilefuse.fake_quantize(leaf, bits=8, group_size=0)
    (dx,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert dx.eq(1).all()


def saved_bytes(function, *leaves):
    """Bytes that autograd keeps, and the tensors."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*leaves)
    return sum(t.numel() * t.element_size() for t in kept), kept


def test_what_is_saved():
    x = normal(16, 256).requires_grad_()
    scale = torch.full((16, 2), 0.2)
    assert saved_bytes(lambda x: tilefuse.fake_quantize(x), x)[0] == 0
    assert saved_bytes(lambda x: tilefuse.fake_quantize(x, symmetric=False), x)[0] == 16 * 256 // 8
    assert saved_bytes(lambda x: tilefuse.fake_quantize(x, scale), x)[0] == 16 * 256 // 8
    # x and scale themselves
    scale.requires_grad_()
    _, kept = saved_bytes(lambda x, s: tilefuse.fake_quantize(x, s), x, scale)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), scale.data_ptr()}
    with torch.no_grad():
        assert not tilefuse.fake_quantize(x, scale).requires_grad


@each_symmetric
def test_nan_is_local(symmetric, device):
    """In the values, in both gradients, and through the extremes."""
    x = normal(3, 96)
    dirty = x.clone()
    dirty[1, 40] = NAN
    zeroed = x.clone()
    zeroed[1, 40] = 0.0
    scale, zero = given(x, 4, 32, symmetric)
    for tensors, more in (((None, None), {}), ((None, None), {"scale_gradient": True}), ((scale, zero), {})):
        options = {"group_size": 32, "symmetric": symmetric} | more
        tensors = tuple(None if t is None else t.to(device) for t in tensors)
        found = run(tilefuse.fake_quantize, (dirty.to(device), *tensors), options)
        expected = run(tilefuse.fake_quantize, (zeroed.to(device), *tensors), options)
        for a, b in zip(found, expected, strict=True):
            assert_bit_equal(a, b)


def test_infinities_do_not_reach_other_gradients(device):
    x = normal(2, 64)
    x[0, 3], x[0, 40] = INF, -INF
    for symmetric in (True, False):
        options = {"group_size": 32, "symmetric": symmetric, "scale_gradient": True}
        _, dx = run(tilefuse.fake_quantize, (x.to(device), None, None), options)
        assert dx.isfinite().all()
        with tilefuse.backend("reference"):
            exact = run(tilefuse.fake_quantize, (x.to(device), None, None), options, torch.float64)[1]
        torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-5)


def test_ties_share_as_torch_amax_does(device):
    values = [1.0, -1.0, 1.0, 0.3, 0.2, -0.5, 0.0, 0.7]
    upstream = torch.arange(1.0, 9.0, device=device)[None]
    for symmetric, x in ((True, values), (False, values), (False, [abs(v) for v in values]), (True, [0.0] * 8)):
        options = {"bits": 4, "group_size": 8, "symmetric": symmetric, "scale_gradient": True}
        found = []
        for function in (tilefuse.fake_quantize, eager):
            leaf = torch.tensor([x], device=device).requires_grad_()
            found.append(torch.autograd.grad(function(leaf, **options), leaf, upstream)[0])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    # where eps is the range, nothing flows through it
    leaf = torch.full((1, 8), 1e-20, device=device).requires_grad_()
    out = tilefuse.fake_quantize(leaf, group_size=8, scale_gradient=True)
    assert_bit_equal(torch.autograd.grad(out, leaf, upstream)[0], upstream)


def test_gradient_of_a_narrow_scale(device):
    x = normal(3, 64).to(device, torch.bfloat16)
    scale = given(x, 4, 32)[0].bfloat16()
    options = {"group_size": 32}
    narrow = run(tilefuse.fake_quantize, (x, scale, None), options)
    wide = run(tilefuse.fake_quantize, (x, scale.float(), None), options)
    assert_bit_equal(narrow[0], wide[0])
    assert narrow[2].dtype == torch.bfloat16
    assert_bit_equal(narrow[2], wide[2].bfloat16())
    # one scale for all: its gradient is the sum
    leaf = torch.full((1, 1), 0.2, device=device).requires_grad_()
    tilefuse.fake_quantize(x, leaf.expand(3, 2), group_size=32).float().sum().backward()
    assert leaf.grad.shape == (1, 1) and leaf.grad.isfinite().all()


@pytest.mark.parametrize("needed", ["x", "scale", "both"])
def test_frozen_arguments(needed, device):
    tensors, options = case("given", device)
    out, *everything = run(tilefuse.fake_quantize, tensors, options)
    x, scale = tensors[0].detach().clone(), tensors[1].detach().clone()
    leaves = [t.requires_grad_() for t, name in ((x, "x"), (scale, "scale")) if needed in (name, "both")]
    again = tilefuse.fake_quantize(x, scale, **options)
    upstream = normal(*out.shape, seed=7).to(out.device)
    for _ in range(2):
        # a second backward finds what was saved as it was
        grads = torch.autograd.grad(again, leaves, upstream, retain_graph=True)
        for a, b in zip(grads, everything if needed == "both" else everything[:1] if needed == "x" else everything[1:]):
            assert_bit_equal(a, b)


@pytest.mark.cpu_library
@pytest.mark.parametrize("group_size", [1, 5, 20, 33])
def test_groups_that_share_bytes_of_the_mask(group_size):
    """Triton leaves them to the reference."""
    x = normal(3, 71)
    scale, zero = given(x, 4, group_size, False)
    found = []
    for backend in ("cpu", "reference"):
        with tilefuse.backend(backend):
            leaf = x.clone().requires_grad_()
            out = tilefuse.fake_quantize(leaf, scale, zero, group_size=group_size, symmetric=False)
            found.append((out, *torch.autograd.grad(out.sum(), leaf)))
    for a, b in zip(*found):
        assert_bit_equal(a, b)
    assert 0 < found[0][1].eq(0).sum() < x.numel()
    with tilefuse.backend("triton"), pytest.raises(NotImplementedError, match="groups that share a byte of the mask"):
        tilefuse.fake_quantize(leaf, scale, zero, group_size=group_size, symmetric=False)


@pytest.mark.cpu_library
def test_large_tensors_are_whole():
    """Above 2 MiB results are written past the caches; threads change no bit."""
    x = normal(300, 4003).bfloat16()
    scale = given(x, 4, 128)[0]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"), poisoned():
                found.append(
                    [
                        *run(tilefuse.fake_quantize, (x, scale, None), {}),
                        *run(tilefuse.fake_quantize, (x, None, None), {"symmetric": False}),
                        *run(tilefuse.fake_quantize, (x, None, None), {"scale_gradient": True}),
                    ]
                )
    finally:
        torch.set_num_threads(before)
    with tilefuse.backend("cpu"):
        few = run(tilefuse.fake_quantize, (x[:3], scale[:3], None), {})[0]
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any()
        assert_bit_equal(a, b)
    assert_bit_equal(found[0][0][:3], few)


def results_of_every_kind():
    """What the instruction sets must agree on, sums included."""
    found = []
    for dtype in DTYPES:
        for name in CASES:
            found += run(tilefuse.fake_quantize, *case(name, "cpu", dtype))
        x = normal(2, 5000).to(dtype)
        found += run(tilefuse.fake_quantize, (x, *given(x, 8, 0)), {"bits": 8, "group_size": 0})
    return [t.detach() for t in found]


@pytest.mark.cpu_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(isa, on_instruction_set):
    for a, b in zip(on_instruction_set(isa, results_of_every_kind), results_of_every_kind(), strict=True):
        assert_bit_equal(a, b)


def test_offsets_past_int32(device):
    """Rows 2**30 elements apart, at a stride that fits int32. Untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    storage = torch.empty(2**31 + 130, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 64), (2**30 + 1, 1))
    far.copy_(normal(3, 64))
    for options in ({"group_size": 32, "symmetric": False}, {"group_size": 32, "scale_gradient": True}):
        found = []
        for x in (far, far.contiguous()):
            leaf = x.detach().requires_grad_()
            out = tilefuse.fake_quantize(leaf, **options)
            found.append((out, torch.autograd.grad(out, leaf, torch.ones_like(out))[0]))
        for a, b in zip(*found):
            assert_bit_equal(a, b)


def test_empty(device):
    for shape in ((0, 64), (3, 0), (2, 0, 5)):
        for group_size in (0, 32):
            x = torch.zeros(shape, device=device)
            scale = torch.ones(*shape[:-1], 1 if group_size == 0 else -(-shape[-1] // 32), device=device)
            out, dx, dscale = run(tilefuse.fake_quantize, (x, scale, None), {"group_size": group_size})
            assert out.shape == dx.shape == shape and dscale.shape == scale.shape and dscale.eq(0).all()
            for more in ({}, {"symmetric": False}, {"scale_gradient": True}):
                options = {"group_size": group_size} | more
                assert run(tilefuse.fake_quantize, (x, None, None), options)[1].shape == shape


def test_second_derivatives_are_refused():
    x, scale = normal(3, 64).requires_grad_(), torch.full((3, 1), 0.2).requires_grad_()
    out = tilefuse.fake_quantize(x, scale, group_size=64)
    (dscale,) = torch.autograd.grad(out.square().sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        dscale.sum().backward()


X, S = torch.zeros(2, 8), torch.ones(2, 2)
Z = torch.zeros(2, 2, dtype=torch.uint8)
G = {"group_size": 4}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X.int(),), {}, TypeError, "x must be float32 or"),
        ((X[0, 0],), {}, ValueError, r"x must be \[..., K\]"),
        ((X,), {"bits": 3}, ValueError, "bits must be 8, 6 or 4, got 3"),
        ((X,), {"group_size": -1}, ValueError, "group_size must be at least 1"),
        ((X, None, Z), {}, ValueError, "zero must be None without a scale"),
        ((X, S.int()), G, TypeError, "scale must be float32 or"),
        ((X, S), {"group_size": 0}, ValueError, r"scale must be \[2, 1\], got \[2, 2\]"),
        ((X, S[0]), G, ValueError, r"scale must be \[2, 2\], got \[2\]"),
        ((X, S.to("meta")), G, ValueError, "scale must be on the device of x"),
        ((X, S), G | {"scale_gradient": True}, ValueError, "scale_gradient must be False with a scale"),
        ((X, S, Z), G, ValueError, "zero must be None where symmetric, else given with scale"),
        (
            (X, S),
            G | {"symmetric": False},
            ValueError,
            "zero must be None where symmetric, else",
        ),
        ((X, S, Z.int()), G | {"symmetric": False}, TypeError, "zero must be uint8"),
        ((X, S, Z[:1]), G | {"symmetric": False}, ValueError, r"zero must be \[2, 2\], got \[1, 2\]"),
        ((X, S, Z.to("meta")), G | {"symmetric": False}, ValueError, "zero must be on the device of x"),
    ],
)
def test_errors(args, options, error, message):
    for call in (tilefuse.fake_quantize, torch.ops.tilefuse.fake_quantize):
        with pytest.raises(error, match=f"^tilefuse.fake_quantize: {message}"):
            call(*args, **options)
