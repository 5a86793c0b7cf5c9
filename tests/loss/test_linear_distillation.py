"""``linear_distillation`` on every backend, against the formula on all logits in float64."""

import importlib
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.loss.distillation import IGNORED, weights
from tilefuse.testing.inputs.loss.linear_distillation import case, naive
from tilefuse.testing.memory import can_measure_peaks, peak_bytes

KERNEL = "linear_distillation_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS = [0.0, 1e-3, 0.5, 1.0]
each_beta = pytest.mark.parametrize("beta", BETAS)


def student_of(inputs):
    """x, weight and bias."""
    return inputs[0], inputs[1], inputs[5]


def gradients(function, inputs, dtype=None, upstream=None):
    """(loss, gradients) of a function of x, weight and bias."""
    leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in student_of(inputs)]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, None if upstream is None else upstream.to(loss))


def of(function, inputs, *extra, **options):
    """The op, or its formula, as a function of x, weight and bias."""
    _, _, teacher_x, teacher_weight, target, _, teacher_bias = inputs
    return lambda x, w, b: function(x, w, teacher_x, teacher_weight, target, b, teacher_bias, *extra, **options)


def check(inputs, *extra, **options):
    """Loss and gradients against float64."""
    upstream = torch.randn(inputs[0].shape[0], device=inputs[0].device) if options.get("reduction") == "none" else None
    with poisoned():
        found = gradients(of(tilefuse.linear_distillation, inputs, *extra, **options), inputs, upstream=upstream)
    plain = of(naive, inputs, *extra, **options)
    exact, same = gradients(plain, inputs, torch.float64, upstream), gradients(plain, inputs, upstream=upstream)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-7)
    for leaf, a, b, c in zip(student_of(inputs), found[1:], exact[1:], same[1:]):
        assert a.dtype == leaf.dtype
        assert_close(a, b, c, rows=False)


@each_beta
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(dtype, beta, where):
    check(case(19, 133, 24, where, dtype, more=24), beta=beta, temperature=1.3)


@pytest.mark.parametrize(("tokens", "vocabulary", "hidden", "more"), [(1, 1, 1, 0), (5, 70, 33, -24)], ids=str)
def test_sizes(tokens, vocabulary, hidden, more, where):
    check(case(tokens, vocabulary, hidden, where, more=more, ignored=0.0))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, where):
    num_items = 5 if reduction == "mean" else None
    check(case(9, 70, 8, where), weights(9, where), num_items, reduction=reduction)


def test_is_distillation_of_the_logits(where):
    inputs = case(9, 133, 24, where, more=5)
    x, weight, teacher_x, teacher_weight, target, bias, teacher_bias = inputs
    expected = tilefuse.distillation(x @ weight.t() + bias, teacher_x @ teacher_weight.t() + teacher_bias, target)
    torch.testing.assert_close(tilefuse.linear_distillation(*inputs), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradcheck(beta):
    inputs = [t.double() if t.is_floating_point() else t for t in case(4, 9, 5, more=3)]
    leaves = [t.requires_grad_() for t in student_of(inputs)]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            of(tilefuse.linear_distillation, inputs, weights(4), beta=beta, temperature=0.7), leaves
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_beta
def test_near_agreement(beta, dtype, where):
    """The teacher's logits are the student's + 1e-3: what is left of logits in bfloat16 is noise."""
    x, weight, _, _, _, bias, _ = case(17, 300, 24, where, dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = (x, weight, x, weight, None, bias, bias + 1e-3 * torch.randn(300, generator=generator).to(where))
    upstream = torch.ones(17, device=where)
    options = {"beta": beta, "reduction": "none"}
    losses, *found = gradients(of(tilefuse.linear_distillation, inputs, **options), inputs, upstream=upstream)
    exact, *right = gradients(of(naive, inputs, **options), inputs, torch.float64, upstream)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses.double(), exact, rtol=1e-3, atol=0)
    for a, b in zip(found, right):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("why", ["no_tokens", "ignored", "num_items", "token_weight"])
def test_nothing_to_divide_by(why, where):
    """0 with gradients that are there and 0, never NaN."""
    inputs = case(0 if why == "no_tokens" else 5, 20, 8, where, more=-3, ignored=1.1 if why == "ignored" else 0)
    options = {"num_items": {"num_items": 0}, "token_weight": {"token_weight": torch.zeros(5, device=where)}}
    with poisoned():
        loss, *found = gradients(of(tilefuse.linear_distillation, inputs, **options.get(why, {})), inputs)
    assert loss == 0
    for gradient, leaf in zip(found, student_of(inputs)):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_ignored_tokens_are_never_read(where):
    inputs = case(9, 70, 8, where, torch.bfloat16)
    token, ignored = weights(9, where), inputs[4] == IGNORED

    def run(inputs, token):
        return gradients(of(tilefuse.linear_distillation, inputs, token), inputs)

    clean = run(inputs, token)
    dirty = list(inputs)
    dirty[0], dirty[2] = (inputs[i].masked_fill(ignored[:, None], v) for i, v in ((0, math.nan), (2, math.inf)))
    for a, b in zip(run(dirty, token.masked_fill(ignored, math.nan)), clean):
        assert_bit_equal(a, b)
    assert not clean[1][ignored].any()


@pytest.mark.parametrize("needed", [(0,), (1,), (2,)], ids=str)
def test_only_what_is_needed(needed, where):
    inputs = case(9, 70, 8, where, torch.bfloat16)
    run = of(tilefuse.linear_distillation, inputs)
    loss, *full = gradients(run, inputs)
    part = [t.clone().requires_grad_(i in needed) for i, t in enumerate(student_of(inputs))]
    for i, gradient in zip(needed, torch.autograd.grad(run(*part), [part[i] for i in needed])):
        assert_bit_equal(gradient, full[i])
    with torch.no_grad():
        assert_bit_equal(run(*part), loss)


def test_backward_twice_and_checkpoint(where):
    inputs = case(9, 70, 8, where)
    run = of(tilefuse.linear_distillation, inputs)
    leaves = [t.requires_grad_() for t in student_of(inputs)]
    loss = run(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0), retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    recomputed = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves)
    for a, b, c, d in zip(first, twice, again, recomputed):
        assert_bit_equal(b, 2 * a)
        assert_bit_equal(c, a)
        assert_bit_equal(d, a)


