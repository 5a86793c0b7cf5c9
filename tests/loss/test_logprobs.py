"""``logprobs`` on every backend, against PyTorch in float64."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.ops.loss.logprobs import token_rows
from tilefuse.testing import assert_bit_equal, assert_close, canary, poisoned
from tilefuse.testing.inputs.loss.linear_logprobs import IGNORED
from tilefuse.testing.inputs.loss.logprobs import case, naive

KERNEL = "logprobs_fwd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"scale": 0.7, "softcap": 4.0, "temperature": 1.3}]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "transformed"])


def differentiated(function, logits, target, upstream, dtype=None, **options):
    """(outputs, gradient of logits), from logp, lse and entropy together."""
    leaf = logits.detach().to(dtype or logits.dtype, copy=True).requires_grad_()
    out = function(leaf, target, **options)
    return out, torch.autograd.grad(out[:3], leaf, [u.to(out[0]) for u in upstream])[0]


def random_like(target):
    return [torch.randn(target.shape, device=target.device) for _ in range(3)]


def check(logits, target, **options):
    """Outputs and gradient against float64."""
    upstream = random_like(target)
    with poisoned():
        out, gradient = differentiated(tilefuse.logprobs, logits, target, upstream, **options)
    exact, exact_gradient = differentiated(naive, logits, target, upstream, torch.float64, **options)
    same, same_gradient = differentiated(naive, logits, target, upstream, **options)
    assert out[3].dtype == torch.int32 and all(o.dtype == torch.float32 for o in out[:3])
    assert_bit_equal(out[3], exact[3])
    for a, b, c in zip(out[:3], exact, same):
        assert_close(a, b, c, rows=False)
    assert gradient.dtype == logits.dtype
    assert_close(gradient, exact_gradient, same_gradient, rows=False)


@each_dtype
@each_option
@pytest.mark.parametrize(("tokens", "vocabulary"), [(3, 1), (1, 1000), (20, 133)], ids=str)
def test_matches_oracle(tokens, vocabulary, options, dtype, where):
    check(*case(tokens, vocabulary, where, dtype), **options)


@pytest.mark.parametrize(("options", "dtype"), [*zip(OPTIONS, DTYPES)], ids=["plain", "transformed"])
def test_two_blocks_match_oracle(options, dtype, where):
    check(*case(3, 4096 + 9, where, dtype, ignored=0.0), **options)


@pytest.mark.parametrize("which", range(3))
def test_one_output_alone(which, where):
    """The gradient of each output, the others unused."""
    logits, target = case(7, 70, where)
    gradients = []
    for function, dtype in ((tilefuse.logprobs, None), (naive, torch.float64), (naive, None)):
        leaf = logits.detach().to(dtype or logits.dtype, copy=True).requires_grad_()
        gradients.append(torch.autograd.grad(function(leaf, target)[which].sum(), leaf)[0])
    assert_close(*gradients, rows=False)


def test_gradcheck():
    logits, target = case(5, 11)
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda z: tilefuse.logprobs(z, target, scale=0.5, softcap=2.0, temperature=0.7)[:3],
            logits.double().requires_grad_(),
        )


@each_option
@pytest.mark.cpu_library
def test_statistics_are_those_of_the_head(options):
    """The same bits as the ``linear_logprobs`` that makes these logits."""
    logits, target = case(20, 2 * 4096 + 9)
    head = torch.eye(20), logits.t().contiguous()
    found = tilefuse.logprobs(logits, target, **options)
    for a, b in zip(found, tilefuse.linear_logprobs(*head, target, **options)):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_is_kept(tokens, where):
    """No token, or ignored ones alone: zeros, and a gradient that is exactly 0."""
    logits, target = case(tokens, 70, where, ignored=1.1)
    logits.requires_grad_()
    with poisoned():
        logp, lse, entropy, argmax = tilefuse.logprobs(logits, target)
        (gradient,) = torch.autograd.grad((logp + lse + entropy).sum(), logits)
    assert not any(t.any() for t in (logp, lse, entropy, gradient))
    assert (argmax == -1).all() and gradient.shape == logits.shape


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_ignored_tokens_are_never_read(garbage, where):
    """Neither their logits nor their upstream gradients."""
    logits, target = case(9, 70, where, torch.bfloat16)
    target[::4] = IGNORED
    ignored = target == IGNORED
    upstream = random_like(target)
    dirty, unread = logits.masked_fill(ignored[:, None], garbage), [u.masked_fill(ignored, garbage) for u in upstream]
    with poisoned():
        out, gradient = differentiated(tilefuse.logprobs, dirty, target, unread)
    clean, clean_gradient = differentiated(tilefuse.logprobs, logits, target, upstream)
    for a, b in zip((*out, gradient), (*clean, clean_gradient)):
        assert_bit_equal(a, b)
    assert not gradient[ignored].any()


@pytest.mark.parametrize("wrong", [-1, 20, 2**40])
def test_targets_out_of_range(wrong, where):
    """An error where the host sees them; on a GPU NaN for the token, with nothing read or written elsewhere."""
    logits, target = case(6, 20, where, ignored=0.0)
    bad = target.clone()
    bad[2] = wrong
    if tilefuse.backend() != "triton":
        with pytest.raises(ValueError, match=rf"\.logprobs: target must be in \[0, 20\) or .* = -100, got {wrong}"):
            tilefuse.logprobs(logits, bad)
        return
    guarded = canary(logits.shape, logits.dtype, where)
    guarded.tensor.copy_(logits)
    leaf = guarded.tensor.detach().requires_grad_()
    logp, *_ = tilefuse.logprobs(leaf, bad)
    (gradient,) = torch.autograd.grad(logp.sum(), leaf)
    guarded.check()
    right, right_gradient = differentiated(tilefuse.logprobs, logits, target, [torch.ones(6), *torch.zeros(2, 6)])
    others = torch.arange(6, device=where) != 2
    assert logp[2].isnan() and gradient[2].isnan().all()
    assert_bit_equal(logp[others], right[0][others])
    assert_bit_equal(gradient[others], right_gradient[others])


@pytest.mark.parametrize("ignore_index", [0, 36, IGNORED])
def test_any_id_may_be_ignored(ignore_index, where):
    logits, target = case(12, 37, where, ignored=0.0)
    target[::3] = ignore_index
    out = [tilefuse.logprobs(logits, ids, ignore_index=ignore_index) for ids in (target, target.int())]
    for a, b in zip(*out):
        assert_bit_equal(a, b)
    expected = naive(logits.double(), target, ignore_index=ignore_index)
    torch.testing.assert_close(out[0][0].double(), expected[0], rtol=1e-5, atol=1e-5)
    assert_bit_equal(out[0][3], expected[3])


def test_no_gradient_is_no_work(where):
    logits, target = case(4, 70, where)
    assert not tilefuse.logprobs(logits, target)[0].requires_grad
    logits.requires_grad_()
    with torch.no_grad():
        assert not tilefuse.logprobs(logits, target)[0].requires_grad
    assert tilefuse.logprobs(logits, target)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [2.0**16, 2.0**-24])
def test_gradients_scale_exactly(power, dtype, where):
    logits, target = case(9, 70, where, dtype)
    upstream = random_like(target)
    _, plain = differentiated(tilefuse.logprobs, logits, target, upstream)
    _, scaled = differentiated(tilefuse.logprobs, logits, target, [u * power for u in upstream])
    assert_bit_equal(scaled, plain * power)


def test_backward_twice_and_checkpoint(where):
    logits, target = case(9, 70, where, torch.bfloat16)
    logits.requires_grad_()

    def loss(logits):
        logp, lse, entropy, _ = tilefuse.logprobs(logits, target)
        return (logp + 0.1 * lse + 0.3 * entropy).sum()

    out = loss(logits)
    before = logits.detach().clone()
    (first,) = torch.autograd.grad(out, logits, retain_graph=True)
    for again in (
        torch.autograd.grad(out, logits),
        torch.autograd.grad(checkpoint(loss, logits, use_reentrant=False), logits),
    ):
        assert_bit_equal(again[0], first)
    assert_bit_equal(logits.detach(), before)


def test_second_derivative_raises():
    logits, target = case(4, 9)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(tilefuse.logprobs(logits, target)[0].sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="logprobs: the op is differentiable once"):
        (gradient.square().sum() + logits.sum()).backward()


def check_batch_invariant(vocabulary, dtype, where):
    # plain PyTorch, whose vectors depend on the number of rows
    if tilefuse.backend() == "reference":
        return
    logits, target = case(13, vocabulary, where, dtype)
    upstream = random_like(target)
    out, gradient = differentiated(tilefuse.logprobs, logits, target, upstream)
    for rows in (slice(0, 1), slice(3, 10), slice(0, 12), torch.randperm(13, device=where)):
        part, part_gradient = differentiated(tilefuse.logprobs, logits[rows], target[rows], [u[rows] for u in upstream])
        for a, b in zip((*part, part_gradient), (*out, gradient)):
            assert_bit_equal(a, b[rows])


@each_dtype
def test_batch_invariant(dtype, where):
    """A token's statistics and gradients depend on no other."""
    check_batch_invariant(70, dtype, where)


