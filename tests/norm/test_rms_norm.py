"""``rms_norm`` and ``add_rms_norm``."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.norm.rms_norm import cases, normal

case = by_name(cases)
KERNEL = "rms_norm_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
# the two 16-bit types differ in the conversion only: one of them meets every case
CASES_AND_DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or name in ("rows", "llama", "views")
]


def eager(x, weight, eps=1e-6, weight_offset=0.0, rounding="once"):
    """As Hugging Face's models write it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    if rounding == "llama":
        normed = normed.to(x.dtype)
    return (normed if weight is None else normed * (weight.to(wide) + weight_offset)).to(x.dtype)


def add_eager(x, residual, weight, **options):
    h = x + residual
    return eager(h, weight, **options), h


def norm_of(x, _, weight, **options):
    return (tilefuse.rms_norm(x, weight, **options),)


def eager_of(x, _, weight, **options):
    return (eager(x, weight, **options),)


# ours and the plain one, of (x, residual, weight)
OPS = {"rms_norm": (norm_of, eager_of), "add_rms_norm": (tilefuse.add_rms_norm, add_eager)}
each_op = pytest.mark.parametrize("op", OPS)


def upstream_of(outputs):
    return [normal(*o.shape, seed=7 + i).to(o.device, o.dtype) for i, o in enumerate(outputs)]


def run(function, tensors, options, dtype=None, upstream=None):
    """Outputs, and gradients of the tensors that are there (None of unused ones), for fixed upstream gradients."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    given = [g.to(o.dtype) for g, o in zip(upstream or upstream_of(out), out)]
    return out, torch.autograd.grad(out, [t for t in leaves if t is not None], given, allow_unused=True)


def pairs(*results):
    """The tensors of several results, those that are None in each left out."""
    for values in zip(*((*out, *grads) for out, grads in results), strict=True):
        assert len({v is None for v in values}) == 1
        if values[0] is not None:
            yield values


@each_op
@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(op, name):
    tensors, options = case(name, dtype=torch.float64)
    ours, plain = OPS[op]
    with tilefuse.backend("reference"):
        for a, b in pairs(run(ours, tensors, options), run(plain, tensors, options)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@each_op
@pytest.mark.parametrize("name", ["offset", "no_weight"])
def test_gradcheck(op, name):
    tensors, options = case(name, dtype=torch.float64)
    ours, _ = OPS[op]

    def function(x, residual, weight=None):
        return ours(x, residual, weight, **options)

    with tilefuse.backend("reference"):
        leaves = [t.clone().requires_grad_() for t in tensors if t is not None]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def exact_of(op, tensors, options, upstream):
    """In float64, without the rounding inside; the sum that is normed is the rounded one."""
    options = {k: v for k, v in options.items() if k != "rounding"}
    if op == "rms_norm":
        return run(norm_of, tensors, options, torch.float64, upstream)
    x, residual, weight = tensors

    def of_sum(h, weight, **options):
        return tilefuse.rms_norm(h, weight, **options), h * 1

    (y, _), (dh, *dweight) = run(of_sum, (x + residual, weight), options, torch.float64, upstream)
    return (y, x.double() + residual.double()), (dh, dh, *dweight)


@each_op
@pytest.mark.parametrize(("name", "dtype"), CASES_AND_DTYPES, ids=str)
def test_matches_oracle(op, name, dtype, device):
    tensors, options = case(name, device, dtype)
    ours, plain = OPS[op]
    with poisoned():
        found = run(ours, tensors, options)
    upstream = upstream_of(found[0])
    with tilefuse.backend("reference"):
        exact = exact_of(op, tensors, options, upstream)
    for a, b, c in pairs(found, exact, run(plain, tensors, options, upstream=upstream)):
        assert a.dtype == c.dtype and a.is_contiguous()
        assert_close(a, b, c, name=name)


def test_once_is_rounded_once(device):
    """The exact result, rounded: but where the arithmetic's own last place turns it."""
    (x, _, weight), _ = case("rows", device, torch.bfloat16)
    with tilefuse.backend("reference"):
        exact = tilefuse.rms_norm(x.double(), weight.double())
    assert (tilefuse.rms_norm(x, weight) != exact.bfloat16()).double().mean() < 0.01


def test_llama_has_the_bits_of_hugging_face(device):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    (x, _, weight), options = case("llama", device, torch.bfloat16)
    module = modeling.LlamaRMSNorm(x.shape[-1], eps=1e-6).to(device, torch.bfloat16)
    module.weight.data.copy_(weight)
    theirs = module(x)
    # one ulp of rstd may turn the rounding of a normed value
    assert (tilefuse.rms_norm(x, weight, **options) != theirs).double().mean() < 0.01
    assert (tilefuse.rms_norm(x, weight) != theirs).double().mean() > 0.05


