"""``linear_topk_distillation`` on every backend, against the formula on full logits in float64."""

import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, canary, poisoned
from tilefuse.testing.inputs.loss.linear_logprobs import IGNORED, logits
from tilefuse.testing.inputs.loss.linear_topk_distillation import case, naive
from tilefuse.testing.memory import allocations

KERNEL = "linear_topk_distillation_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TAILS = ["bucket", "renormalize", "none"]
BETAS = [0.0, 0.4, 1.0]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_tail = pytest.mark.parametrize("tail", TAILS)
each_beta = pytest.mark.parametrize("beta", BETAS)


def gradients(function, tensors, dtype=None, upstream=None):
    leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
    loss = function(*leaves)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def check(where, dtype, sizes, token_weight=None, upstream=None, *, padded=0.2, apart=0.5, **options):
    """Loss and gradients against float64."""
    temperature = options.get("temperature", 1.0)
    x, weight, logp, ids, target, bias = case(*sizes, where, dtype, padded=padded, apart=apart, temperature=temperature)

    def ours(x, w, b):
        return tilefuse.linear_topk_distillation(x, w, logp, ids, target, b, token_weight, **options)

    def plain(x, w, b):
        return naive(x, w, logp, ids, target, b, token_weight, **options)

    leaves = (x, weight, bias)
    with poisoned():
        found = gradients(ours, leaves, upstream=upstream)
    exact, same = gradients(plain, leaves, torch.float64, upstream), gradients(plain, leaves, upstream=upstream)
    assert found[0].dtype == torch.float32 and found[0].shape == exact[0].shape
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    for a, leaf, b, c in zip(found[1:], leaves, exact[1:], same[1:]):
        assert a.dtype == leaf.dtype
        assert_close(a, b, c, rows=False)


@each_dtype
@each_tail
def test_matches_oracle(tail, dtype, where):
    check(where, dtype, (35, 133, 24, 7), tail=tail, beta=0.4, temperature=1.3)


@each_beta
@each_tail
def test_every_divergence(tail, beta, where):
    upstream = torch.randn(17, device=where)
    check(where, torch.float32, (17, 70, 8, 5), upstream=upstream, tail=tail, beta=beta, reduction="none")


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 70, 1, 0), (6, 30, 33, 30)], ids=str)
@each_tail
def test_sizes(tail, sizes, where):
    """One token of the vocabulary, no id at all, all of them."""
    check(where, torch.float32, sizes, padded=0.0, tail=tail, beta=1e-3)


@pytest.mark.slow_in_interpreter
def test_two_blocks(where):
    """Of statistics; ids on both sides of their border and at both ends."""
    x, weight, _, _, _, bias = case(3, 4097, 4, 4, where)
    ids = torch.tensor([[4096, 4095, 0, 63], [0, 1, 64, 4094], [4096, -1, -1, -1]], device=where)
    logp = torch.tensor([[0.4, 0.3, 0.1, 0.1]], device=where).log().expand(3, 4).contiguous()
    found = gradients(lambda x, w, b: tilefuse.linear_topk_distillation(x, w, logp, ids, None, b), (x, weight, bias))
    exact = gradients(lambda x, w, b: naive(x, w, logp, ids, None, b), (x, weight, bias), torch.float64)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, where):
    token_weight = torch.randn(17, device=where)
    token_weight[::4] = 0
    check(where, torch.float32, (17, 70, 8, 5), token_weight, reduction=reduction)
    if reduction == "mean":
        check(where, torch.float32, (17, 70, 8, 5), token_weight, reduction=reduction, num_items=7)