@pytest.mark.slow_in_interpreter
@each_dtype
def test_batch_invariant_over_blocks(dtype, where):
    check_batch_invariant(2 * 4096 + 9, dtype, where)


def check_extremes(vocabulary, dtype, where):
    z = torch.zeros(5, vocabulary)
    z[0] = -3e4
    z[0, 3] = 3e4
    z[1] = 1e4 + torch.randn(vocabulary)
    z[2] = -3e4
    z[3, 2:] = -1e4
    # one apart: 3e4 - log V has an error of 1e-3 in float32
    z[4] = 3e4
    check(z.to(where, dtype), torch.tensor([3, 4, 0, 1, 2], device=where))


@each_dtype
def test_extreme_logits(dtype, where):
    check_extremes(5, dtype, where)


def test_extreme_logits_over_blocks(where):
    check_extremes(4097, torch.float32, where)


@pytest.mark.parametrize("vocabulary", [3, 4097])
def test_minus_infinity_adds_nothing(vocabulary, where):
    """Ids that -inf rules out, down to the target alone."""
    logits, target = case(3, vocabulary, where, torch.bfloat16, ignored=0.0)
    target[:] = vocabulary - 1
    logits[:, :-1] = -math.inf
    leaf = logits.clone().requires_grad_()
    logp, lse, entropy, argmax = tilefuse.logprobs(leaf, target)
    assert not logp.any() and not entropy.any() and (argmax == vocabulary - 1).all()
    assert_bit_equal(lse.detach(), logits[:, -1].float())
    assert not torch.autograd.grad((logp + entropy).sum(), leaf)[0].any()
    logits[:, :2] = 0.25
    finite = logits[0].isfinite()
    upstream = random_like(target)
    out, gradient = differentiated(tilefuse.logprobs, logits, target, upstream)
    few = logits[:, finite].double(), torch.full_like(target, int(finite.sum()) - 1)
    exact, exact_gradient = differentiated(naive, *few, upstream)
    for a, b in zip(out[:3], exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert not gradient[:, ~finite].any()
    torch.testing.assert_close(gradient[:, finite].double(), exact_gradient, rtol=4e-3, atol=1e-5)


def test_infinity_and_nan_stay_in_their_rows(where):
    logits, target = case(6, 70, where, ignored=0.0)
    upstream = random_like(target)
    clean = differentiated(tilefuse.logprobs, logits, target, upstream)
    others = torch.ones(6, dtype=torch.bool, device=where)
    others[[1, 4]] = False
    logits[1, 0], logits[4, 3] = math.inf, math.nan
    out, gradient = differentiated(tilefuse.logprobs, logits, target, upstream)
    for a, b in zip((*out, gradient), (*clean[0], clean[1])):
        assert_bit_equal(a[others], b[others])
    assert out[1][4].isnan() and gradient[4].isnan().any()


def test_a_saturated_cap_has_no_gradient(where):
    logits = torch.zeros(1, 9, device=where)
    logits[0, :4] = 1e4
    target = torch.tensor([2], device=where)
    ones = [torch.ones(1)] * 3
    out, gradient = differentiated(tilefuse.logprobs, logits, target, ones, softcap=30.0)
    exact, exact_gradient = differentiated(naive, logits, target, ones, torch.float64, softcap=30.0)
    torch.testing.assert_close(out[0].double(), exact[0])
    torch.testing.assert_close(gradient.double(), exact_gradient)
    assert not gradient[0, :4].any()


def test_ties_have_the_lowest_argmax(where):
    logits = torch.zeros(2, 4200, device=where)
    logits[0, [17, 18, 4100]] = 2.0
    argmax = tilefuse.logprobs(logits, torch.zeros(2, dtype=torch.int64, device=where))[3]
    assert argmax.tolist() == [17, 0]


def views():
    """Tensors of [.., V] whose rows lie apart, and whether one may read them where they are."""
    yield "a slice", lambda z: z.view(3, 4, -1)[:, :-1], True
    yield "of four dims", lambda z: z.view(2, 2, 3, -1)[:, :, 1:], True
    yield "transposed", lambda z: z.view(3, 4, -1).transpose(0, 1), True
    yield "columns", lambda z: z[:, 3:-2], True
    yield "expanded", lambda z: z[:1].expand(5, -1), True
    yield "one token", lambda z: z[0], True
    yield "vocabulary outermost", lambda z: z.t().contiguous().t(), False
    yield "every second", lambda z: z[:, ::2], False


@pytest.mark.parametrize(("view", "in_place"), [pytest.param(v, p, id=n) for n, v, p in views()])
def test_strided_logits(view, in_place, where):
    """Read where they lie, what is between them is not; the gradient is that of the copy."""
    logits, _ = case(12, 90, where)
    logits.requires_grad_()
    seen = view(logits)
    target = torch.randint(seen.shape[-1], seen.shape[:-1], device=where)
    assert (token_rows(seen).data_ptr() == seen.data_ptr()) == in_place
    assert_bit_equal(token_rows(seen).flatten(), seen.flatten())

    def run(z):
        out = tilefuse.logprobs(z, target)
        return *out, *torch.autograd.grad(out[0].sum() + out[2].sum(), logits)

    found, expected = run(seen), run(seen.contiguous())
    for a, b in zip(found, expected):
        assert_bit_equal(a, b)
    assert all(o.shape == target.shape for o in found[:4])
    (read,) = torch.autograd.grad(seen.sum(), logits)
    dirty = torch.where(read > 0, logits.detach(), math.nan)
    for a, b in zip(tilefuse.logprobs(view(dirty), target), expected):
        assert_bit_equal(a, b.detach())


def test_compiles_without_a_break():
    logits, target = case(9, 70)
    upstream = random_like(target)
    compiled = torch.compile(tilefuse.logprobs, fullgraph=True, backend="aot_eager")
    out, gradient = differentiated(compiled, logits, target, upstream)
    eager, eager_gradient = differentiated(tilefuse.logprobs, logits, target, upstream)
    for a, b in zip((*out, gradient), (*eager, eager_gradient)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.cpu_library
def test_threads_change_nothing():
    logits, target = case(60, 5000, dtype=torch.bfloat16)
    upstream = random_like(target)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, gradient = differentiated(tilefuse.logprobs, logits, target, upstream)
            found.append((*out, gradient))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert_bit_equal(a, b)


@pytest.mark.cpu_library
def test_large_gradients_are_written_past_the_caches():
    """Rows of any alignment, from 2 MiB of gradients on."""
    for vocabulary in (4096, 4099):
        logits, target = case(300, vocabulary, dtype=torch.bfloat16)
        upstream = random_like(target)
        with poisoned():
            _, whole = differentiated(tilefuse.logprobs, logits, target, upstream)
        _, part = differentiated(tilefuse.logprobs, logits[:200], target[:200], [u[:200] for u in upstream])
        assert_bit_equal(whole[:200], part)


Z, T = torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"logits must be \[\.\.\., V\] with V >= 1, got \[\] float32", (Z[0, 0, 0], T), {}),
        (ValueError, r"logits must be \[\.\.\., V\] with V >= 1, got \[2, 3, 0\]", (Z[..., :0], T), {}),
        (TypeError, "logits must be float32 or", (Z.int(), T), {}),
        (ValueError, r"target must be \[2, 3\] int32 or int64, got \[2\] int64", (Z, T[:, 0]), {}),
        (TypeError, "target must be int32 or int64", (Z, T.float()), {}),
        (ValueError, "target must be on the device of logits", (Z, T.to("meta")), {}),
        (ValueError, "softcap must be at least 0", (Z, T), {"softcap": -1.0}),
        (ValueError, "temperature must be above 0", (Z, T), {"temperature": 0.0}),
        (ValueError, "temperature must be above 0", (Z, T), {"temperature": math.nan}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.logprobs, torch.ops.tilefuse.logprobs):
        with pytest.raises(error, match=rf"^tilefuse\.logprobs: {match}"):
            call(*args, **options)
