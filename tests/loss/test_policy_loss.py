"""``policy_loss``: against the formulas of TRL and verl, written out per sequence and differentiated in float64."""

import itertools
import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.loss.policy_loss import bounds, case

KERNEL = "policy_loss_fwd"
BACKWARD = "policy_loss_bwd"
DEFAULTS = {
    "kind": "clip",
    "level": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "kl": "k3",
    "kl_beta": 0.0,
    "kl_weighted": False,
    "log_ratio_limit": 20.0,
    "reduction": "token",
}  # fmt: skip


def in_interpreter(where):
    return tilefuse.backend() == "triton" and where == "cpu"


def sequences_of(logp, cu_seqlens):
    """Flat token numbers of each sequence; loose packed tokens are one."""
    if cu_seqlens is not None:
        return [range(*pair) for pair in itertools.pairwise(cu_seqlens.tolist())]
    if logp.dim() == 1:
        return [range(len(logp))]
    return [range(b * logp.shape[1], (b + 1) * logp.shape[1]) for b in range(logp.shape[0])]


def token_losses(logp, advantages, old, ref, weight, o):
    """Losses of one sequence's kept tokens, and their ratios."""
    limit = o["log_ratio_limit"] or math.inf
    log_ratio = logp - (logp.detach() if old is None else old)
    token_ratio = log_ratio.clamp(-limit, limit).exp()
    ratio = token_ratio
    if o["level"] == "sequence":
        ratio = log_ratio.mean().clamp(-limit, limit).exp().expand(logp.shape)
    if o["kind"] == "clip":
        clipped = ratio.clamp(1 - o["clip_low"], 1 + o["clip_high"])
        loss = -torch.min(ratio * advantages, clipped * advantages)
        if o["dual_clip"]:
            loss = torch.where(advantages < 0, torch.min(loss, -o["dual_clip"] * advantages), loss)
    elif o["kind"] == "cispo":
        loss = -ratio.clamp(max=1 + o["clip_high"]).detach() * advantages * logp
    else:
        loss = -advantages * logp
    if o["kl_beta"]:
        e = (ref - logp).clamp(-limit, limit)
        k1, k2, k3 = -e, e.square() / 2, e.exp() - e - 1
        kl = {"k1": k1, "k2": k2, "k3": k3, "k3+": k2 + (k3 - k2).detach()}[o["kl"]]
        loss = loss + o["kl_beta"] * (token_ratio * kl if o["kl_weighted"] else kl)
    return loss if weight is None else loss * weight, ratio.detach()


