"""``linear_cross_entropy`` on every backend, against the formula in float64 and PyTorch's own cross-entropy."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.loss.linear_cross_entropy import naive, weights
from tilefuse.testing.inputs.loss.linear_logprobs import IGNORED, case
from tilefuse.testing.memory import allocations, can_measure_peaks, peak_bytes

KERNEL = "linear_cross_entropy_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"scale": 0.7, "softcap": 4.0, "label_smoothing": 0.2, "z_loss": 1e-2}
each_form = pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "in_forward"])


def gradients(function, tensors, dtype=None, upstream=None):
    leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
    loss = function(*leaves)
    upstream = None if upstream is None else upstream.to(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def check(where, dtype, tokens, vocabulary, hidden, weighted, **options):
    """Loss and gradients against float64."""
    x, weight, target, bias = case(tokens, vocabulary, hidden, where, dtype)
    extra = weights(tokens, vocabulary, where) if weighted else (None, None)
    upstream = torch.randn(tokens, device=where) if options.get("reduction") == "none" else None
    leaves = (x, weight, bias)

    def ours(x, w, b):
        return tilefuse.linear_cross_entropy(x, w, target, b, *extra, **options)

    def plain(x, w, b):
        return naive(x, w, target, b, *extra, **options)

    with poisoned():
        found = gradients(ours, leaves, upstream=upstream)
    exact, same = gradients(plain, leaves, torch.float64, upstream), gradients(plain, leaves, upstream=upstream)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for a, b, c in zip(found[1:], exact[1:], same[1:]):
        assert_close(a, b, c, rows=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@each_form
def test_matches_oracle(recompute, weighted, dtype, where):
    options = EVERYTHING if weighted else {}
    check(where, dtype, 51, 133, 24, weighted, recompute=recompute, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_form
def test_reductions(reduction, recompute, where):
    check(where, torch.float32, 17, 70, 8, True, recompute=recompute, reduction=reduction, z_loss=0.1)


@each_form
def test_gradcheck(recompute):
    x, weight, target, bias = case(4, 7, 3)
    extra = weights(4, 7)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, b: tilefuse.linear_cross_entropy(x, w, target, b, *extra, recompute=recompute, **EVERYTHING),
            leaves,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_is_pytorchs(reduction, label_smoothing, where):
    x, weight, target, bias = case(33, 70, 8, where)
    _, of_class = weights(33, 70, where)
    for c in (None, of_class):
        options = {"label_smoothing": label_smoothing, "reduction": reduction}
        expected = F.cross_entropy(x @ weight.t() + bias, target, c, **options)
        found = tilefuse.linear_cross_entropy(x, weight, target, bias, class_weight=c, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_form
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("why", ["no_tokens", "ignored", "num_items", "token_weight", "class_weight"])
def test_nothing_to_divide_by(why, reduction, recompute, where):
    """0 with gradients that are there and 0, never NaN."""
    if why == "num_items" and reduction == "sum":
        return
    x, weight, target, bias = case(0 if why == "no_tokens" else 5, 20, 8, where, ignored=1.1 if why == "ignored" else 0)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    options = {
        "num_items": {"num_items": 0},
        "token_weight": {"token_weight": torch.zeros(5, device=where)},
        "class_weight": {"class_weight": torch.zeros(20, device=where)},
    }.get(why, {})
    loss = tilefuse.linear_cross_entropy(
        *leaves[:2], target, leaves[2], **options, reduction=reduction, recompute=recompute
    )
    assert loss == 0
    for gradient, leaf in zip(torch.autograd.grad(loss, leaves), leaves):
        assert gradient.shape == leaf.shape and not gradient.any()


@each_form
def test_num_items(recompute, where):
    """A number, or a tensor of any dtype; what the sum is divided by."""
    x, weight, target, bias = case(9, 20, 8, where)
    total = tilefuse.linear_cross_entropy(x, weight, target, bias, reduction="sum")
    x.requires_grad_()
    for n in (7, 7.0, torch.tensor(7, device=where), torch.tensor(7.0, dtype=torch.float64, device=where)):
        loss = tilefuse.linear_cross_entropy(x, weight, target, bias, num_items=n, recompute=recompute)
        torch.testing.assert_close(loss.detach(), total / 7)


@each_form
def test_ignored_tokens_are_never_read(recompute, where):
    x, weight, target, bias = case(9, 70, 8, where, torch.bfloat16)
    token, _ = weights(9, 70, where)
    ignored = target == IGNORED

    def run(x, token):
        return gradients(
            lambda *t: tilefuse.linear_cross_entropy(*t[:2], target, t[2], token, recompute=recompute, **EVERYTHING),
            (x, weight, bias),
        )

    clean = run(x, token)
    for a, b in zip(run(x.masked_fill(ignored[:, None], math.nan), token.masked_fill(ignored, math.inf)), clean):
        assert_bit_equal(a, b)
    assert not clean[1][ignored].any()


@each_form
def test_backward_twice_and_checkpoint(recompute, where):
    """Saved gradients are multiplied out of place."""
    x, weight, target, bias = case(9, 70, 8, where)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def run(x, weight, bias):
        return tilefuse.linear_cross_entropy(x, weight, target, bias, recompute=recompute)

    loss = run(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0), retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    recomputed = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves)
    for a, b, c, d in zip(first, twice, again, recomputed):
        assert_bit_equal(b, 2 * a)
        assert_bit_equal(c, a)
        assert_bit_equal(d, a)


@each_form
@pytest.mark.parametrize("needed", [(0,), (1,), (2,)], ids=str)
def test_only_what_is_needed(needed, recompute, where):
    x, weight, target, bias = case(9, 70, 8, where, torch.bfloat16)
    full = gradients(
        lambda *t: tilefuse.linear_cross_entropy(*t[:2], target, t[2], recompute=recompute), (x, weight, bias)
    )
    part = [t.clone().requires_grad_(i in needed) for i, t in enumerate((x, weight, bias))]
    loss = tilefuse.linear_cross_entropy(*part[:2], target, part[2], recompute=recompute)
    for i, gradient in zip(needed, torch.autograd.grad(loss, [part[i] for i in needed])):
        assert_bit_equal(gradient, full[i + 1])
    with torch.no_grad():
        assert_bit_equal(tilefuse.linear_cross_entropy(*part[:2], target, part[2], recompute=recompute), full[0])


@each_form
def test_float16_keeps_small_gradients(recompute, where):
    """Most gradients of a logit over 8,192 tokens are below what float16 holds; the sums of a scaled loss are not."""
    x, weight, target, bias = case(24, 200, 16, where, torch.float16)
    scaled = gradients(
        lambda *t: 2.0**10 * tilefuse.linear_cross_entropy(*t[:2], target, t[2], num_items=8192, recompute=recompute),
        (x, weight, bias),
    )
    exact = gradients(
        lambda *t: 2.0**10 * naive(*t[:2], target, t[2], num_items=8192), (x, weight, bias), torch.float64
    )
    for a, b in zip(scaled[1:3], exact[1:3]):
        assert (a.double() - b).abs().max() < 2e-3 * b.abs().max()


def test_large_logits_are_made_again(monkeypatch):
    """``recompute=False`` keeps at most 64 MiB."""
    module = importlib.import_module("tilefuse.ops.loss.linear_cross_entropy")
    x, weight, target, bias = case(9, 70, 8)

    def run():
        return gradients(
            lambda *t: tilefuse.linear_cross_entropy(*t[:2], target, t[2], recompute=False), (x, weight, bias)
        )

    kept = run()
    with torch.profiler.profile() as profile:
        run()
    assert any("linear_cross_entropy_fwd" in event.key for event in profile.key_averages())
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 9 * 70 - 1)
    with torch.profiler.profile() as profile:
        again = run()
    assert not any("linear_cross_entropy_fwd" in event.key for event in profile.key_averages())
    for a, b in zip(kept, again):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_form
def test_targets_out_of_range(recompute, where):
    x, weight, target, bias = case(6, 20, 8, where, ignored=0.0)
    target[2] = 20
    x.requires_grad_()
    if tilefuse.backend() == "triton":
        losses = tilefuse.linear_cross_entropy(x, weight, target, bias, reduction="none", recompute=recompute)
        assert losses[2].isnan() and losses.isnan().sum() == 1
        return
    with pytest.raises(ValueError, match=r"^tilefuse\.linear_cross_entropy: target must be in \[0, 20\)"):
        tilefuse.linear_cross_entropy(x, weight, target, bias, recompute=recompute)


def test_compiles_without_a_break():
    x, weight, target, bias = case(9, 70, 8)
    for recompute in (True, False):
        function = torch.compile(
            lambda *t, r=recompute: tilefuse.linear_cross_entropy(*t[:2], target, t[2], recompute=r, **EVERYTHING),
            fullgraph=True,
            backend="aot_eager",
        )
        eager = gradients(
            lambda *t, r=recompute: tilefuse.linear_cross_entropy(*t[:2], target, t[2], recompute=r, **EVERYTHING),
            (x, weight, bias),
        )
        for a, b in zip(gradients(function, (x, weight, bias)), eager):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_allocates_nothing_of_all_logits(where, monkeypatch):
    """Of PyTorch's allocations none has T x V elements, nor is one float32 V x H."""
    if tilefuse.backend() == "reference":
        return
    module = importlib.import_module("tilefuse.triton_kernels.loss.linear_logprobs")
    monkeypatch.setattr(module, "BLOCK_IDS", 128)
    tokens, vocabulary, hidden = 40, 600, 24
    x, weight, target, bias = case(tokens, vocabulary, hidden, where, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with allocations() as made:
        torch.autograd.grad(tilefuse.linear_cross_entropy(*leaves[:2], target, leaves[2]), leaves)
    assert max(m.numel for m in made) <= vocabulary * hidden
    assert all(m.numel < vocabulary * hidden or m.dtype == torch.bfloat16 for m in made)


PREPARE = """
from tilefuse.testing.inputs.loss.linear_logprobs import case
def run(tokens, vocabulary):
    x, weight, target, _ = case(tokens, vocabulary, {hidden}, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight)]
    return lambda: torch.autograd.grad(tilefuse.linear_cross_entropy(*leaves, target, recompute={recompute}), leaves)
run(8, 300)()
call = run({tokens}, {vocabulary})
"""


@pytest.mark.cpu_library
@pytest.mark.skipif(not can_measure_peaks(), reason="needs Linux")
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "hidden"),
    [(2048, 65536, 16), pytest.param(4096, 129280, 256, marks=pytest.mark.slow)],
    ids=["small", "deepseek"],
)
@each_form
def test_peak_memory(recompute, tokens, vocabulary, hidden):
    """90 MiB beside the gradients. All logits would be 256 and 1,010 MiB, a float32 V x H of the larger one 126."""
    sizes = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden, "recompute": recompute}
    gradients = 2 * (tokens + vocabulary) * hidden
    assert peak_bytes(PREPARE.format(**sizes), "call()") < gradients + (90 << 20)