@each_tail
def test_gradcheck(tail):
    x, weight, logp, ids, target, bias = case(4, 7, 3, 4)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    with tilefuse.backend("reference"):
        for beta in (0.0, 0.4, 1.0):
            assert torch.autograd.gradcheck(
                lambda x, w, b, beta=beta: tilefuse.linear_topk_distillation(
                    x, w, logp, ids, target, b, beta=beta, tail=tail, temperature=0.7
                ),
                leaves,
            )


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_all_listed_is_the_kl_of_pytorch(beta, where):
    """k = V: no other token is left, and the noise of the teacher's sum is no category."""
    x, weight, logp, ids, _, bias = case(9, 40, 8, 40, where, padded=0.0)
    s = logits(x.double(), weight.double(), bias.double()).log_softmax(-1)
    t = torch.empty_like(s).scatter_(1, ids, logp.double())
    of, to = (t, s) if beta == 0 else (s, t)
    expected = F.kl_div(to, of, reduction="none", log_target=True).sum(-1)
    for tail in TAILS:
        found = tilefuse.linear_topk_distillation(
            x, weight, logp, ids, None, bias, beta=beta, tail=tail, reduction="none"
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@each_beta
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("apart", [1e-3, 0.0])
def test_close_to_the_teacher(apart, tail, beta, where):
    """A loss that is a difference of nearly equal sums: right to a percent, and never negative."""
    x, weight, logp, ids, _, bias = case(8, 40, 8, 9, where, apart=apart, padded=0.0)
    options = {"beta": beta, "tail": tail, "reduction": "none"}
    leaves = (x, weight, bias)
    found = gradients(lambda x, w, b: tilefuse.linear_topk_distillation(x, w, logp, ids, None, b, **options), leaves)
    assert (found[0] >= 0).all()
    if apart > 0:
        exact = gradients(lambda x, w, b: naive(x, w, logp, ids, None, b, **options), leaves, torch.float64)
        for a, b in zip(found, exact):
            assert (a.double() - b).norm() < 1e-2 * b.norm()


@each_beta
def test_listed_mass_of_one_in_float32(beta, where):
    """The student's tail is a sum over the others: its gradient is there where 1 - P would be 0."""
    x, weight, logp, ids, _, bias = case(4, 70, 8, 3, where, padded=0.0)
    # the teacher's first token towers for the student, who has 1e-12 for all others; the teacher has 1e-3 for them
    bias[:] = -30
    bias[ids[0]] = 10
    ids = ids[:1].expand(4, 3).contiguous()
    logp = torch.tensor([[0.9, 0.09, 0.009]], device=where).log().expand(4, 3).contiguous()
    leaves = (0.1 * x, weight, bias)
    p = logits(*(t.double() for t in leaves)).softmax(-1)
    assert (p.gather(-1, ids).sum(-1).float() == 1).all()
    found = gradients(lambda *t: tilefuse.linear_topk_distillation(*t[:2], logp, ids, None, t[2], beta=beta), leaves)
    exact = gradients(lambda *t: naive(*t[:2], logp, ids, None, t[2], beta=beta), leaves, torch.float64)
    for a, b in zip(found, exact):
        assert (a.double() - b).abs().max() < 1e-5 * b.abs().max()
    others = torch.ones(70, dtype=torch.bool, device=where).scatter(0, ids[0], False)
    torch.testing.assert_close(found[3][others].double(), exact[3][others], rtol=1e-4, atol=0)
    assert (found[3][others] != 0).all()


@pytest.mark.parametrize("missing", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_tail_of_one_side_is_left_out(missing, beta, where):
    """The category goes, and what is listed keeps its masses."""
    x, weight, logp, ids, _, bias = case(5, 30, 8, 6, where, padded=0.0)
    if missing == "student":
        ids = ids[:1].expand(5, 6).contiguous()
        bias = torch.full_like(bias, -math.inf).scatter(0, ids[0], 0.3)
    else:
        logp = logp.log_softmax(-1).nextafter(torch.tensor(math.inf, device=where))
        assert (logp.double().exp().sum(-1) > 1).all()
    found = gradients(
        lambda x, w: tilefuse.linear_topk_distillation(x, w, logp, ids, None, bias, beta=beta), (x, weight)
    )
    exact = gradients(lambda x, w: naive(x, w, logp, ids, None, bias, beta=beta), (x, weight), torch.float64)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_limits(where):
    """A mass of 0 on either side."""
    x, weight, logp, ids, _, bias = case(3, 30, 8, 6, where, padded=0.0)
    run = tilefuse.linear_topk_distillation
    zero = logp.clone()
    zero[:, 2] = -math.inf
    tiny = zero.clamp(min=-1e3)
    for tail in TAILS:
        # 0 log 0 = 0
        finite = gradients(lambda x, w, tail=tail: run(x, w, zero, ids, None, bias, tail=tail), (x, weight))
        exact = gradients(
            lambda x, w, tail=tail: naive(x, w, tiny, ids, None, bias, tail=tail), (x, weight), torch.float64
        )
        for a, b in zip(finite, exact):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        assert run(x, weight, zero, ids, None, bias, beta=1.0, tail=tail) == math.inf
    # the student's, of one token
    never = bias.index_fill(0, ids[1, 3], -math.inf)
    losses = run(x, weight, logp, ids, None, never, reduction="none")
    listed = (ids == ids[1, 3]).any(1)
    assert (losses[listed] == math.inf).all() and losses[~listed].isfinite().all() and listed[1]
    assert run(x, weight, logp, ids, None, never, beta=0.5).isfinite()


def test_only_scores_are_needed_to_renormalize(where):
    x, weight, logp, ids, _, bias = case(6, 70, 8, 5, where, padded=0.0)
    found = [
        tilefuse.linear_topk_distillation(x, weight, logp + shift, ids, None, bias, tail="renormalize")
        for shift in (0.0, 1024.0)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_truncated_sum_may_be_negative(where):
    x, weight, _, ids, *_ = case(1, 30, 8, 1, where, padded=0.0)
    log_p = logits(x, weight).log_softmax(-1).gather(-1, ids)
    loss = tilefuse.linear_topk_distillation(x, weight, 2 * log_p, ids, tail="none")
    torch.testing.assert_close(loss, (2 * log_p).exp().sum() * log_p.sum())
    assert loss < 0


@pytest.mark.parametrize("tokens", [0, 5])
@each_tail
def test_nothing_is_kept(tail, tokens, where):
    x, weight, logp, ids, target, bias = case(tokens, 20, 8, 4, where, ignored=1.1)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with poisoned():
        loss = tilefuse.linear_topk_distillation(*leaves[:2], logp, ids, target, leaves[2], tail=tail)
        found = torch.autograd.grad(loss, leaves)
    assert loss == 0
    for gradient, leaf in zip(found, leaves):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("why", ["num_items", "token_weight", "padding"])
def test_nothing_counts(why, where):
    x, weight, logp, ids, _, bias = case(5, 20, 8, 4, where)
    options = {"num_items": {"num_items": 0}, "token_weight": {"token_weight": torch.zeros(5, device=where)}}
    if why == "padding":
        ids = torch.full_like(ids, -1)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = tilefuse.linear_topk_distillation(*leaves[:2], logp, ids, None, leaves[2], **options.get(why, {}))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, leaves):
        assert not gradient.any()


def test_ignored_tokens_are_never_read(where):
    x, weight, logp, ids, target, bias = case(9, 70, 8, 4, where, torch.bfloat16)
    ignored = target == IGNORED
    token_weight = torch.rand(9, device=where)

    def run(x, logp, ids, token_weight):
        return gradients(
            lambda x, w, b: tilefuse.linear_topk_distillation(x, w, logp, ids, target, b, token_weight),
            (x, weight, bias),
        )

    clean = run(x, logp, ids, token_weight)
    row = ignored[:, None]
    dirty = run(
        x.masked_fill(row, math.nan),
        logp.masked_fill(row, math.inf),
        ids.masked_fill(row, 2**40),
        token_weight.masked_fill(ignored, math.nan),
    )
    for a, b in zip(dirty, clean):
        assert_bit_equal(a, b)
    assert not clean[1][ignored].any()


def test_target_selects_alone(where):
    """Its other values mean nothing, none at all keeps every token, and any mark will do."""
    x, weight, logp, ids, target, bias = case(9, 70, 8, 4, where)
    expected = tilefuse.linear_topk_distillation(x, weight, logp, ids, target, bias)
    kept = target != IGNORED
    odd = torch.where(kept, -7, 3).to(torch.int32)
    assert_bit_equal(tilefuse.linear_topk_distillation(x, weight, logp, ids, odd, bias, ignore_index=3), expected)
    some = [t[kept] for t in (logp, ids)]
    for ignore_index in (IGNORED, 0, -1):
        found = tilefuse.linear_topk_distillation(x[kept], weight, *some, None, bias, ignore_index=ignore_index)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [-2, 20, 2**40, "twice"])
def test_ids_out_of_range(wrong, where):
    """An error where the host sees them; on a GPU NaN for the token, with nothing read or written elsewhere."""
    x, weight, logp, ids, *_ = case(6, 20, 8, 4, where, padded=0.0)
    bad = ids.clone()
    bad[2, 1] = bad[2, 0] if wrong == "twice" else wrong
    if tilefuse.backend() != "triton":
        what = (
            rf"distinct in each row, got {bad[2, 0]} twice" if wrong == "twice" else rf"in \[0, 20\) or -1, got {wrong}"
        )
        with pytest.raises(ValueError, match=rf"^tilefuse\.linear_topk_distillation: teacher_ids must be {what}"):
            tilefuse.linear_topk_distillation(x, weight, logp, bad)
        return
    guarded = canary((6, 4), torch.int64, where)
    guarded.tensor.copy_(bad)
    x.requires_grad_()
    losses = tilefuse.linear_topk_distillation(x, weight, logp, guarded.tensor, reduction="none")
    guarded.check()
    right = tilefuse.linear_topk_distillation(x, weight, logp, ids, reduction="none")
    others = torch.arange(6, device=where) != 2
    assert losses[2].isnan()
    assert_bit_equal(losses[others], right[others])
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert dx[2].isnan().all()
    assert_bit_equal(dx[others], torch.autograd.grad(right.sum(), x)[0][others])


def test_nan_stays_in_its_row(where):
    x, weight, logp, ids, _, bias = case(6, 70, 8, 4, where, padded=0.0)
    clean = tilefuse.linear_topk_distillation(x, weight, logp, ids, None, bias, reduction="none")
    x[1, 0], logp[4, 2] = math.nan, math.nan
    losses = tilefuse.linear_topk_distillation(x, weight, logp, ids, None, bias, reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False, True, False]
    assert_bit_equal(losses[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_large_logits(where):
    """Far from 0, where float32 has few digits left of the logits but not of their differences."""
    x, weight, logp, ids, _, bias = case(6, 70, 8, 4, where)
    for shift in (1e4, -1e4):
        args = (x, weight, logp, ids, None, bias + shift)
        exact = naive(x.double(), weight.double(), *args[2:5], (bias + shift).double())
        torch.testing.assert_close(tilefuse.linear_topk_distillation(*args).double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,)], ids=str)
def test_only_what_is_needed(needed, where):
    x, weight, logp, ids, target, bias = case(9, 70, 8, 4, where, torch.bfloat16)
    full = gradients(lambda x, w, b: tilefuse.linear_topk_distillation(x, w, logp, ids, target, b), (x, weight, bias))
    part = [t.clone().requires_grad_(i in needed) for i, t in enumerate((x, weight, bias))]
    loss = tilefuse.linear_topk_distillation(*part[:2], logp.requires_grad_(), ids, target, part[2])
    for i, gradient in zip(needed, torch.autograd.grad(loss, [part[i] for i in needed])):
        assert_bit_equal(gradient, full[i + 1])
    # the teacher is data
    with pytest.raises(RuntimeError, match="not have been used"):
        loss = tilefuse.linear_topk_distillation(*part[:2], logp, ids, target, part[2])
        torch.autograd.grad(loss, [logp, *(part[i] for i in needed)])
    with torch.no_grad():
        assert_bit_equal(tilefuse.linear_topk_distillation(*part[:2], logp, ids, target, part[2]), full[0])


@pytest.mark.parametrize("power", [2.0**16, 2.0**-24])
def test_gradients_scale_exactly(power, where):
    x, weight, logp, ids, target, bias = case(9, 70, 8, 4, where, torch.float16)

    def run(scale):
        return gradients(lambda b: scale * tilefuse.linear_topk_distillation(x, weight, logp, ids, target, b), (bias,))[
            1
        ]

    assert_bit_equal(run(power), run(1.0) * power)


def test_backward_twice_and_checkpoint(where):
    x, weight, logp, ids, target, bias = case(9, 70, 8, 4, where, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def run(x, weight, bias):
        return tilefuse.linear_topk_distillation(x, weight, logp, ids, target, bias, beta=0.4)

    loss = run(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    recomputed = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves)
    for a, b, c in zip(first, again, recomputed):
        assert_bit_equal(a, b)
        assert_bit_equal(a, c)


def test_second_derivative_raises():
    x, weight, logp, ids, *_ = case(4, 9, 3, 2)
    x.requires_grad_()
    loss = tilefuse.linear_topk_distillation(x, weight, logp, ids)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_topk_distillation: the op is differentiable once"):
        (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "tail": "renormalize"}], ids=["bucket", "renormalize"])
