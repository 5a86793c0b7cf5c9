"""``distillation`` on every backend, against the definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.loss.distillation import IGNORED, case, divergences, naive, weights

KERNEL = "distillation_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS = [0.0, 1e-3, 0.5, 1.0]
each_beta = pytest.mark.parametrize("beta", BETAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gradient(function, logits, dtype=None, upstream=None):
    """(loss, gradient of the logits)."""
    leaf = logits.detach().to(dtype or logits.dtype, copy=True).requires_grad_()
    loss = function(leaf)
    return loss.detach(), *torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss))


def check(logits, teacher, target, token_weight=None, num_items=None, **options):
    """Loss and gradient against float64."""
    extra = (target, token_weight, num_items)
    upstream = torch.randn_like(logits[..., 0].float()) if options.get("reduction") == "none" else None
    with poisoned():
        found = gradient(lambda z: tilefuse.distillation(z, teacher, *extra, **options), logits, upstream=upstream)
    exact = gradient(lambda z: naive(z, teacher.double(), *extra, **options), logits, torch.float64, upstream)
    same = gradient(lambda z: naive(z, teacher, *extra, **options), logits, upstream=upstream)
    assert found[0].dtype == torch.float32 and found[1].dtype == logits.dtype
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=1e-8)
    assert_close(found[1], exact[1], same[1], rows=False)


@each_dtype
@each_beta
def test_matches_oracle(beta, dtype, where):
    check(*case(7, 133, where, dtype, more=24), beta=beta, temperature=1.3)


@each_beta
@pytest.mark.parametrize(("tokens", "vocabulary", "more"), [(1, 1, 0), (6, 70, -24)], ids=str)
def test_sizes(tokens, vocabulary, more, beta, where):
    check(*case(tokens, vocabulary, where, more=more, ignored=0.0), beta=beta)


@pytest.mark.slow_in_interpreter
@each_beta
def test_several_blocks(beta, where):
    check(*case(2, 2 * 4096 + 9, where, more=24, ignored=0.0), beta=beta)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("targeted", [False, True], ids=["all", "target"])
def test_reductions(targeted, reduction, where):
    logits, teacher, target = case(6, 70, where)
    num_items = 5 if reduction == "mean" and targeted else None
    check(logits, teacher, target if targeted else None, weights(6, where), num_items, reduction=reduction)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_is_pytorchs(beta, where):
    """``F.kl_div`` of the two at the ends."""
    logits, teacher, _ = case(4, 70, where)
    log_s, log_t = logits.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        expected = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    elif beta == 1:
        expected = F.kl_div(log_t, log_s, reduction="batchmean", log_target=True)
    else:
        log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        parts = [F.kl_div(log_m, log_p, reduction="batchmean", log_target=True) for log_p in (log_t, log_s)]
        expected = beta * parts[0] + (1 - beta) * parts[1]
    torch.testing.assert_close(tilefuse.distillation(logits, teacher, beta=beta), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 1.0])
def test_gradcheck(beta):
    logits, teacher, target = case(5, 11, more=3)
    logits = logits.double().requires_grad_()
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda z: tilefuse.distillation(z, teacher.double(), target, weights(5), beta=beta, temperature=0.7),
            logits,
        )


@pytest.mark.parametrize("apart", [1e-3, 1e-4])
@each_beta
def test_near_agreement(beta, apart, where):
    """Where distillation ends: the sums of the definition have lost all digits in float32, and turn negative."""
    logits, teacher, _ = case(4, 500, where, apart=apart)
    options = {"beta": beta, "reduction": "none"}
    upstream = torch.ones(4, device=where)
    losses, dlogits = gradient(lambda z: tilefuse.distillation(z, teacher, **options), logits, upstream=upstream)
    right, exact = gradient(lambda z: divergences(z, teacher.double(), beta, 1.0), logits, torch.float64, upstream)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses.double(), right, rtol=1e-2 if apart < 1e-3 else 1e-3, atol=0)
    error = (dlogits.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error < (1e-2 if apart > 1e-4 else 0.1)).all()


@each_dtype
@each_beta
def test_agreement_is_zero(beta, dtype, where):
    logits, _, _ = case(3, 500, where, dtype)
    loss, dlogits = gradient(lambda z: tilefuse.distillation(z, logits, beta=beta), logits)
    assert loss == 0 and not dlogits.any()


@each_beta
def test_never_negative(beta, where):
    """From bits apart to one-hot distributions."""
    logits, _, _ = case(4, 200, where)
    for apart in (1e-7, 1e-5, 1e-2, 3.0, 100.0):
        teacher = logits + apart * torch.randn_like(logits)
        losses = tilefuse.distillation(logits, teacher, beta=beta, reduction="none")
        assert (losses >= 0).all() and losses.isfinite().all()


@each_beta
def test_far_apart(beta, where):
    """Probabilities that one side rounds to 0, where a quotient overflows."""
    logits, teacher, _ = case(6, 70, where)
    logits[:3, 4] += 200.0
    teacher[2:5, 9] += 400.0
    loss, dlogits = gradient(lambda z: tilefuse.distillation(z, teacher, beta=beta), logits)
    right, exact = gradient(lambda z: naive(z, teacher.double(), beta=beta), logits, torch.float64)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    torch.testing.assert_close(dlogits.double(), exact, rtol=1e-5, atol=3e-6 * exact.abs().max().item())


def test_infinities(where):
    """Ids that a side rules out: terms are their limits."""
    z = torch.randn(1, 20, device=where)
    student = z + 0.1 * torch.randn_like(z)

    def without(y, id):
        return y.index_fill(1, torch.tensor([id], device=where), -math.inf)

    for beta in BETAS:
        for y, t, infinite in ((student, without(z, 3), beta == 1), (without(student, 5), z, beta == 0)):
            if infinite:
                assert tilefuse.distillation(y, t, beta=beta) == math.inf
                continue
            found = gradient(lambda y, t=t, beta=beta: tilefuse.distillation(y, t, beta=beta), y)
            # a logit whose share is 0 in float64 too
            near = [side.clamp(min=-2000.0).double() for side in (y, t)]
            right = gradient(lambda y, t=near[1], beta=beta: naive(y, t, beta=beta), near[0])
            for a, b in zip(found, right):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
        both = without(z, 7)
        loss, dlogits = gradient(lambda y, both=both, beta=beta: tilefuse.distillation(y, both, beta=beta), both)
        assert loss == 0 and not dlogits.any()


def test_garbage_stays_in_its_row(where):
    logits, teacher, _ = case(6, 70, where)
    clean = gradient(lambda z: tilefuse.distillation(z, teacher, reduction="none"), logits, upstream=logits[:, 0])
    bad, bad_teacher = logits.clone(), teacher.clone()
    bad[1, 0], bad[2, 1], bad_teacher[3, 5] = math.nan, math.inf, math.nan
    bad[5] = -math.inf
    found = gradient(lambda z: tilefuse.distillation(z, bad_teacher, reduction="none"), bad, upstream=logits[:, 0])
    assert found[0][[1, 3]].isnan().all() and found[1][[1, 3]].isnan().any(1).all()
    for a, b in zip(found, clean):
        assert_bit_equal(a[[0, 4]], b[[0, 4]])


@each_beta
def test_ignored_tokens_are_never_read(beta, where):
    logits, teacher, target = case(5, 70, where, torch.bfloat16)
    target[3] = IGNORED
    ignored, token = target == IGNORED, weights(5, where)

    def run(logits, teacher, token):
        return gradient(lambda z: tilefuse.distillation(z, teacher, target, token, beta=beta), logits)

    clean = run(logits, teacher, token)
    dirty = run(
        logits.masked_fill(ignored[:, None], math.nan),
        teacher.masked_fill(ignored[:, None], math.inf),
        token.masked_fill(ignored, math.nan),
    )
    for a, b in zip(dirty, clean):
        assert_bit_equal(a, b)
    assert not clean[1][ignored].any()


def test_a_weight_of_0_meets_infinity(where):
    """0 and not NaN, in the loss and in the gradient."""
    logits, teacher, _ = case(4, 20, where)
    logits[1, 3] = -math.inf
    token = torch.tensor([1.0, 0.0, 1.0, 1.0], device=where)
    loss, dlogits = gradient(lambda z: tilefuse.distillation(z, teacher, None, token, beta=0.0), logits)
    assert loss.isfinite() and dlogits.isfinite().all() and not dlogits[1].any()


@pytest.mark.parametrize("why", ["no_tokens", "ignored", "num_items", "token_weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_divide_by(why, reduction, where):
    """0 with gradients that are there and 0, never NaN."""
    if why == "num_items" and reduction == "sum":
        return
    logits, teacher, target = case(0 if why == "no_tokens" else 5, 20, where, ignored=1.1 if why == "ignored" else 0)
    options = {"num_items": {"num_items": 0}, "token_weight": {"token_weight": torch.zeros(5, device=where)}}
    loss, dlogits = gradient(
        lambda z: tilefuse.distillation(z, teacher, target, **options.get(why, {}), reduction=reduction), logits
    )
    assert loss == 0 and dlogits.shape == logits.shape and not dlogits.any()


def test_padding_never_matters(where):
    """Ids that one side alone has, NaN among them: the same bits, and no gradient."""
    logits, teacher, target = case(3, 37, where)
    garbage = torch.full((3, 24), math.nan, device=where)
    right = gradient(lambda z: tilefuse.distillation(z, teacher, target), logits)
    more = gradient(lambda z: tilefuse.distillation(z, torch.cat((teacher, garbage), 1), target), logits)
    fewer = gradient(lambda z: tilefuse.distillation(z, teacher, target), torch.cat((logits, garbage), 1))
    for a, b in zip(right, more):
        assert_bit_equal(a, b)
    assert_bit_equal(fewer[0], right[0])
    assert_bit_equal(fewer[1][:, :37], right[1])
    assert not fewer[1][:, 37:].any()


def test_the_teacher_is_data(where):
    """It may require a gradient and gets none; any dtype of its own."""
    logits, teacher, target = case(3, 37, where, torch.bfloat16)
    leaves = [logits.requires_grad_(), teacher.float().requires_grad_()]
    loss = tilefuse.distillation(leaves[0], leaves[1], target)
    dlogits, dteacher = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert dteacher is None and dlogits.dtype == torch.bfloat16
    for wide in (teacher, teacher.double()):
        assert_bit_equal(tilefuse.distillation(logits, wide, target), loss)
    assert not tilefuse.distillation(logits.detach(), leaves[1], target).requires_grad


def test_backward_twice_and_checkpoint(where):
    logits, teacher, target = case(4, 70, where)
    logits.requires_grad_()

    def run(z):
        return tilefuse.distillation(z, teacher, target)

    loss = run(logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, logits)
    (recomputed,) = torch.autograd.grad(checkpoint(run, logits, use_reentrant=False), logits)
    assert_bit_equal(twice, 2 * first)
    assert_bit_equal(again, first)
    assert_bit_equal(recomputed, first)


def test_second_derivative_raises():
    logits, teacher, _ = case(4, 9)
    logits.requires_grad_()
    (dlogits,) = torch.autograd.grad(tilefuse.distillation(logits, teacher), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="distillation: the op is differentiable once"):
        (dlogits.square().sum() + logits.sum()).backward()


def test_batch_invariant_and_strides(where):
    logits, teacher, _ = case(9, 70, where, torch.bfloat16)

    def run(z, t):
        return tilefuse.distillation(z, t, reduction="none")

    whole = run(logits, teacher)
    for rows in (slice(0, 1), torch.randperm(9, device=where)):
        # plain PyTorch adds in the order of the tensor's shape
        if tilefuse.backend() != "reference":
            assert_bit_equal(run(logits[rows], teacher[rows]), whole[rows])
    wide = torch.cat((torch.full_like(logits, math.nan), logits), 1)[:, 70:]
    assert_bit_equal(run(wide, teacher.t().contiguous().t()), whole)
    assert_bit_equal(run(logits.view(3, 3, 70), teacher.view(3, 3, 70)), whole.view(3, 3))
    assert_bit_equal(run(logits[0], teacher[0]), run(logits[:1], teacher[:1])[0])


def test_compiles_without_a_break():
    logits, teacher, target = case(9, 70)
    token = weights(9)

    def run(z):
        return tilefuse.distillation(z, teacher, target, token)

    for a, b in zip(gradient(torch.compile(run, fullgraph=True, backend="aot_eager"), logits), gradient(run, logits)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


Z, T = torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"logits must be \[\.\.\., V\] with V >= 1, got \[\] float32", (Z[0, 0, 0], Z), {}),
        (ValueError, r"logits must be \[\.\.\., V\] with V >= 1", (Z[..., :0], Z), {}),
        (TypeError, "logits must be float32 or", (Z.int(), Z), {}),
        (ValueError, r"teacher_logits must be \[2, 3, V_teacher\] with V_teacher >= 1, got \[2, 9\]", (Z, Z[:, 0]), {}),
        (ValueError, r"teacher_logits must be \[2, 3, V_teacher\] with V_teacher >= 1", (Z, Z[..., :0]), {}),
        (TypeError, "teacher_logits must be float32 or", (Z, Z.int()), {}),
        (ValueError, "teacher_logits must be on the device of logits", (Z, Z.to("meta")), {}),
        (ValueError, r"target must be \[2, 3\] int32 or int64, got \[2\] int64", (Z, Z, T[:, 0]), {}),
        (TypeError, "target must be int32 or int64", (Z, Z, T.float()), {}),
        (ValueError, "target must be on the device of logits", (Z, Z, T.to("meta")), {}),
        (ValueError, r"token_weight must be \[2, 3\], got \[2\] float32", (Z, Z, T, Z[:, 0, 0]), {}),
        (TypeError, "token_weight must be float32 or", (Z, Z, T, T), {}),
        (ValueError, "token_weight must be on the device of logits", (Z, Z, T, Z[..., 0].to("meta")), {}),
        (ValueError, "num_items must be a number or a tensor without dims", (Z, Z, T, None, Z[0, 0]), {}),
        (ValueError, "num_items must be None with", (Z, Z, T, None, torch.tensor(2)), {"reduction": "none"}),
        (ValueError, "reduction must be one of mean, sum, none, got 'max'", (Z, Z), {"reduction": "max"}),
        (ValueError, r"beta must be in \[0, 1\], got 1.5", (Z, Z), {"beta": 1.5}),
        (ValueError, r"beta must be in \[0, 1\], got nan", (Z, Z), {"beta": math.nan}),
        (ValueError, "temperature must be above 0", (Z, Z), {"temperature": 0.0}),
        (
            RuntimeError,
            "it has no gradient, but token_weight requires grad",
            (Z, Z, T, Z[..., 0].clone().requires_grad_()),
            {},
        ),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.distillation, torch.ops.tilefuse.distillation):
        with pytest.raises(error, match=rf"^tilefuse\.distillation: {match}"):
            call(*args, **options)