X, W, T = torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (
            ValueError,
            r"token_weight must be of target's shape \[2, 3\], got \[2\] float32",
            {"token_weight": X[:, 0, 0]},
        ),
        (TypeError, "token_weight must be float32 or", {"token_weight": T}),
        (ValueError, r"class_weight must be \[9\], got \[4\]", {"class_weight": W[0]}),
        (ValueError, "num_items must be a number or a tensor without dims", {"num_items": W[0]}),
        (TypeError, "num_items must be integer or float", {"num_items": torch.tensor(True)}),
        (
            ValueError,
            "num_items must be None with reduction='sum', which does not divide",
            {"num_items": torch.tensor(2), "reduction": "sum"},
        ),
        (ValueError, "reduction must be one of mean, sum, none, got 'max'", {"reduction": "max"}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, "softcap must be at least 0", {"softcap": -1.0}),
        (RuntimeError, "but token_weight requires grad", {"token_weight": X[..., 0].clone().requires_grad_()}),
    ],
)
def test_errors(error, match, options):
    for call in (tilefuse.linear_cross_entropy, torch.ops.tilefuse.linear_cross_entropy):
        with pytest.raises(error, match=rf"^tilefuse\.linear_cross_entropy: .*{match}"):
            call(X, W, T, **options)