def by_hand(dtype, logp, advantages, old=None, ref=None, mask=None, weight=None, cu=None, num_items=None, **options):
    """(loss, gradient of logp for an upstream of 1, stats), computed in `dtype` from kept tokens alone."""
    o = DEFAULTS | options
    leaf = logp.detach().cpu().to(dtype).flatten().requires_grad_()
    keep = torch.ones(leaf.shape, dtype=torch.bool) if mask is None else mask.cpu().bool().flatten()
    sequences = sequences_of(logp, cu)
    every, means, stats = torch.zeros_like(leaf), [], []
    for b, tokens in enumerate(sequences):
        at = torch.tensor([t for t in tokens if keep[t]], dtype=torch.long)
        if len(at) == 0:
            continue
        old_s, ref_s, weight_s = (None if x is None else x.cpu().to(dtype).flatten()[at] for x in (old, ref, weight))
        a = advantages.cpu().to(dtype)
        a = a.flatten()[at] if a.shape == logp.shape else a.flatten()[b].expand(len(at))
        loss, ratio = token_losses(leaf[at], a, old_s, ref_s, weight_s, o)
        every = every.index_put((at,), loss)
        means.append(loss.mean())
        clip, cispo = o["kind"] == "clip", o["kind"] == "cispo"
        e = torch.zeros(len(at), dtype=dtype) if ref_s is None else ref_s - leaf[at].detach()
        e = e.clamp(-(o["log_ratio_limit"] or math.inf), o["log_ratio_limit"] or math.inf)
        columns = (
            (ratio < 1 - o["clip_low"]) & (a < 0) & clip,
            (ratio > 1 + o["clip_high"]) & ((a > 0) & clip | cispo),
            (ratio > (o["dual_clip"] or math.inf)) & (a < 0) & clip,
            -e,
            e.exp() - e - 1,
            ratio,
        )
        stats.append(torch.stack([c.to(dtype) for c in columns], 1))
    rows = torch.cat(stats) if stats else torch.zeros(0, 6, dtype=dtype)
    largest = rows[:, -1].max() if len(rows) else torch.zeros((), dtype=dtype)
    stats = torch.stack([torch.tensor(len(rows), dtype=dtype), *rows.sum(0) / max(1, len(rows)), largest])
    if o["reduction"] == "none":
        loss, total = every.view(logp.shape), every.nan_to_num().sum()
    else:
        total = sum(means, leaf.nan_to_num().sum() * 0) if o["reduction"] == "sequence" else every.sum()
        if o["reduction"] != "sum":
            divisor = len(rows) if o["reduction"] == "token" else len(sequences)
            divisor = divisor if num_items is None else float(num_items)
            total = total / divisor if divisor else leaf.nan_to_num().sum() * 0
        loss = total
    (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    return loss.detach(), gradient.view(logp.shape), stats


def run(args, **options):
    logp = args[0].detach().clone().requires_grad_()
    with poisoned():
        loss, stats = tilefuse.policy_loss(logp, *args[1:], **options)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert not stats.requires_grad
    return loss.detach().cpu(), gradient.cpu(), stats.cpu()


def check(args, **options):
    found = run(args, **options)
    exact, naive = (by_hand(dtype, *args, **options) for dtype in (torch.float64, torch.float32))
    for name, a, b, c in zip(("loss", "gradient"), found, exact, naive):
        if a.dim() and a.numel():
            assert_close(a, b, c.to(a.dtype), rows=False)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(found[2].double(), exact[2], rtol=2e-5, atol=1e-6)
    if args[4] is not None:
        assert not found[1][~args[4].bool().cpu()].any()


def in_form(form, where, seed=0, per_sequence=False):
    """The arguments of one layout: padded, packed, or packed without bounds."""
    if form == "padded":
        return (*case((5, 37), where, seed=seed, per_sequence=5 * per_sequence), None)
    if form == "loose":
        return (*case((50,), where, seed=seed), None)
    return (*case((20,), where, seed=seed, per_sequence=4 * per_sequence), bounds(where))


POLICIES = [
    {"kind": "clip"},
    {"kind": "clip", "clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.3},
    {"kind": "cispo"},
    {"kind": "reinforce"},
]
DIVERGENCES = [
    {},
    {"kl": "k1", "kl_beta": 0.3},
    {"kl": "k2", "kl_beta": 0.3, "kl_weighted": True},
    {"kl": "k3", "kl_beta": 0.3},
    {"kl": "k3", "kl_beta": 0.3, "kl_weighted": True},
    {"kl": "k3+", "kl_beta": 0.3, "kl_weighted": True},
]


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum", "none"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_matches_the_formulas(level, reduction, where):
    """Each kind and divergence at each level, in every layout, each reduction."""
    share = ("token", "sequence", "sum", "none").index(reduction)
    for i, (policy, divergence) in enumerate(itertools.product(POLICIES, DIVERGENCES)):
        # the interpreter takes another eighth at each reduction and level
        if in_interpreter(where) and (i + (level == "sequence")) % 8 != 2 * share:
            continue
        form = ("padded", "packed", "loose")[i % 3]
        if form == "loose" and "sequence" in (level, reduction):
            form = "padded"
        options = {"level": level, "reduction": reduction, **policy, **divergence}
        check(in_form(form, where, i, per_sequence=i % 2 == 1 and form != "loose"), **options)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_logp_the_ratio_is_one(level, where):
    logp, advantages, _, ref, mask, weight, _ = in_form("padded", where)
    args = (logp, advantages, None, ref, mask, weight)
    check(args, level=level, reduction="sequence", kl="k3", kl_beta=0.2, kl_weighted=True)
    _, gradient, stats = run((logp, advantages, None, None, mask), level=level, reduction="sum")
    if level == "token":
        assert_bit_equal(gradient, torch.where(mask, -advantages, 0).cpu())
    assert stats[6] == stats[7] == 1


@pytest.mark.parametrize("tokens", [4095, 4096, 4097, 9001])
def test_long_inputs(tokens, where):
    """Past the pieces that tokens are cut into."""
    if in_interpreter(where) and tokens != 4097:
        pytest.skip("one length is enough for the interpreter")
    args = case((tokens,), where, spread=0.2)
    check((*args, None), kl_beta=0.1)
    check((*args, torch.tensor([0, 7, tokens], device=where)), level="sequence", reduction="sequence", kl_beta=0.1)
    if tokens == 4097:
        # rows of several pieces
        check((*case((2, tokens), where, spread=0.2), None), kind="cispo")


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_num_items(form, where):
    args = in_form(form, where)
    for reduction in ("token", "sequence"):
        check((*args, 1000), reduction=reduction, kl_beta=0.1)
        options = {"reduction": reduction, "kl_beta": 0.1}
        numbers = torch.tensor(1000.0, device=where), torch.tensor(1000, dtype=torch.int32)
        for number in numbers[: 1 if in_interpreter(where) else 2]:
            for a, b in zip(run((*args, number), **options), run((*args, 1000), **options)):
                assert_bit_equal(a, b)


def test_dr_grpo(where):
    """num_items = B L_max."""
    args = in_form("padded", where)
    loss, _, _ = run((*args, 5 * 37))
    total, _, _ = run(args, reduction="sum")
    torch.testing.assert_close(loss * (5 * 37), total)


def test_padded_equals_packed(where):
    padded = case((4, 23), where)
    packed = (*(x.flatten() for x in padded), torch.arange(5, device=where) * 23)
    levels, reductions = ("token", "sequence"), ("token", "sequence", "sum", "none")
    for level, reduction in [*itertools.product(levels, reductions)][:: 3 if in_interpreter(where) else 1]:
        options = {"level": level, "reduction": reduction, "kl_beta": 0.1}
        for a, b in zip(run(padded, **options), run(packed, **options)):
            assert_bit_equal(a.flatten(), b.flatten())


def test_advantages_per_sequence(where):
    logp, advantages, *rest = case((4, 9), where, per_sequence=4)
    whole = (logp, advantages[:, None].expand(4, 9), *rest)
    for given in (advantages, advantages[:, None], advantages[:, None].expand(4, 9).contiguous()):
        for a, b in zip(run((logp, given, *rest), kl_beta=0.1), run(whole, kl_beta=0.1)):
            assert_bit_equal(a, b)


@pytest.mark.parametrize("far", [1e3, -1e3, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_masked_never_matters(level, far, where):
    """0 * inf: where plain PyTorch has a NaN gradient."""
    if in_interpreter(where) and far in (1e3, -1e3):
        pytest.skip("the infinities are enough for the interpreter")
    options = {"level": level, "kl_beta": 0.5, "log_ratio_limit": 0.0, "kl_weighted": True, "reduction": "sequence"}
    logp, advantages, old, ref, mask, weight, _ = in_form("padded", where)
    clean = run((logp, advantages, old, ref, mask, weight), **options)
    hidden = [x.masked_fill(~mask, far) for x in (logp, advantages, -old, ref, weight)]
    found = run((hidden[0], hidden[1], -hidden[2], hidden[3], mask, hidden[4]), **options)
    for a, b in zip(found, clean):
        assert a.isfinite().all()
        assert_bit_equal(a, b)


def test_a_far_ratio_that_is_clipped_has_no_gradient(where):
    """Without a limit the ratio is inf: clipped from above it is finite, and A = 0 is 0."""
    logp = torch.tensor([1e3, 1e3, -1e3, -1e3], device=where)
    advantages = torch.tensor([2.0, 0.0, -2.0, 0.0], device=where)
    loss, gradient, stats = run((logp, advantages, torch.zeros_like(logp)), reduction="none", log_ratio_limit=0.0)
    torch.testing.assert_close(loss, torch.tensor([-2.4, 0.0, 1.6, 0.0]))
    assert not gradient.any()
    torch.testing.assert_close(stats[1:4], torch.tensor([0.25, 0.25, 0.0]))
    loss, gradient, stats = run(
        (logp[:1], -advantages[:1], torch.zeros_like(logp[:1])), reduction="none", log_ratio_limit=0.0, dual_clip=3.0
    )
    assert loss.item() == 6.0 and not gradient.any() and stats[3] == 1


def test_the_limit_clamps_both_log_ratios(where):
    logp = torch.tensor([3.0, 2.0, -2.0, -3.0], device=where)
    zero, advantages = torch.zeros_like(logp), torch.full_like(logp, -1.0)
    options = {"log_ratio_limit": 2.0, "reduction": "sum", "clip_low": 1.0, "clip_high": 100.0}
    _, gradient, _ = run((logp, advantages, zero), **options)
    # at equality the gradient passes
    torch.testing.assert_close(gradient, torch.tensor([0.0, math.exp(2), math.exp(-2), 0.0]))
    _, gradient, stats = run((logp, zero, logp, zero), kl_beta=1.0, **options)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1 - math.exp(-2), 1 - math.exp(2), 0.0]))
    torch.testing.assert_close(stats[5].item(), (math.exp(2) + math.exp(-2) - 2) / 2)


def test_a_ratio_at_its_bound_passes_the_gradient(where):
    """A clipped branch that is equal, not smaller."""
    logp = torch.tensor([-0.5, -0.25], device=where)
    advantages = torch.tensor([2.0, -3.0], device=where)
    options = {"clip_low": 0.0, "clip_high": 0.0, "reduction": "sum"}
    loss, gradient, stats = run((logp, advantages, logp.clone()), **options)
    assert loss.item() == 1.0 and gradient.tolist() == [-2.0, 3.0] and stats[1:4].tolist() == [0.0] * 3


def test_k3_of_policies_that_nearly_agree(where):
    """exp(e) - e - 1 itself has a tenth of error at 1e-3."""
    e = torch.logspace(-6, 1, 200, device=where)
    e = torch.cat([e, -e])
    zero = torch.zeros_like(e)
    loss, gradient, stats = run((zero, zero, None, e), kl_beta=1.0, reduction="none")
    wide = e.double().cpu()
    exact = torch.where(wide.abs() < 0.1, sum(wide**n / math.factorial(n) for n in range(2, 16)), wide.exp() - wide - 1)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), -wide.expm1(), rtol=2e-6, atol=0)
    assert (loss >= 0).all() and stats[5] > 0