def test_zero_rows(device):
    x = torch.zeros(3, 40, device=device, requires_grad=True)
    weight = torch.ones(40, device=device, requires_grad=True)
    y = tilefuse.rms_norm(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert not y.any() and not dweight.any()
    torch.testing.assert_close(dx, torch.full_like(dx, 1e3))


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e30, torch.float32), (3e38, torch.float32), (6e4, torch.float16)], ids=str
)
def test_huge_rows(size, dtype, device):
    """Their squares overflow; torch's rms_norm makes zeros of them."""
    values = torch.tensor([1.0, -0.5, 0.25, 1.0] * 20)
    upstream = normal(2, 80, seed=3).to(device, dtype)
    results = []
    for factor in (size, 1.0):
        rows = torch.stack((values * factor, values)).to(device, dtype).requires_grad_()
        weight = torch.ones(80, device=device, dtype=dtype, requires_grad=True)
        y = tilefuse.rms_norm(rows, weight)
        results.append((y, *torch.autograd.grad(y, (rows, weight), upstream)))
    (y, dx, dweight), (small_y, small_dx, small_dweight) = results
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, small_y, **tolerance)
    torch.testing.assert_close(dweight, small_dweight, **tolerance)
    assert_bit_equal(dx[1], small_dx[1])
    if size == 1e30:
        torch.testing.assert_close(dx[0] * size, small_dx[0], **tolerance)


def test_nan_and_infinity_stay_in_their_rows(device):
    (x, _, weight), _ = case("rows", device, torch.float32)
    upstream = normal(*x.shape, seed=3).to(device)

    def y_dx(x):
        x = x.detach().requires_grad_()
        y = tilefuse.rms_norm(x, weight)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    broken = x.clone()
    broken[1, 5], broken[4, 7] = float("nan"), float("-inf")
    for a, b in zip(y_dx(broken), y_dx(x)):
        assert a[1].isnan().all() and a[4].isnan().any()
        a[[1, 4]] = b[[1, 4]]
        assert_bit_equal(a, b)


@pytest.mark.parametrize("dim", [5, 8193, 65537])
def test_dims(dim, device):
    """Rows that a Triton program holds whole, in the forward only, and not at all."""
    tensors = [normal(2, dim, seed=seed).to(device, torch.bfloat16) for seed in (0, 1)]
    tensors.append(normal(dim, seed=2).to(device))
    found = run(tilefuse.add_rms_norm, tensors, {"eps": 0.1})
    upstream = upstream_of(found[0])
    x, residual, weight = tensors

    def torchs(h, weight):
        return F.rms_norm(h, (dim,), weight, 0.1), h * 1

    (y, _), (dh, dweight) = run(torchs, (x + residual, weight), {}, torch.float64, upstream)
    exact = (y, x.double() + residual.double()), (dh, dh, dweight)
    for a, b, c in pairs(found, exact, run(add_eager, tensors, {"eps": 0.1}, upstream=upstream)):
        assert_close(a, b, c)


def test_an_offset_does_not_swallow_small_weights(device):
    x = normal(4, 64).to(device, torch.bfloat16)
    weight = torch.full((64,), 2.0**-9, device=device, dtype=torch.bfloat16)
    shifted = tilefuse.rms_norm(x.float(), weight, weight_offset=1.0)
    torch.testing.assert_close(shifted, tilefuse.rms_norm(x.float()) * (1 + 2.0**-9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)], ids=str)
def test_y_only_h_only(outputs, device):
    tensors, options = case("rows", device)
    upstream = [normal(7, 96, seed=9 + i).to(device) for i in outputs]

    def some(function):
        return run(lambda *t, **o: [function(*t, **o)[i] for i in outputs], tensors, options, upstream=upstream)[1]

    grads = some(tilefuse.add_rms_norm)
    for a, b in zip(grads, some(add_eager)):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)
    assert_bit_equal(grads[0], grads[1])