def test_second_derivative_raises():
    inputs = case(4, 9, 3)
    x = inputs[0].requires_grad_()
    (dx,) = torch.autograd.grad(tilefuse.linear_distillation(*inputs), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_distillation: the op is differentiable once"):
        (dx.square().sum() + x.sum()).backward()


def test_the_teacher_is_data(where):
    """It may require a gradient and gets none."""
    inputs = case(5, 37, 8, where)
    leaves = [inputs[i].requires_grad_() for i in (0, 2, 3, 6)]
    dx, *others = torch.autograd.grad(tilefuse.linear_distillation(*inputs), leaves, allow_unused=True)
    assert dx.any() and others == [None] * 3


def test_batch_invariant(where):
    """A token's loss depends on no other."""
    # plain PyTorch, whose products depend on the number of rows
    if tilefuse.backend() == "reference":
        return
    x, weight, teacher_x, teacher_weight, _, bias, teacher_bias = case(33, 70, 8, where, torch.bfloat16)

    def run(rows):
        heads = (x[rows], weight, teacher_x[rows], teacher_weight)
        return tilefuse.linear_distillation(*heads, None, bias, teacher_bias, reduction="none")

    whole = run(slice(None))
    # the interpreter's own products are those of one tile size
    least = 17 if where == "cpu" and tilefuse.backend() == "triton" else 1
    for rows in (slice(0, least), torch.randperm(33, device=where)):
        assert_bit_equal(run(rows), whole[rows])


def test_float16_keeps_small_gradients(where):
    inputs = case(24, 200, 16, where, torch.float16, ignored=0.0)

    def scaled(function):
        run = of(function, inputs, None, 8192)
        return lambda *leaves: 2.0**10 * run(*leaves)

    found = gradients(scaled(tilefuse.linear_distillation), inputs)
    exact = gradients(scaled(naive), inputs, torch.float64)
    for a, b in zip(found[1:3], exact[1:3]):
        assert (a.double() - b).abs().max() < 2e-3 * b.abs().max()


def test_triton_chunks_and_blocks(triton_backend, monkeypatch):
    """Tokens in several chunks, the vocabulary in several blocks, the last ones ragged."""
    module, products = (
        importlib.import_module(f"tilefuse.triton_kernels.loss.{name}")
        for name in ("linear_distillation", "linear_logprobs")
    )
    inputs = case(20, 300, 40, "cuda" if torch.cuda.is_available() else "cpu")
    run = of(tilefuse.linear_distillation, inputs)
    whole = gradients(run, inputs)
    monkeypatch.setattr(products, "BLOCK_IDS", 128)
    monkeypatch.setattr(module, "LOGITS_BYTES", 8 * 300 * 7)
    for a, b in zip(gradients(run, inputs), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_library
def test_threads_change_nothing():
    inputs = case(600, 5000, 24, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gradients(of(tilefuse.linear_distillation, inputs), inputs))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found):
        assert_bit_equal(a, b)


PREPARE = """
from tilefuse.testing.inputs.loss.linear_distillation import case
def run(tokens, vocabulary):
    inputs = case(tokens, vocabulary, 16, dtype=torch.bfloat16)
    leaves = [inputs[i].requires_grad_() for i in (0, 1, 5)]
    return lambda: torch.autograd.grad(tilefuse.linear_distillation(*inputs), leaves)
run(8, 300)()
call = run(2048, 65536)
"""


@pytest.mark.cpu_library
@pytest.mark.skipif(not can_measure_peaks(), reason="needs Linux")
def test_peak_memory():
    """Logits of these would be twice 512 MiB: everything beside the arguments stays below 160 MiB."""
    assert peak_bytes(PREPARE, "call()") < 160 << 20


def test_autocast():
    inputs = case(9, 70, 8)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = tilefuse.linear_distillation(*inputs)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))
    halves = [t.detach().bfloat16() for t in inputs[:4]]
    assert_bit_equal(loss.detach(), tilefuse.linear_distillation(*halves, *inputs[4:]))