def test_weights_of_zero_and_below(where):
    logp, advantages, old, ref, mask, weight, _ = in_form("padded", where)
    zeros = torch.zeros_like(weight)
    loss, gradient, stats = run((logp, advantages, old, ref, mask, zeros), kl_beta=0.1)
    assert loss == 0 and not gradient.any() and stats[0] == mask.sum()
    check((logp, advantages, old, ref, mask, -weight, None), kl_beta=0.1)
    # a token without weight may hold anything
    first = torch.zeros_like(mask)
    first[:, 0] = True
    some, far = weight.masked_fill(first, 0), logp.masked_fill(first, 1e3)
    for a, b in zip(run((far, advantages, old, ref, mask, some)), run((logp, advantages, old, ref, mask, some))):
        if a.numel() != 8:
            assert_bit_equal(a, b)


def nothing_kept(where):
    logp, advantages, old, ref, mask, weight = case((2, 5), where)
    yield (logp, advantages, old, ref, torch.zeros_like(mask), weight), {}
    yield (logp, advantages, old, ref, mask, weight, None, 0), {}
    yield (logp, advantages, old, ref, mask, weight, None, torch.tensor(0.0, device=where)), {}
    yield case((0, 5), where), {}
    yield case((3, 0), where), {}
    yield (*case((0,), where), torch.zeros(1, dtype=torch.int32, device=where)), {}
    yield (*case((4,), where), torch.zeros(1, dtype=torch.int32, device=where)), {}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_divisor_of_zero(level, reduction, where):
    for args, options in nothing_kept(where):
        loss, gradient, stats = run(args, level=level, reduction=reduction, kl_beta=0.1, **options)
        assert loss == 0 and gradient.shape == args[0].shape and not gradient.any()
        if len(args) < 8:
            assert not stats.any()