def test_an_upstream_gradient_is_left_alone(device):
    """Gemma 2 uses it twice: a gradient written over it is wrong."""
    (x, residual, weight), _ = case("rows", device)
    x = x.requires_grad_()
    upstream = normal(7, 96, seed=3).to(device)
    before = upstream.clone()
    y = tilefuse.rms_norm(x, weight)
    (first,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    assert_bit_equal(upstream, before)
    assert_bit_equal(torch.autograd.grad(y, x, upstream)[0], first)
    y, h = tilefuse.add_rms_norm(x, residual, weight)
    torch.autograd.backward((y, h), (upstream, upstream))
    assert_bit_equal(upstream, before)


@pytest.mark.parametrize("needed", [c for n in (1, 2) for c in itertools.combinations(range(3), n)], ids=str)
def test_frozen_arguments(needed, device):
    tensors, options = case("rows", device)
    _, everything = run(tilefuse.add_rms_norm, tensors, options)
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    out = tilefuse.add_rms_norm(*leaves, **options)
    for i, grad in zip(needed, torch.autograd.grad(out, [leaves[i] for i in needed], upstream_of(out))):
        assert_bit_equal(grad, everything[i])


@pytest.mark.cpu_library
def test_threads_change_no_bit():
    tensors = normal(200, 1500), normal(200, 1500, seed=1), normal(1500, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tilefuse.backend("cpu"):
                found.append(run(tilefuse.add_rms_norm, tensors, {}))
    finally:
        torch.set_num_threads(before)
    for a, b in pairs(*found):
        assert_bit_equal(a, b)


@pytest.mark.cpu_library
@pytest.mark.parametrize("dim", [1024, 999])
def test_large_outputs_are_whole(dim):
    """Above 2 MiB rows are written past the caches, at addresses that lines divide and at others."""
    tensors = [normal(1100, dim, seed=i).bfloat16() for i in (0, 1)] + [normal(dim, seed=2)]
    with tilefuse.backend("cpu"):
        with poisoned():
            out, grads = run(tilefuse.add_rms_norm, tensors, {})
        upstream = [g[:5] for g in upstream_of(out)]
        few = [t[:5] if t.ndim == 2 else t for t in tensors]
        few_out, few_grads = run(tilefuse.add_rms_norm, few, {}, upstream=upstream)
    for a, b in zip((*out, *grads[:2]), (*few_out, *few_grads[:2])):
        assert not a.isnan().any()
        assert_bit_equal(a[:5], b)


def test_runs_are_bit_equal_and_rows_independent(device):
    tensors, options = case("spans", device, torch.bfloat16)
    first = run(tilefuse.add_rms_norm, tensors, options)
    for a, b in pairs(first, run(tilefuse.add_rms_norm, tensors, options)):
        assert_bit_equal(a, b)
    some = [t[40:43] if t.ndim == 2 else t for t in tensors]
    upstream = [g[40:43] for g in upstream_of(first[0])]
    out, grads = run(tilefuse.add_rms_norm, some, options, upstream=upstream)
    for a, b in zip((*out, *grads[:2]), (*first[0], *first[1][:2])):
        assert_bit_equal(a, b[40:43])


@each_op
def test_checkpoint(op, device):
    tensors, options = case("rows", device)
    ours, _ = OPS[op]

    def recomputed(*leaves, **options):
        return checkpoint(ours, *leaves, use_reentrant=False, **options)

    for a, b in pairs(run(recomputed, tensors, options), run(ours, tensors, options)):
        assert_bit_equal(a, b)


def test_offsets_past_int32(device):
    """Rows 2**30 elements apart, at a stride that fits int32. Untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    storage = torch.empty(2**31 + 130, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 64), (2**30 + 1, 1))
    far.copy_(normal(3, 64))
    weight = normal(64, seed=1).to(device)
    for a, b in pairs(*(run(norm_of, (x, None, weight), {}) for x in (far, far.contiguous()))):
        assert_bit_equal(a, b)


@each_op
def test_compile_fullgraph_has_the_same_bits(op):
    ours, _ = OPS[op]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 37):
        tensors = normal(rows, 48), normal(rows, 48, seed=1), normal(48, seed=2)
        for a, b in pairs(*(run(f, tensors, {"weight_offset": 1.0}) for f in (compiled, ours))):
            assert_bit_equal(a, b)


def test_second_derivatives_are_refused():
    x = normal(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad(tilefuse.rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        (grad.sum() + x.square().sum()).backward()


X, W = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x must be \[..., D\] with D >= 1, got \[\] float32"),
        ({"x": X[:, :0]}, ValueError, r"x must be \[..., D\] with D >= 1"),
        ({"x": X.int()}, TypeError, "x must be float32 or"),
        ({"residual": X[:, 1:]}, ValueError, r"residual must be of x's shape \[4, 8\], got \[4, 7\] float32"),
        ({"residual": X.half()}, TypeError, "residual must be of x's dtype float32, got"),
        ({"residual": X.to("meta")}, ValueError, "residual must be on the device of x"),
        ({"weight": W[1:]}, ValueError, r"weight must be \[8\], got \[7\] float32"),
        ({"weight": W[None]}, ValueError, r"weight must be \[8\]"),
        ({"weight": W.int()}, TypeError, "weight must be float32 or"),
        ({"weight": W.to("meta")}, ValueError, "weight must be on the device of x"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"eps": 1e-50}, ValueError, "eps must be positive"),
        ({"eps": float("nan")}, ValueError, "eps must be positive"),
        ({"rounding": "gemma"}, ValueError, "rounding must be 'once' or 'llama', got 'gemma'"),
    ],
)
def test_errors(change, error, message):
    given = {"x": X, "weight": W} | change
    for add in (tilefuse.add_rms_norm, torch.ops.tilefuse.add_rms_norm):
        with pytest.raises(error, match=f"^tilefuse.add_rms_norm: {message}"):
            add(**{"residual": given["x"]} | given)
    if "residual" not in change:
        with pytest.raises(error, match=f"^tilefuse.rms_norm: {message}"):
            tilefuse.rms_norm(**given)