def test_batch_invariant(options, where):
    """A token's loss depends on no other, nor on the order of what is listed."""
    # plain PyTorch, whose products depend on the number of rows
    if tilefuse.backend() == "reference":
        return
    x, weight, logp, ids, _, bias = case(35, 70, 8, 9, where, torch.bfloat16)
    run = functools.partial(tilefuse.linear_topk_distillation, **options, reduction="none")
    whole = run(x, weight, logp, ids, None, bias)
    # the interpreter's own products are those of one tile size
    least = 17 if where == "cpu" and tilefuse.backend() == "triton" else 1
    for rows in (slice(0, least), torch.randperm(35, device=where)):
        assert_bit_equal(run(x[rows], weight, logp[rows], ids[rows], None, bias), whole[rows])
    assert_bit_equal(run(x, weight, logp.flip(1), ids.flip(1), None, bias), whole)


def test_strides_and_leading_dims(where):
    x, weight, logp, ids, target, bias = case(12, 37, 6, 5, where)
    run = tilefuse.linear_topk_distillation
    expected = run(x, weight, logp, ids, target, bias, reduction="none")
    strided = (t.t().contiguous().t() for t in (x, weight, logp, ids))
    assert_bit_equal(run(*strided, target, bias, reduction="none"), expected)
    shaped = run(
        x.view(3, 4, 6), weight, logp.view(3, 4, 5), ids.view(3, 4, 5).int(), target.view(3, 4), bias, reduction="none"
    )
    assert_bit_equal(shaped, expected.view(3, 4))
    one = run(x[0], weight, logp[0], ids[0], target[0], bias, reduction="none")
    torch.testing.assert_close(one, expected[0])
    wide = run(x, weight, logp.double(), ids, target, bias, reduction="none")
    assert_bit_equal(wide, expected)