def test_sequences_without_a_token_count(where):
    """TRL's mean is over all rows."""
    logp, advantages, old, ref, mask, weight, _ = in_form("padded", where)
    mask = mask.clone()
    mask[1:3] = False
    check((logp, advantages, old, ref, mask, weight, None), reduction="sequence", kl_beta=0.1)
    whole, *_ = run((logp, advantages, old, ref, mask), reduction="sequence")
    part, *_ = run(tuple(x[[0, 3, 4]] for x in (logp, advantages, old, ref, mask)), reduction="sequence")
    torch.testing.assert_close(whole * 5, part * 3)


@pytest.mark.parametrize("factor", [2.0**16, 2.0**-24])
def test_an_upstream_factor_scales_exactly(factor, where):
    args = in_form("packed", where)
    logp = args[0].detach().clone().requires_grad_()
    for reduction in ("token", "sequence", "none"):
        loss, _ = tilefuse.policy_loss(logp, *args[1:], kl_beta=0.1, reduction=reduction)
        upstream = torch.ones_like(loss)
        (plain,) = torch.autograd.grad(loss, logp, upstream, retain_graph=True)
        (scaled,) = torch.autograd.grad(loss, logp, upstream * factor)
        assert_bit_equal(scaled, plain * factor)


def test_random_upstream_of_each_token(where):
    args = in_form("packed", where)
    logp, cu = args[0], args[6]
    upstream = torch.randn(20, generator=torch.Generator().manual_seed(1)).to(where)
    for level in ("token", "sequence"):
        leaf = logp.detach().clone().requires_grad_()
        loss, _ = tilefuse.policy_loss(leaf, *args[1:], level=level, kl_beta=0.2, reduction="none")
        (found,) = torch.autograd.grad(loss, leaf, upstream)
        # an upstream gradient is a weight of the sum
        weight = args[5] * upstream
        _, exact, _ = by_hand(torch.float64, *args[:5], weight, cu, level=level, kl_beta=0.2, reduction="sum")
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-6)


