"""``linear_logprobs`` and its parts on every backend, against full logits in float64."""

import importlib
import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse import library
from tilefuse.testing import assert_bit_equal, assert_close, canary, poisoned
from tilefuse.testing.inputs.loss.linear_logprobs import IGNORED, case, logits, naive, statistics
from tilefuse.testing.memory import can_measure_peaks, peak_bytes

KERNEL = "linear_logprobs_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"scale": 0.7, "softcap": 4.0, "temperature": 1.3}]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "transformed"])


def differentiated(function, tensors, upstream, dtype=None):
    """(outputs, gradients) of a function of x, weight and bias, from logp, lse and entropy together."""
    leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
    out = function(*leaves)
    return out, torch.autograd.grad(out[:3], leaves, [u.to(out[0]) for u in upstream])


@each_dtype
@each_option
@pytest.mark.parametrize(("tokens", "vocabulary", "hidden"), [(1, 1, 1), (50, 130, 64), (131, 70, 33)], ids=str)
def test_matches_oracle(tokens, vocabulary, hidden, options, dtype, where):
    x, weight, target, bias = case(tokens, vocabulary, hidden, where, dtype)
    upstream = [torch.randn(tokens, device=where) for _ in range(3)]
    with poisoned():
        out, found = differentiated(
            lambda x, w, b: tilefuse.linear_logprobs(x, w, target, b, **options), (x, weight, bias), upstream
        )

    def plain(x, w, b):
        return naive(x, w, target, b, **options)

    exact, exact_gradients = differentiated(plain, (x, weight, bias), upstream, torch.float64)
    same, same_gradients = differentiated(plain, (x, weight, bias), upstream)
    assert out[3].dtype == torch.int32 and all(o.dtype == torch.float32 for o in out[:3])
    assert_bit_equal(out[3], exact[3])
    for ours, right, other in zip(out[:3], exact, same):
        assert_close(ours, right, other, rows=False)
    for ours, leaf, right, other in zip(found, (x, weight, bias), exact_gradients, same_gradients):
        assert ours.dtype == leaf.dtype
        assert_close(ours, right, other, rows=False)


def test_gradcheck():
    x, weight, target, bias = case(4, 7, 3)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, b: tilefuse.linear_logprobs(x, w, target, b, scale=0.5, softcap=2.0, temperature=0.7)[:3],
            leaves,
        )


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_is_kept(tokens, where):
    """No token, or ignored ones alone: zeros, and gradients that are exactly 0."""
    x, weight, target, bias = case(tokens, 20, 8, where, ignored=1.1)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with poisoned():
        logp, lse, entropy, argmax = tilefuse.linear_logprobs(x, weight, target, bias)
        gradients = torch.autograd.grad((logp + lse + entropy).sum(), leaves)
    assert not any(t.any() for t in (logp, lse, entropy, *gradients))
    assert (argmax == -1).all() and [g.shape for g in gradients] == [t.shape for t in leaves]


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_ignored_tokens_are_never_read(garbage, where):
    x, weight, target, bias = case(9, 70, 8, where, torch.bfloat16)
    ignored = target == IGNORED
    upstream = [torch.randn(9, device=where) for _ in range(3)]
    dirty = x.masked_fill(ignored[:, None], garbage)
    unread = [u.masked_fill(ignored, garbage) for u in upstream]

    def run(x, upstream):
        return differentiated(
            lambda *t: tilefuse.linear_logprobs(t[0], t[1], target, t[2]), (x, weight, bias), upstream
        )

    (out, gradients), (clean, clean_gradients) = run(dirty, unread), run(x, upstream)
    for a, b in zip((*out, *gradients), (*clean, *clean_gradients)):
        assert_bit_equal(a, b)
    assert not gradients[0][ignored].any()


@pytest.mark.parametrize("wrong", [-1, 20, 2**40])
def test_targets_out_of_range(wrong, where):
    """An error where the host sees them; on a GPU NaN for the token, with nothing read or written elsewhere."""
    x, weight, target, bias = case(6, 20, 8, where, ignored=0.0)
    bad = target.clone()
    bad[2] = wrong
    if tilefuse.backend() != "triton":
        with pytest.raises(ValueError, match=rf"linear_logprobs: target must be in \[0, 20\) or .* got {wrong}"):
            tilefuse.linear_logprobs(x, weight, bad, bias)
        return
    leaves = [t.requires_grad_() for t in (x, weight)]
    guarded = canary((6,), torch.int64, where)
    guarded.tensor.copy_(bad)
    logp, *_ = tilefuse.linear_logprobs(x, weight, guarded.tensor, bias)
    guarded.check()
    right, *_ = tilefuse.linear_logprobs(x, weight, target, bias)
    others = torch.arange(6, device=where) != 2
    assert logp[2].isnan()
    assert_bit_equal(logp[others], right[others])
    dx, dweight = torch.autograd.grad(logp.sum(), leaves)
    assert dx[2].isnan().all() and dweight.isnan().all()
    assert_bit_equal(dx[others], torch.autograd.grad(right.sum(), leaves)[0][others])