def test_autocast():
    x, weight, logp, ids, target, bias = case(9, 70, 8, 4)
    leaves = [t.requires_grad_() for t in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = tilefuse.linear_topk_distillation(x, weight, logp, ids, target, bias)
    dx, dweight = torch.autograd.grad(loss, leaves)
    assert dx.dtype == dweight.dtype == torch.float32
    halves = [t.detach().bfloat16() for t in leaves]
    assert_bit_equal(loss.detach(), tilefuse.linear_topk_distillation(*halves, logp, ids, target, bias))


def test_triton_blocks_of_the_vocabulary(triton_backend, monkeypatch):
    """More than one block of the backward, the last one ragged."""
    module = importlib.import_module("tilefuse.triton_kernels.loss.linear_logprobs")
    x, weight, logp, ids, target, bias = case(20, 300, 40, 9, "cuda" if torch.cuda.is_available() else "cpu")

    def run():
        return gradients(
            lambda x, w, b: tilefuse.linear_topk_distillation(x, w, logp, ids, target, b), (x, weight, bias)
        )

    whole = run()
    monkeypatch.setattr(module, "BLOCK_IDS", 128)
    for a, b in zip(run(), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_library
def test_threads_change_nothing():
    x, weight, logp, ids, target, bias = case(600, 5000, 40, 20, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                gradients(
                    lambda x, w, b: tilefuse.linear_topk_distillation(x, w, logp, ids, target, b), (x, weight, bias)
                )
            )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found):
        assert_bit_equal(a, b)


def test_allocates_nothing_of_all_logits(where, monkeypatch):
    """Of PyTorch's allocations none has T x V elements, nor is a float32 V x H."""
    if tilefuse.backend() == "reference":
        return
    module = importlib.import_module("tilefuse.triton_kernels.loss.linear_logprobs")
    monkeypatch.setattr(module, "BLOCK_IDS", 128)
    tokens, vocabulary, hidden = 40, 600, 24
    x, weight, logp, ids, target, bias = case(tokens, vocabulary, hidden, 4, where, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with allocations() as made:
        loss = tilefuse.linear_topk_distillation(*leaves[:2], logp, ids, target, leaves[2])
        torch.autograd.grad(loss, leaves)
    assert max(m.numel for m in made) <= vocabulary * hidden
    assert all(m.numel < vocabulary * hidden or m.dtype == torch.bfloat16 for m in made)


X, W, P = torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, 5)
IDS, T = torch.arange(5).expand(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"x must be \[\.\.\., H\]", (X[0, 0, 0], W, P, IDS), {}),
        (TypeError, "weight must be of x's dtype float32", (X, W.bfloat16(), P, IDS), {}),
        (ValueError, r"teacher_ids must be \[2, 3, k\], got \[2, 5\] int64", (X, W, P, IDS[:, 0]), {}),
        (ValueError, r"teacher_ids must be \[2, 3, k\], got \[2, 2, 5\] int64", (X, W, P, IDS[:, :2]), {}),
        (TypeError, "teacher_ids must be int32 or int64", (X, W, P, P), {}),
        (ValueError, r"teacher_logp must be of teacher_ids' shape \[2, 3, 5\], got", (X, W, P[..., :4], IDS), {}),
        (TypeError, "teacher_logp must be float32 or", (X, W, IDS, IDS), {}),
        (ValueError, r"target must be \[2, 3\] int32 or int64, got \[2\]", (X, W, P, IDS, T[:, 0]), {}),
        (TypeError, "target must be int32 or int64", (X, W, P, IDS, X[..., 0]), {}),
        (ValueError, r"bias must be \[9\], got \[4\]", (X, W, P, IDS, T, W[0]), {}),
        (ValueError, r"token_weight must be \[2, 3\], got \[4\]", (X, W, P, IDS, None, None, W[0]), {}),
        (TypeError, "token_weight must be float32 or", (X, W, P, IDS, T, None, T), {}),
        (
            RuntimeError,
            "but token_weight requires grad",
            (X, W, P, IDS, T, None, X[..., 0].clone().requires_grad_()),
            {},
        ),
        (ValueError, "num_items must be a number or a tensor without dims", (X, W, P, IDS), {"num_items": W[0]}),
        (
            ValueError,
            "num_items must be None with reduction='none', which does not divide",
            (X, W, P, IDS),
            {"num_items": torch.tensor(2), "reduction": "none"},
        ),
        (ValueError, "teacher_ids must be on the device of x", (X, W, P, IDS.to("meta")), {}),
        (ValueError, "teacher_logp must be on the device of x", (X, W, P.to("meta"), IDS), {}),
        (ValueError, r"beta must be in \[0, 1\], got 1.5", (X, W, P, IDS), {"beta": 1.5}),
        (ValueError, r"beta must be in \[0, 1\], got nan", (X, W, P, IDS), {"beta": math.nan}),
        (ValueError, "tail must be one of bucket, renormalize, none, got 'drop'", (X, W, P, IDS), {"tail": "drop"}),
        (ValueError, "temperature must be above 0", (X, W, P, IDS), {"temperature": 0.0}),
        (ValueError, "reduction must be one of mean, sum, none, got 'max'", (X, W, P, IDS), {"reduction": "max"}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.linear_topk_distillation, torch.ops.tilefuse.linear_topk_distillation):
        with pytest.raises(error, match=rf"^tilefuse\.linear_topk_distillation: .*{match}"):
            call(*args, **options)