def test_repeatable_and_batch_invariant(where):
    args = in_form("padded", where)
    for level in ("token", "sequence"):
        options = {"level": level, "kl_beta": 0.1, "reduction": "none"}
        first = run(args, **options)
        for a, b in zip(run(args, **options), first):
            assert_bit_equal(a, b)
        part = run(tuple(None if x is None else x[[3, 1]] for x in args), **options)
        for a, b in zip(part[:2], first[:2]):
            assert_bit_equal(a, b[[3, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, where):
    args = (*case((4, 11), where, dtype), None)
    loss, gradient, stats = run(args, kl_beta=0.1)
    assert (loss.dtype, gradient.dtype, stats.dtype) == (torch.float32, dtype, torch.float32)
    wide = tuple(x.float() if x is not None and x.is_floating_point() else x for x in args)
    for a, b in zip((loss, gradient, stats), run(wide, kl_beta=0.1)):
        assert_bit_equal(a, b.to(a.dtype))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["clip", "cispo", "reinforce"])
def test_gradcheck(kind, level):
    logp, advantages, old, ref, mask, weight = (x.double() if x.is_floating_point() else x for x in case((3, 5)))
    with tilefuse.backend("reference"):
        for reduction in ("token", "sequence", "none"):
            options = {"level": level, "kl_beta": 0.4, "kl_weighted": True, "reduction": reduction}
            if kind == "cispo":
                # the ratio is a constant of its gradient: hold it in the differences too
                options |= {"clip_high": 0.0, "kl_weighted": False}
                old_k = logp - 1.0
            else:
                old_k = old

            def loss(x, old_k=old_k, options=options):
                return tilefuse.policy_loss(x, advantages, old_k, ref, mask, weight, kind=kind, **options)[0]

            leaf = logp.nan_to_num().requires_grad_()
            assert torch.autograd.gradcheck(loss, leaf)


def test_backward_twice_checkpoint_and_compile():
    args = in_form("packed", "cpu")
    logp = args[0].detach().clone().requires_grad_()

    def loss(logp):
        return tilefuse.policy_loss(logp, *args[1:], level="sequence", kl_beta=0.1, reduction="sequence")[0]

    value = loss(logp)
    (first,) = torch.autograd.grad(value, logp, retain_graph=True)
    assert_bit_equal(torch.autograd.grad(value, logp)[0], first)
    again = torch.utils.checkpoint.checkpoint(loss, logp, use_reentrant=False)
    assert_bit_equal(torch.autograd.grad(again, logp)[0], first)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logp)
    assert_bit_equal(compiled.detach(), value.detach())
    assert_bit_equal(torch.autograd.grad(compiled, logp)[0], first)


