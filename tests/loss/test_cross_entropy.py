"""``cross_entropy`` on every backend, against the formula in float64 and PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.loss.cross_entropy import naive
from tilefuse.testing.inputs.loss.linear_cross_entropy import weights
from tilefuse.testing.inputs.loss.linear_logprobs import IGNORED
from tilefuse.testing.inputs.loss.logprobs import case

KERNEL = "logprobs_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"scale": 0.7, "softcap": 4.0, "label_smoothing": 0.2, "z_loss": 1e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def differentiated(function, logits, dtype=None, upstream=None):
    """(loss, gradient of logits)."""
    leaf = logits.detach().to(dtype or logits.dtype, copy=True).requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss))[0]


def check(logits, target, *extra, **options):
    """Loss and gradient against float64."""
    upstream = torch.randn(target.shape, device=target.device) if options.get("reduction") == "none" else None
    with poisoned():
        loss, gradient = differentiated(
            lambda z: tilefuse.cross_entropy(z, target, *extra, **options), logits, upstream=upstream
        )

    def plain(z):
        return naive(z, target, *extra, **options)

    exact, exact_gradient = differentiated(plain, logits, torch.float64, upstream)
    _, same_gradient = differentiated(plain, logits, upstream=upstream)
    assert loss.dtype == torch.float32 and gradient.dtype == logits.dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert_close(gradient, exact_gradient, same_gradient, rows=False)


@each_dtype
@pytest.mark.parametrize(("tokens", "vocabulary"), [(4, 1), (21, 133)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_matches_oracle(weighted, tokens, vocabulary, dtype, where):
    extra = weights(tokens, vocabulary, where) if weighted else ()
    check(*case(tokens, vocabulary, where, dtype), *extra, **(EVERYTHING if weighted else {}))


def test_two_blocks_match_oracle(where):
    """Class weights of the second block."""
    check(*case(3, 4096 + 9, where, ignored=0.0), *weights(3, 4096 + 9, where), **EVERYTHING)


@each_reduction
def test_reductions(reduction, where):
    """With weights, some of them 0 or negative."""
    token, of_class = weights(17, 70, where)
    token[1::5] *= -1
    check(*case(17, 70, where), token, of_class, reduction=reduction, z_loss=0.1, label_smoothing=0.1)


@each_reduction
def test_gradcheck(reduction):
    logits, target = case(4, 7)
    extra = weights(4, 7)
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda z: tilefuse.cross_entropy(z, target, *extra, reduction=reduction, **EVERYTHING),
            logits.double().requires_grad_(),
        )


@each_reduction
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_is_pytorchs(reduction, label_smoothing, where):
    logits, target = case(33, 70, where)
    _, of_class = weights(33, 70, where)
    upstream = torch.randn(33, device=where) if reduction == "none" else None
    for c in (None, of_class):
        options = {"label_smoothing": label_smoothing, "reduction": reduction}
        found = differentiated(
            lambda z, c=c, o=options: tilefuse.cross_entropy(z, target, class_weight=c, **o), logits, upstream=upstream
        )
        expected = differentiated(
            lambda z, c=c, o=options: F.cross_entropy(z, target, c, **o), logits, upstream=upstream
        )
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_class_of_weight_0(where):
    """A target that weighs nothing adds nothing, to the divisor neither."""
    logits, target = case(9, 20, where, ignored=0.0)
    of_class = torch.ones(20, device=where)
    of_class[target[4]] = 0.0
    check(logits, target, None, of_class)
    _, gradient = differentiated(lambda z: tilefuse.cross_entropy(z, target, class_weight=of_class), logits)
    assert not gradient[4].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("why", ["no_tokens", "ignored", "num_items", "token_weight", "class_weight"])
def test_nothing_to_divide_by(why, reduction, where):
    """0 with a gradient that is there and 0, never NaN."""
    if why == "num_items" and reduction == "sum":
        return
    logits, target = case(0 if why == "no_tokens" else 5, 20, where, ignored=1.1 if why == "ignored" else 0)
    options = {
        "num_items": {"num_items": 0},
        "token_weight": {"token_weight": torch.zeros(5, device=where)},
        "class_weight": {"class_weight": torch.zeros(20, device=where)},
    }.get(why, {})
    loss, gradient = differentiated(lambda z: tilefuse.cross_entropy(z, target, **options, reduction=reduction), logits)
    assert loss == 0 and gradient.shape == logits.shape and not gradient.any()


def test_num_items(where):
    """A number, or a tensor of any dtype; what the sum is divided by."""
    logits, target = case(9, 20, where)
    total, whole = differentiated(lambda z: tilefuse.cross_entropy(z, target, reduction="sum"), logits)
    for n in (7, 7.0, torch.tensor(7, device=where), torch.tensor(7.0, dtype=torch.float64, device=where)):
        loss, gradient = differentiated(lambda z, n=n: tilefuse.cross_entropy(z, target, num_items=n), logits)
        torch.testing.assert_close(loss, total / 7)
        torch.testing.assert_close(gradient, whole / 7)


def test_ignored_tokens_are_never_read(where):
    logits, target = case(9, 70, where, torch.bfloat16)
    target[::4] = IGNORED
    token, _ = weights(9, 70, where)
    ignored = target == IGNORED

    def run(logits, token):
        return differentiated(lambda z: tilefuse.cross_entropy(z, target, token, **EVERYTHING), logits)

    clean = run(logits, token)
    dirty = run(logits.masked_fill(ignored[:, None], math.nan), token.masked_fill(ignored, math.inf))
    for a, b in zip(dirty, clean):
        assert_bit_equal(a, b)
    assert not clean[1][ignored].any()


def test_a_slice_of_a_model(where):
    """[B, S, V] against labels moved by one, with the shape of ``none``."""
    logits, labels = case(12, 70, where, torch.bfloat16)
    logits, labels = logits.view(3, 4, 70), labels.view(3, 4)
    check(logits[:, :-1], labels[:, 1:], reduction="none", **EVERYTHING)
    loss, gradient = differentiated(lambda z: tilefuse.cross_entropy(z[:, :-1], labels[:, 1:]), logits)
    assert gradient.shape == logits.shape and not gradient[:, -1].any()
    flat = tilefuse.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_bit_equal(loss, flat)


def test_backward_twice_and_checkpoint(where):
    logits, target = case(9, 70, where)
    logits.requires_grad_()

    def run(logits):
        return tilefuse.cross_entropy(logits, target)

    loss = run(logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, logits)
    (recomputed,) = torch.autograd.grad(checkpoint(run, logits, use_reentrant=False), logits)
    assert_bit_equal(twice, 2 * first)
    assert_bit_equal(again, first)
    assert_bit_equal(recomputed, first)


@each_dtype
def test_losses_are_batch_invariant(dtype, where):
    # plain PyTorch, whose vectors depend on the number of rows
    if tilefuse.backend() == "reference":
        return
    logits, target = case(13, 130, where, dtype)

    def run(rows):
        return differentiated(
            lambda z: tilefuse.cross_entropy(z, target[rows], reduction="none", **EVERYTHING),
            logits[rows],
            upstream=torch.ones(len(target[rows]), device=where),
        )

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(3, 10), torch.randperm(13, device=where)):
        for a, b in zip(run(rows), whole):
            assert_bit_equal(a, b[rows])


def test_extreme_logits(where):
    logits = torch.zeros(4, 70)
    logits[0] = -3e4
    logits[0, 3] = 3e4
    logits[1] = 1e4 + torch.randn(70)
    logits[2, 2:] = -1e4
    logits[3] = 3e4
    check(logits.to(where), torch.tensor([3, 4, 1, 2], device=where), reduction="none", z_loss=1e-4)


def test_targets_out_of_range(where):
    logits, target = case(6, 20, where, ignored=0.0)
    target[2] = 20
    of_class = torch.ones(20, device=where)
    if tilefuse.backend() == "triton":
        losses = tilefuse.cross_entropy(logits, target, class_weight=of_class, reduction="none")
        assert losses[2].isnan() and losses.isnan().sum() == 1
        return
    with pytest.raises(ValueError, match=r"^tilefuse\.cross_entropy: target must be in \[0, 20\)"):
        tilefuse.cross_entropy(logits, target)


def test_compiles_without_a_break():
    logits, target = case(9, 70)
    extra = weights(9, 70)
    compiled = torch.compile(
        lambda z: tilefuse.cross_entropy(z, target, *extra, **EVERYTHING), fullgraph=True, backend="aot_eager"
    )
    eager = differentiated(lambda z: tilefuse.cross_entropy(z, target, *extra, **EVERYTHING), logits)
    for a, b in zip(differentiated(compiled, logits), eager):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


Z, T = torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, r"token_weight must be of target's shape \[2, 3\], got \[2\]", {"token_weight": Z[:, 0, 0]}),
        (TypeError, "token_weight must be float32 or", {"token_weight": T}),
        (ValueError, "token_weight must be on the device of", {"token_weight": Z[..., 0].to("meta")}),
        (ValueError, r"class_weight must be \[9\], got \[3\]", {"class_weight": Z[0, :, 0]}),
        (TypeError, "class_weight must be float32 or", {"class_weight": torch.ones(9, dtype=torch.int32)}),
        (ValueError, "class_weight must be on the device of logits", {"class_weight": Z[0, 0].to("meta")}),
        (ValueError, "num_items must be a number or a tensor without dims", {"num_items": Z[0, 0]}),
        (TypeError, "num_items must be integer or float", {"num_items": torch.tensor(True)}),
        (
            ValueError,
            "num_items must be None with reduction='none', which does not divide",
            {"num_items": torch.tensor(2), "reduction": "none"},
        ),
        (ValueError, "reduction must be one of mean, sum, none, got 'max'", {"reduction": "max"}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, "softcap must be at least 0", {"softcap": -1.0}),
        (RuntimeError, "but token_weight requires grad", {"token_weight": Z[..., 0].clone().requires_grad_()}),
        (RuntimeError, "but class_weight requires grad", {"class_weight": Z[0, 0].clone().requires_grad_()}),
        (RuntimeError, "but num_items requires grad", {"num_items": torch.tensor(2.0, requires_grad=True)}),
    ],
)
def test_errors(error, match, options):
    for call in (tilefuse.cross_entropy, torch.ops.tilefuse.cross_entropy):
        with pytest.raises(error, match=rf"^tilefuse\.cross_entropy: .*{match}"):
            call(Z, T, **options)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (ValueError, r"logits must be \[\.\.\., V\] with V >= 1, got \[2, 3, 0\]", (Z[..., :0], T)),
        (TypeError, "logits must be float32 or", (Z.long(), T)),
        (ValueError, r"target must be \[2, 3\] int32 or int64", (Z, T[0])),
        (TypeError, "target must be int32 or int64", (Z, T.bool())),
    ],
)
def test_errors_of_the_first_two(error, match, args):
    with pytest.raises(error, match=rf"^tilefuse\.cross_entropy: {match}"):
        tilefuse.cross_entropy(*args)