def test_compiles_without_a_break():
    inputs = case(9, 70, 8)
    run = of(tilefuse.linear_distillation, inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs), gradients(run, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


X, W, T, Y, V = (
    torch.zeros(2, 3, 4),
    torch.zeros(9, 4),
    torch.zeros(2, 3).long(),
    torch.zeros(2, 3, 5),
    torch.zeros(8, 5),
)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"x must be \[\.\.\., H\], got \[\] float32", (X[0, 0, 0], W, Y, V), {}),
        (TypeError, "x must be float32 or", (X.int(), W, Y, V), {}),
        (ValueError, r"weight must be \[V, 4\] with V >= 1, got \[9, 3\] float32", (X, W[:, :3], Y, V), {}),
        (TypeError, "weight must be of x's dtype float32, got .* bfloat16", (X, W.bfloat16(), Y, V), {}),
        (ValueError, "weight must be on the device of x", (X, W.to("meta"), Y, V), {}),
        (ValueError, r"teacher_x must be \[2, 3, H_teacher\], got \[3, 5\] float32", (X, W, Y[0], V), {}),
        (TypeError, "teacher_x must be float32 or", (X, W, Y.int(), V), {}),
        (ValueError, "teacher_x must be on the device of x", (X, W, Y.to("meta"), V.to("meta")), {}),
        (ValueError, r"teacher_weight must be \[V, 5\] with V >= 1, got \[9, 4\] float32", (X, W, Y, W), {}),
        (TypeError, "teacher_weight must be of teacher_x's dtype float32", (X, W, Y, V.bfloat16()), {}),
        (ValueError, "teacher_weight must be on the device of teacher_x", (X, W, Y, V.to("meta")), {}),
        (ValueError, r"target must be \[2, 3\] int32 or int64, got \[2\] int64", (X, W, Y, V, T[:, 0]), {}),
        (ValueError, r"bias must be \[9\], got \[8\]", (X, W, Y, V, T, V[:, 0]), {}),
        (ValueError, r"teacher_bias must be \[8\], got \[9\]", (X, W, Y, V, T, None, W[:, 0]), {}),
        (ValueError, r"token_weight must be \[2, 3\], got \[2\] float32", (X, W, Y, V), {"token_weight": X[:, 0, 0]}),
        (ValueError, "num_items must be a number or a tensor without dims", (X, W, Y, V), {"num_items": X[0, 0]}),
        (ValueError, "reduction must be one of mean, sum, none, got 'max'", (X, W, Y, V), {"reduction": "max"}),
        (ValueError, r"beta must be in \[0, 1\], got -0.5", (X, W, Y, V), {"beta": -0.5}),
        (ValueError, "temperature must be above 0", (X, W, Y, V), {"temperature": 0.0}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.linear_distillation, torch.ops.tilefuse.linear_distillation):
        with pytest.raises(error, match=rf"^tilefuse\.linear_distillation: {match}"):
            call(*args, **options)