def test_without_a_gradient_nothing_is_saved():
    args = in_form("padded", "cpu")
    with torch.no_grad():
        loss, _ = tilefuse.policy_loss(args[0].clone().requires_grad_(), *args[1:])
    assert not loss.requires_grad
    assert not tilefuse.policy_loss(*args)[0].requires_grad


L, M, CU = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"logp must be \[B, S\] or packed \[T\]", (L[None], L[None]), {}),
        (TypeError, "logp must be float32 or", (M, L), {}),
        (ValueError, r"advantages must be of logp's shape, or \[B\]", (L, L[0]), {}),
        (ValueError, r"advantages must be of logp's shape, or \[B\]", (L[0], L[0, :1]), {}),
        (ValueError, r"advantages must be of logp's shape, or \[B\]", (L, L[:, :2]), {}),
        (TypeError, "advantages must be float32 or", (L, M), {}),
        (ValueError, r"old_logp must be of logp's shape \[2, 3\], got \[3\] float32", (L, L, L[0]), {}),
        (ValueError, "ref_logp must be given where kl_beta is not 0, got None", (L, L), {"kl_beta": 0.1}),
        (ValueError, "mask must be of logp's shape", (L, L, None, None, M[0]), {}),
        (TypeError, "mask must be bool or integer, got .* float32", (L, L, None, None, L), {}),
        (ValueError, "token_weight must be of logp's shape", (L, L, None, None, None, L[0]), {}),
        (ValueError, "cu_seqlens must be None unless logp is packed", (L, L, None, None, None, None, CU), {}),
        (TypeError, "cu_seqlens must be int32 or", (L[0], L[0], None, None, None, None, CU.float()), {}),
        (ValueError, "cu_seqlens must be given for packed", (L[0], L[0]), {"level": "sequence"}),
        (ValueError, "cu_seqlens must be given for packed", (L[0], L[0]), {"reduction": "sequence"}),
        (ValueError, "kind must be one of clip, cispo, reinforce, got 'ppo'", (L, L), {"kind": "ppo"}),
        (ValueError, "level must be one of", (L, L), {"level": "batch"}),
        (ValueError, "kl must be one of k1, k2, k3, k3\\+, got 'k4'", (L, L), {"kl": "k4"}),
        (ValueError, "reduction must be one of", (L, L), {"reduction": "mean"}),
        (ValueError, "clip_low must be at least 0, got -0.1", (L, L), {"clip_low": -0.1}),
        (ValueError, "clip_high must be at least 0", (L, L), {"clip_high": math.nan}),
        (ValueError, "log_ratio_limit must be at least 0", (L, L), {"log_ratio_limit": -1.0}),
        (ValueError, r"dual_clip must be 0 \(none\) or above 1, got 1.0", (L, L), {"dual_clip": 1.0}),
        (RuntimeError, "old_logp requires grad", (L, L, torch.zeros(2, 3, requires_grad=True)), {}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.policy_loss, torch.ops.tilefuse.policy_loss):
        with pytest.raises(error, match=match):
            call(*args, **options)


@pytest.mark.parametrize("number", [3, torch.tensor(3)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_num_items_divides_no_sum(reduction, number):
    with pytest.raises(ValueError, match="num_items must be None with reduction 'sum' or 'none'"):
        tilefuse.policy_loss(L, L, num_items=number, reduction=reduction)
    with pytest.raises(ValueError, match="num_items must be a number or a 0-d tensor"):
        tilefuse.policy_loss(L, L, num_items=torch.ones(1))
