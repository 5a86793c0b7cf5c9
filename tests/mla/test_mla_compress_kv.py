"""``mla_compress_kv``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.common import normal, tables
from tilefuse.testing.inputs.mla.mla_compress_kv import cases

KERNEL, BACKWARD = "mla_compress_kv_fwd", "mla_compress_kv_bwd"
case = by_name(cases)
CASES = [case[0] for case in cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(kv_a, weight, cos, sin, positions, eps=1e-6, interleaved=True):
    """The formula in kv_a's dtype, pair by pair."""
    rank, rope = weight.shape[0], kv_a.shape[1] - weight.shape[0]
    x, dtype = kv_a[:, :rank], kv_a.dtype
    out = [x * weight.to(dtype) / (x.square().mean(-1, keepdim=True) + eps).sqrt()]
    rows = torch.arange(kv_a.shape[0]) if positions is None else positions.long()
    rotated = [None] * rope
    for i in range(rope // 2):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + rope // 2)
        a, b = kv_a[:, rank + one], kv_a[:, rank + two]
        c, s = cos[rows, i].to(dtype), sin[rows, i].to(dtype)
        rotated[one], rotated[two] = a * c - b * s, b * c + a * s
    return torch.cat([*out, *(r.unsqueeze(1) for r in rotated)], -1)


def on_cpu(args, dtype):
    return tuple(a if a is None else a.cpu().to(dtype) if a.is_floating_point() else a.cpu() for a in args)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    args, options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        out = tilefuse.mla_compress_kv(*args, **options)
    torch.testing.assert_close(out, formula(*on_cpu(args, torch.float64), **options), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype, where):
    args, options = case(name, where, dtype)
    with poisoned():
        out = tilefuse.mla_compress_kv(*args, **options)
    assert out.is_contiguous() and out.dtype == dtype
    exact = formula(*on_cpu(args, torch.float64), **options)
    assert_close(out, exact, formula(*on_cpu(args, dtype), **options), name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_5_same_bits_as_the_reference(name, dtype, where):
    args, options = case(name, where, dtype)
    out = tilefuse.mla_compress_kv(*args, **options)
    with tilefuse.backend("reference"):
        assert_bit_equal(out, tilefuse.mla_compress_kv(*args, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, dtype, grad_where):
    (kv_a, weight, *rest), options = case(name, grad_where, dtype)
    grad = normal(*kv_a.shape, device=grad_where, dtype=dtype, seed=1)

    def run(function, kv_a, weight, grad, *rest):
        kv_a, weight = kv_a.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(function(kv_a, weight, *rest, **options), (kv_a, weight), grad)

    with poisoned():
        got = run(tilefuse.mla_compress_kv, kv_a, weight, grad, *rest)
    exact = run(formula, *on_cpu((kv_a, weight, grad, *rest), torch.float64))
    naive = run(formula, *on_cpu((kv_a, weight, grad, *rest), dtype))
    assert got[0].dtype == kv_a.dtype and got[1].dtype == weight.dtype
    for g, e, n in zip(got, exact, naive):
        assert_close(g, e, n)
    again = run(tilefuse.mla_compress_kv, kv_a, weight, grad, *rest)
    for g, a in zip(got, again):
        assert_bit_equal(g, a)


@pytest.mark.cpu_library
def test_output_written_past_the_caches():
    """On the CPU, from 8 MiB on: the same bits as in parts that are not."""
    rows, part = 7400, 1850
    kv_a, grad = (normal(rows, 576, device="cpu", dtype=torch.bfloat16, seed=i) for i in (1, 2))
    weight, (cos, sin), positions = (
        normal(512, device="cpu", seed=3).bfloat16(),
        tables(64, 32),
        torch.arange(rows) % 32,
    )
    forward, backward = torch.ops.tilefuse.mla_compress_kv_fwd, torch.ops.tilefuse.mla_compress_kv_bwd

    def run(first, last):
        args = (kv_a[first:last], weight, cos, sin, positions[first:last], 1e-6, True)
        with tilefuse.backend("cpu"), poisoned():
            return forward(*args), backward(grad[first:last], *args)[0]

    whole = run(0, rows)
    for i in range(0, rows, part):
        for got, alone in zip(whole, run(i, i + part), strict=True):
            assert_bit_equal(got[i : i + part], alone)


@pytest.mark.parametrize("name", ["deepseek", "odd_widths_half", "no_rope"])
def test_gradcheck(name):
    (kv_a, weight, *rest), options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w: tilefuse.mla_compress_kv(x, w, *rest, **options),
            (kv_a[:3].clone().requires_grad_(), weight.clone().requires_grad_())
            if rest[2] is None
            else (kv_a.clone().requires_grad_(), weight.clone().requires_grad_()),
            fast_mode=True,
        )


def test_gradients_of_one_argument():
    (kv_a, weight, *rest), options = case("deepseek")
    out = tilefuse.mla_compress_kv(kv_a, weight.requires_grad_(), *rest, **options)
    out.sum().backward()
    assert weight.grad is not None and kv_a.grad is None
    with pytest.raises(RuntimeError, match="is differentiable once"):
        kv_a = kv_a.requires_grad_()
        (grad,) = torch.autograd.grad(
            tilefuse.mla_compress_kv(kv_a, weight, *rest).square().sum(), kv_a, create_graph=True
        )
        grad.sum().backward()


def test_5_far_positions(where):
    """Rows past 2**20, through an int64 offset."""
    cos, sin = (t.expand(2**21, 32) for t in tables(64, 1, where))
    x = normal(2, 576, device=where, dtype=torch.float32)
    far = torch.tensor([2**21 - 1, 2**20 + 1], device=where)
    out = tilefuse.mla_compress_kv(x, torch.ones(512, device=where), cos, sin, far)
    assert_bit_equal(out[:, 512:], x[:, 512:])


def test_6_eps_shows_in_small_rows(where):
    (kv_a, weight, *rest), _ = case("tiny", where)
    small, large = (tilefuse.mla_compress_kv(kv_a, weight, *rest, eps=e)[:, :512] for e in (1e-6, 1e-5))
    assert (small - large).abs().max() > 0.3 * small.abs().max()
    assert (small[3] == 0).all()  # the zero row is no 0 / 0


def test_nan_stays_in_its_row(where):
    (kv_a, weight, *rest), _ = case("deepseek", where)
    clean = tilefuse.mla_compress_kv(kv_a, weight, *rest)
    kv_a[2, 5], kv_a[4, 530] = float("nan"), float("inf")
    out = tilefuse.mla_compress_kv(kv_a, weight, *rest)
    assert out[2, :512].isnan().all() and not out[2, 512:].isnan().any()
    for row in (0, 1, 3, 5, 6):
        assert_bit_equal(out[row], clean[row])
    assert_bit_equal(out[4, :512], clean[4, :512])


@pytest.mark.parametrize("position", [32, -1, 2**40])
def test_position_outside_of_the_tables(position, where):
    (kv_a, weight, cos, sin, positions), _ = case("half", where)
    positions[1] = position
    if where == "cpu":
        with pytest.raises(ValueError, match=r"tilefuse.mla_compress_kv: positions must be in \[0, 32\), got"):
            tilefuse.mla_compress_kv(kv_a, weight, cos, sin, positions)
    else:
        out = tilefuse.mla_compress_kv(kv_a, weight, cos, sin, positions)
        assert_bit_equal(out, tilefuse.mla_compress_kv(kv_a, weight, cos, sin, positions.clamp(0, 31)))


def change(**values):
    return lambda a: a.update(values)


ERRORS = {
    "rank": (change(kv_a=torch.zeros(576)), ValueError, r"kv_a must be \[T, R \+ r\], got \[576\]"),
    "dtype": (change(kv_a=torch.zeros(5, 576, dtype=torch.int32)), TypeError, "kv_a must be float32 or"),
    "weight_shape": (change(weight=torch.ones(1, 512)), ValueError, r"weight must be \[R\]"),
    "weight_long": (change(weight=torch.ones(577)), ValueError, r"weight must be \[R\] with 0 < R <= 576"),
    "weight_dtype": (change(weight=torch.ones(512).int()), TypeError, "weight must be float32 or"),
    "weight_device": (change(weight=torch.ones(512, device="meta")), ValueError, "weight must be on the device"),
    "odd_rope": (change(weight=torch.ones(511)), ValueError, "kv_a must be of an even RoPE width .* not 65"),
    "cos_shape": (change(cos=torch.ones(8, 16)), ValueError, r"cos must be \[P, 32\] float32, got \[8, 16\]"),
    "cos_dtype": (lambda a: a.update(cos=a["cos"].half()), TypeError, r"cos must be \[P, 32\] float32, got .*float16"),
    "sin_shape": (change(sin=torch.ones(9, 32)), ValueError, r"sin must be \[P, 32\] float32"),
    "sin_device": (lambda a: a.update(sin=a["sin"].to("meta")), ValueError, "sin must be on the device of kv_a"),
    "positions_shape": (change(positions=torch.zeros(4).long()), ValueError, r"positions must be \[5\] int32 or"),
    "positions_dtype": (change(positions=torch.zeros(5)), TypeError, r"positions must be \[5\] int32 or int64"),
    "short_table": (change(kv_a=torch.zeros(9, 576)), ValueError, "cos must be a table of at least 9 rows"),
    "eps": (change(eps=0.0), ValueError, "eps must be positive, got 0.0"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_compress_kv, torch.ops.tilefuse.mla_compress_kv], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    cos, sin = tables(64, 8)
    arguments = {"kv_a": torch.zeros(5, 576), "weight": torch.ones(512), "cos": cos, "sin": sin}
    edit(arguments)
    with pytest.raises(error, match=f"^tilefuse.mla_compress_kv: {message}"):
        call(**arguments)


def test_tables_get_no_gradient():
    (kv_a, weight, cos, sin, positions), _ = case("deepseek")
    with pytest.raises(RuntimeError, match="tables get no gradient, but cos requires grad"):
        tilefuse.mla_compress_kv(kv_a, weight, cos.requires_grad_(), sin, positions)


@pytest.mark.parametrize("name", ["deepseek", "odd_widths", "view", "counted"])
def test_19_opcheck(name):
    args, options = case(name)
    rest = (options.get("eps", 1e-6), options.get("interleaved", True))
    torch.library.opcheck(torch.ops.tilefuse.mla_compress_kv_fwd.default, (*args, *rest))
    torch.library.opcheck(torch.ops.tilefuse.mla_compress_kv_bwd.default, (torch.randn_like(args[0]), *args, *rest))
    kv_a, weight, *more = args
    leaves = (kv_a.detach().requires_grad_(), weight.detach().requires_grad_())
    torch.library.opcheck(torch.ops.tilefuse.mla_compress_kv.default, (*leaves, *more), options)


def test_19_compile_fullgraph_without_recompiling():
    cos, sin = tables(64, 64)
    weight = torch.randn(512).requires_grad_()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda x: tilefuse.mla_compress_kv(x, weight, cos, sin), fullgraph=True, backend=compiles, dynamic=True
    )
    frames = []
    for tokens in (5, 9, 33):
        x = normal(tokens, 576, dtype=torch.float32).requires_grad_()
        grads = []
        for run in (step, lambda x: tilefuse.mla_compress_kv(x, weight, cos, sin)):
            out = run(x)
            grads.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
        for a, b in zip(*grads):
            assert_bit_equal(a, b)
        frames.append(compiles.frame_count)
    assert frames[0] == frames[-1]