@pytest.mark.parametrize("ignore_index", [0, 36, IGNORED])
def test_any_id_may_be_ignored(ignore_index, where):
    x, weight, target, bias = case(12, 37, 6, where, ignored=0.0)
    target[::3] = ignore_index
    out = [tilefuse.linear_logprobs(x, weight, ids, bias, ignore_index=ignore_index) for ids in (target, target.int())]
    for a, b in zip(*out):
        assert_bit_equal(a, b)
    expected = statistics(logits(x.double(), weight.double(), bias.double()), target, ignore_index)
    torch.testing.assert_close(out[0][0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert_bit_equal(out[0][3], expected[3])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_only_what_is_needed(needed, where, monkeypatch):
    """A frozen x with a trainable head, a frozen head: the same gradients, and no work for the others."""
    x, weight, target, bias = case(9, 70, 8, where, torch.bfloat16)
    asked = []
    find = library.Kernel.implementation

    def watched(kernel, backend):
        run, reason = find(kernel, backend)

        def noted(*args):
            if kernel.name == "linear_logprobs_bwd":
                asked.append(args[-3:])
            return run(*args)

        return run and noted, reason

    monkeypatch.setattr(library.Kernel, "implementation", watched)
    tilefuse.backends.forget()
    full = [t.clone().requires_grad_() for t in (x, weight, bias)]
    part = [t.clone().requires_grad_(i in needed) for i, t in enumerate((x, weight, bias))]
    expected = torch.autograd.grad(tilefuse.linear_logprobs(*full[:2], target, full[2])[0].sum(), full)
    out = tilefuse.linear_logprobs(*part[:2], target, part[2])[0]
    assert out.requires_grad == bool(needed)
    if needed:
        for i, gradient in zip(needed, torch.autograd.grad(out.sum(), [part[i] for i in needed])):
            assert_bit_equal(gradient, expected[i])
        assert asked[1] == tuple(i in needed for i in range(3))
    with torch.no_grad():
        assert not tilefuse.linear_logprobs(*full[:2], target, full[2])[0].requires_grad


@pytest.mark.parametrize("power", [2.0**16, 2.0**-24])
def test_gradients_scale_exactly(power, where):
    """A loss scaled for float16 loses nothing: what is small enough for float16 to hold is held."""
    x, weight, target, bias = case(9, 70, 8, where, torch.float16)
    weight, bias = weight.float().half().float(), bias
    x = x.float()
    plain = [torch.randn(9, device=where) for _ in range(3)]

    def run(upstream):
        return differentiated(
            lambda *t: tilefuse.linear_logprobs(t[0].half(), t[1].half(), target, t[2]), (x, weight, bias), upstream
        )[1]

    reference, scaled = run(plain), run([u * power for u in plain])
    assert_bit_equal(scaled[2], reference[2] * power)
    for a, b in zip(scaled[:2], reference[:2]):
        # rounded to float16 on the way to its float32 leaf
        assert_bit_equal(a, (b.double() * power).half().float()) if power > 1 else None
        tiny = (b.double() * power).abs() < 2.0**-14
        assert ((a.double() - b.double() * power).abs()[tiny] <= 2.0**-24).all()


def test_backward_twice_and_checkpoint(where):
    x, weight, target, bias = case(9, 70, 8, where, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss(x, weight, bias):
        logp, lse, entropy, _ = tilefuse.linear_logprobs(x, weight, target, bias)
        return (logp + 0.1 * lse + 0.3 * entropy).sum()

    out = loss(*leaves)
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    again = torch.autograd.grad(out, leaves)
    recomputed = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for a, b, c in zip(first, again, recomputed):
        assert_bit_equal(a, b)
        assert_bit_equal(a, c)


def test_second_derivative_raises():
    x, weight, target, _ = case(4, 9, 3)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(tilefuse.linear_logprobs(x, weight, target)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_logprobs: the op is differentiable once"):
        (dx.square().sum() + x.sum()).backward()


def test_tied_weights(where):
    """The head's gradient adds to the embedding's."""
    _, table, target, _ = case(9, 70, 8, where)
    ids = torch.arange(9, device=where) * 7

    def gradient(table, run):
        table = table.detach().requires_grad_()
        x = torch.nn.functional.embedding(ids, table)
        return torch.autograd.grad(run(x, table)[0].sum(), table)[0]

    found = gradient(table, lambda x, w: tilefuse.linear_logprobs(x, w, target))
    exact = gradient(table.double(), lambda x, w: naive(x, w, target))
    assert_close(found, exact, gradient(table, lambda x, w: naive(x, w, target)))


def check_batch_invariant(where, dtype, vocabulary):
    x, weight, target, bias = case(67, vocabulary, 8, where, dtype)
    whole = tilefuse.linear_logprobs(x, weight, target, bias)
    # the interpreter's own products are those of one tile size
    least = 17 if where == "cpu" and tilefuse.backend() == "triton" else 1
    for rows in (slice(0, least), slice(3, 33), slice(0, 66), torch.randperm(67, device=where)):
        part = tilefuse.linear_logprobs(x[rows], weight, target[rows], bias)
        for a, b in zip(part, whole):
            assert_bit_equal(a, b[rows])


@each_dtype
def test_batch_invariant(dtype, where):
    """A token's statistics depend on no other."""
    # plain PyTorch, whose products depend on the number of rows
    if tilefuse.backend() != "reference":
        check_batch_invariant(where, dtype, 70)


@pytest.mark.slow_in_interpreter
@each_dtype
def test_batch_invariant_over_blocks(dtype, where):
    if tilefuse.backend() != "reference":
        check_batch_invariant(where, dtype, 2 * 4096 + 9)


def test_shards_are_merged(where):
    """Those cut at multiples of 4,096 have the bits of the whole."""
    x, weight, target, bias = case(20, 4096 + 9, 4, where, torch.bfloat16)
    whole = tilefuse.linear_logprobs(x, weight, target, bias)

    def shards(*cuts):
        edges = [0, *cuts, weight.shape[0]]
        return [
            tilefuse.linear_logprob_stats(x, weight[a:b], target, bias[a:b], vocab_start=a)
            for a, b in itertools.pairwise(edges)
        ]

    parts = shards(4096)
    assert [part.shape for part in parts] == [(20, 1, 5), (20, 1, 5)]
    for a, b in zip(tilefuse.merge_logprobs(parts), whole):
        assert_bit_equal(a, b)
    merged = tilefuse.merge_logprobs(shards(100, 4000))
    for a, b in zip(merged[:3], whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_bit_equal(merged[3], whole[3])
    assert tilefuse.merge_logprobs(parts[:1])[0][target >= 4096].isnan().all()


def made_of(z, where):
    """(x, weight, bias) whose logits are exactly these rows."""
    eye = torch.eye(z.shape[0], device=where)
    return eye, z.t().contiguous().to(where), torch.zeros(z.shape[1], device=where)


def check_extremes(vocabulary, where):
    z = torch.zeros(5, vocabulary)
    z[0] = -3e4
    z[0, 3] = 3e4
    z[1] = 1e4 + torch.randn(vocabulary)
    z[2] = -3e4
    z[3, 2:] = -1e4
    # one apart: 3e4 - log V has an error of 1e-3 in float32
    z[4] = 3e4
    target = torch.tensor([3, 4, 0, 1, 2], device=where)
    x, weight, _ = made_of(z, where)
    leaves = (x, weight)
    upstream = [torch.randn(5, device=where) for _ in range(3)]

    def plain(x, w):
        return naive(x, w, target)

    out, gradients = differentiated(lambda x, w: tilefuse.linear_logprobs(x, w, target), leaves, upstream)
    exact, exact_gradients = differentiated(plain, leaves, upstream, torch.float64)
    same, same_gradients = differentiated(plain, leaves, upstream)
    assert_bit_equal(out[3], exact[3])
    for a, b, c in zip((*out[:3], *gradients), (*exact[:3], *exact_gradients), (*same[:3], *same_gradients)):
        assert_close(a, b, c, rows=False)


@pytest.mark.parametrize("vocabulary", [5, 70])
def test_extreme_logits(vocabulary, where):
    check_extremes(vocabulary, where)


@pytest.mark.slow_in_interpreter
def test_extreme_logits_over_blocks(where):
    check_extremes(4097, where)


@pytest.mark.parametrize("vocabulary", [3, 4097])
def test_minus_infinity_adds_nothing(vocabulary, where):
    """Ids that a bias of -inf rules out, down to the target alone."""
    x, weight, target, bias = case(3, vocabulary, 6, where, torch.bfloat16, ignored=0.0)
    target[:] = vocabulary - 1
    bias[:] = -math.inf
    bias[vocabulary - 1] = 0.5
    leaves = [t.requires_grad_() for t in (x, weight)]
    logp, lse, entropy, argmax = tilefuse.linear_logprobs(x, weight, target, bias)
    assert not logp.any() and not entropy.any() and (argmax == vocabulary - 1).all() and lse.isfinite().all()
    for gradient in torch.autograd.grad((logp + entropy).sum(), leaves):
        assert not gradient.any()
    bias[:2] = 0.25
    exact = naive(*(t.detach().double() for t in (x, weight)), target, bias.double())
    for a, b in zip(tilefuse.linear_logprobs(x, weight, target, bias), exact):
        torch.testing.assert_close(a.detach().double(), b.double(), rtol=1e-5, atol=1e-5)


def test_infinity_and_nan_stay_in_their_rows(where):
    x, weight, target, bias = case(6, 70, 8, where, ignored=0.0)
    clean = tilefuse.linear_logprobs(x, weight, target, bias)
    others = torch.ones(6, dtype=torch.bool, device=where)
    others[[1, 4]] = False
    x[1, 0], x[4, 3] = math.inf, math.nan
    for a, b in zip(tilefuse.linear_logprobs(x, weight, target, bias), clean):
        assert_bit_equal(a[others], b[others])
    assert tilefuse.linear_logprobs(x, weight, target, bias)[1][4].isnan()


def test_a_saturated_cap_has_no_gradient(where):
    z = torch.zeros(1, 9)
    z[0, :4] = 1e4
    x, weight, _ = made_of(z, where)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    target = torch.tensor([2], device=where)
    logp, *_ = tilefuse.linear_logprobs(x, weight, target, softcap=30.0)
    exact = naive(x.detach().double(), weight.detach().double(), target, softcap=30.0)
    torch.testing.assert_close(logp.detach().double(), exact[0])
    dx, dweight = torch.autograd.grad(logp.sum(), leaves)
    assert dx.isfinite().all() and not dweight[:4].any()


def test_ties_have_the_lowest_argmax(where):
    z = torch.zeros(2, 4200)
    z[0, [17, 18, 4100]] = 2.0
    z[1] = 1.0
    x, weight, _ = made_of(z, where)
    argmax = tilefuse.linear_logprobs(x, weight, torch.zeros(2, dtype=torch.int64, device=where))[3]
    assert argmax.tolist() == [17, 0]


def test_strides_and_leading_dims(where):
    x, weight, target, bias = case(12, 37, 6, where)
    expected = tilefuse.linear_logprobs(x, weight, target, bias)
    wide = torch.cat((torch.full_like(x, math.nan), x), 1)[:, 6:]
    for a, b in ((wide, weight), (x.t().contiguous().t(), weight.t().contiguous().t())):
        for ours, right in zip(tilefuse.linear_logprobs(a, b, target, bias), expected):
            assert_bit_equal(ours, right)
    shaped = tilefuse.linear_logprobs(x.view(3, 4, 6), weight, target.view(3, 4), bias)
    for ours, right in zip(shaped, expected):
        assert_bit_equal(ours, right.view(3, 4))
    # the reference's products are PyTorch's, which may add up one row in another order
    same = torch.testing.assert_close if tilefuse.backend() == "reference" else assert_bit_equal
    for ours, right in zip(tilefuse.linear_logprobs(x[0], weight, target[0], bias), expected):
        same(ours, right[0])


def test_autocast():
    x, weight, target, bias = case(9, 70, 8)
    leaves = [t.requires_grad_() for t in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        logp, *_ = tilefuse.linear_logprobs(x, weight, target, bias)
    dx, dweight = torch.autograd.grad(logp.sum(), leaves)
    assert dx.dtype == dweight.dtype == torch.float32
    halves = [t.detach().bfloat16() for t in leaves]
    assert_bit_equal(logp.detach(), tilefuse.linear_logprobs(*halves, target, bias)[0])


def test_triton_blocks_of_the_vocabulary(triton_backend, monkeypatch):
    """More than one block, the last one ragged: sums go on where they were."""
    module = importlib.import_module("tilefuse.triton_kernels.loss.linear_logprobs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, target, bias = case(20, 300, 40, device)
    upstream = [torch.randn(20, device=device) for _ in range(3)]

    def run():
        return differentiated(
            lambda *t: tilefuse.linear_logprobs(t[0], t[1], target, t[2]), (x, weight, bias), upstream
        )[1]

    whole = run()
    monkeypatch.setattr(module, "BLOCK_IDS", 128)
    for a, b in zip(run(), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_library
def test_threads_change_nothing():
    """Neither statistics nor gradients."""
    x, weight, target, bias = case(600, 5000, 72, dtype=torch.bfloat16)
    upstream = [torch.randn(600) for _ in range(3)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, gradients = differentiated(
                lambda *t: tilefuse.linear_logprobs(t[0], t[1], target, t[2]), (x, weight, bias), upstream
            )
            found.append((*out, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert_bit_equal(a, b)


PREPARE = """
from tilefuse.testing.inputs.loss.linear_logprobs import case
def run(tokens, vocabulary):
    x, weight, target, bias = case(tokens, vocabulary, 16, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    return lambda: torch.autograd.grad(tilefuse.linear_logprobs(*leaves[:2], target, bias)[0].sum(), leaves)
run(8, 300)()
call = run(2048, 65536)
"""


@pytest.mark.cpu_library
@pytest.mark.skipif(not can_measure_peaks(), reason="needs Linux")
def test_peak_memory():
    """Logits of these would be 512 MiB: everything beside the arguments, gradients included, stays below 96 MiB."""
    assert peak_bytes(PREPARE, "call()") < 96 << 20


X, W, T, B = torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(9)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"x must be \[\.\.\., H\], got \[\] float32", (X[0, 0, 0], W, T), {}),
        (TypeError, "x must be float32 or", (X.int(), W, T), {}),
        (ValueError, r"weight must be \[V, 4\] with V >= 1, got \[9, 3\] float32", (X, W[:, :3], T), {}),
        (ValueError, r"weight must be \[V, 4\] with V >= 1", (X, W[:0], T), {}),
        (TypeError, "weight must be of x's dtype float32, got .* bfloat16", (X, W.bfloat16(), T), {}),
        (ValueError, r"target must be \[2, 3\] int32 or int64, got \[2\] int64", (X, W, T[:, 0]), {}),
        (TypeError, "target must be int32 or int64", (X, W, T.float()), {}),
        (ValueError, r"bias must be \[9\], got \[8\]", (X, W, T, B[:8]), {}),
        (TypeError, "bias must be float32 or", (X, W, T, B.int()), {}),
        (ValueError, "weight must be on the device of x", (X, W.to("meta"), T), {}),
        (ValueError, "target must be on the device of x", (X, W, T.to("meta")), {}),
        (ValueError, "bias must be on the device of x", (X, W, T, B.to("meta")), {}),
        (ValueError, "softcap must be at least 0", (X, W, T), {"softcap": -1.0}),
        (ValueError, "temperature must be above 0", (X, W, T), {"temperature": 0.0}),
        (ValueError, "temperature must be above 0", (X, W, T), {"temperature": math.nan}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.linear_logprobs, torch.ops.tilefuse.linear_logprobs):
        with pytest.raises(error, match=rf"^tilefuse\.linear_logprobs: {match}"):
            call(*args, **options)


def test_errors_of_the_parts():
    stats = tilefuse.linear_logprob_stats(X, W, T)
    with pytest.raises(ValueError, match="linear_logprob_stats: vocab_start must be at least 0, got -1"):
        tilefuse.linear_logprob_stats(X, W, T, vocab_start=-1)
    with pytest.raises(RuntimeError, match="linear_logprob_stats: it has no gradient, but weight requires grad"):
        tilefuse.linear_logprob_stats(X, W.clone().requires_grad_(), T)
    with pytest.raises(ValueError, match="merge_logprobs: parts must be one tensor per shard"):
        tilefuse.merge_logprobs([])
    with pytest.raises(ValueError, match=r"merge_logprobs: parts must be \[6, blocks, 5\] each, got \[5, 1, 5\]"):
        tilefuse.merge_logprobs([stats, stats[:5]])
    with pytest.raises(TypeError, match="merge_logprobs: parts must be all float32, or all float64"):
        tilefuse.merge_logprobs([stats, stats.double()])
