"""``moe_combine``. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.moe.moe_combine import case

KERNEL = "moe_combine_fwd"


def by_hand(y, inverse, weights):
    tokens, top_k = weights.shape
    out = torch.zeros(tokens, y.shape[1], dtype=torch.float64)
    for f, at in enumerate(inverse.tolist()):
        if 0 <= at < y.shape[0]:
            out[f // top_k] += weights.flatten()[f].double().cpu() * y[at].double().cpu()
    return out


def naive(y, inverse, weights):
    """As models write it: gather, scale, sum, in y's dtype."""
    at = inverse.long().view(weights.shape)
    rows = y[at.clamp(min=0)].masked_fill((at < 0)[..., None], 0)
    return (rows * weights[..., None].to(y.dtype)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 1), (7, 3, 97), (33, 5, 300), (4, 2, 2049), (0, 2, 8)])
def test_matches_oracle(tokens, top_k, hidden, dtype, where):
    y, inverse, weights = case(tokens, top_k, hidden, where, dtype)
    with poisoned():
        out = tilefuse.moe_combine(y, inverse, weights)
    assert out.dtype == dtype
    if tokens:
        assert_close(out.cpu(), by_hand(y, inverse, weights), naive(y, inverse, weights).cpu())


def test_10_11_dropped_slots_add_nothing(where):
    """Neither NaN in an unused row nor a weight that is not finite reaches the sum."""
    y, inverse, weights = case(12, 3, 64, where, dropped=0.5)
    clean = tilefuse.moe_combine(y, inverse, weights)
    dropped = (inverse < 0).view(weights.shape)
    assert dropped.any() and not dropped.all()
    used = torch.zeros(y.shape[0], dtype=torch.bool, device=where)
    used[inverse[inverse >= 0].long()] = True
    y, weights = y.masked_fill(~used[:, None], math.nan), weights.masked_fill(dropped, math.inf)
    assert_bit_equal(tilefuse.moe_combine(y, inverse, weights), clean)
    past = torch.where(inverse < 0, y.shape[0] + 5, inverse)
    assert_bit_equal(tilefuse.moe_combine(y, past, weights), clean)


def test_10_a_token_without_slots_is_zero(where):
    y, inverse, weights = case(6, 2, 32, where)
    assert not tilefuse.moe_combine(y, torch.full_like(inverse, -1), weights).any()


def test_20_sums_in_float32(where):
    """A sum kept in bf16 loses at least twice as much."""
    y, inverse, weights = case(64, 8, 128, where, torch.bfloat16, dropped=0.0, experts=16)
    exact = by_hand(y, inverse, weights)
    in_bf16 = torch.zeros(64, 128, dtype=torch.bfloat16)
    for j in range(8):
        in_bf16 += (y.cpu()[inverse.cpu().view(64, 8)[:, j].long()] * weights.cpu()[:, j, None]).bfloat16()
    out = tilefuse.moe_combine(y, inverse, weights).cpu()
    error = (out.double() - exact).square().mean().sqrt()
    assert 2 * error < (in_bf16.double() - exact).square().mean().sqrt()
    assert (out.float() - exact.float()).abs().max() <= exact.abs().max() * 2**-8


def test_gradcheck():
    y, inverse, weights = case(5, 3, 7)
    y, weights = y.double().requires_grad_(), weights.double().requires_grad_()
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(lambda y, w: tilefuse.moe_combine(y, inverse, w), (y, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype, where):
    y, inverse, weights = case(9, 3, 97, where, dtype)
    grad = torch.randn(9, 97, device=where).to(dtype)

    def gradients(function, y, weights):
        y, weights = y.detach().requires_grad_(), weights.detach().requires_grad_()
        with poisoned():
            return torch.autograd.grad(function(y, inverse, weights), (y, weights), grad.to(y.dtype))

    actual = gradients(tilefuse.moe_combine, y, weights)
    with tilefuse.backend("reference"):
        exact = gradients(tilefuse.moe_combine, y.double(), weights.double())
    plain = gradients(naive, y, weights)
    unused = torch.ones(y.shape[0], dtype=torch.bool, device=where)
    unused[inverse[inverse >= 0].long()] = False
    assert (actual[0][unused] == 0).all()
    assert_close(actual[0], exact[0], plain[0])
    assert_close(actual[1], exact[1], plain[1], rows=False)


def test_13_14_repeatable_and_batch_invariant(where, repeats):
    y, inverse, weights = case(10, 4, 130, where, torch.bfloat16)
    grad = torch.randn(10, 130, device=where).bfloat16()

    def run(inverse, weights, grad):
        leaves = [y.detach().requires_grad_(), weights.detach().requires_grad_()]
        out = tilefuse.moe_combine(leaves[0], inverse, leaves[1])
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    first = run(inverse, weights, grad)
    for _ in range(repeats(where)):
        for a, b in zip(run(inverse, weights, grad), first):
            assert_bit_equal(a, b)
    out, dy, dweights = run(inverse[12:24], weights[3:6], grad[3:6])
    assert_bit_equal(out, first[0][3:6])
    assert_bit_equal(dweights, first[2][3:6])
    used = inverse[12:24][inverse[12:24] >= 0].long()
    assert_bit_equal(dy[used], first[1][used])


def test_1_no_tokens(where):
    y, inverse, weights = case(0, 2, 8, where)
    y, weights = y.requires_grad_(), weights.requires_grad_()
    out = tilefuse.moe_combine(y, inverse, weights)
    out.sum().backward()
    assert out.shape == (0, 8) and y.grad.shape == y.shape and weights.grad.shape == (0, 2)


def test_strides(where):
    y, inverse, weights = case(6, 2, 48, where)
    wide = torch.cat((torch.full_like(y, math.nan), y), 1)[:, 48:]
    expected = tilefuse.moe_combine(y, inverse, weights)
    for view in (wide, y.T.contiguous().T):
        assert_bit_equal(tilefuse.moe_combine(view, inverse, weights.T.contiguous().T), expected)


def test_16_compile():
    compiled = torch.compile(tilefuse.moe_combine, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 7):
        y, inverse, weights = case(tokens, 2, 16)
        y.requires_grad_()
        out = compiled(y, inverse, weights)
        assert_bit_equal(out.detach(), tilefuse.moe_combine(y.detach(), inverse, weights))
        (grad,) = torch.autograd.grad(out.sum(), y)
        assert_bit_equal(grad, torch.autograd.grad(tilefuse.moe_combine(y, inverse, weights).sum(), y)[0])


Y, N, W = torch.zeros(8, 4), torch.zeros(6, dtype=torch.int32), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (ValueError, r"moe_combine: y must be \[rows, H\], got \[8\] float32", (Y[:, 0], N, W)),
        (TypeError, "y must be float32 or", (Y.int(), N, W)),
        (ValueError, r"inverse must be \[6\] int32 or int64, got \[5\] int32", (Y, N[:5], W)),
        (TypeError, "inverse must be int32 or int64", (Y, N.float(), W)),
        (ValueError, r"weights must be \[T, k\]", (Y, N, W[0])),
        (TypeError, "weights must be float32 or of y's dtype", (Y, N, W.double())),
        (ValueError, "inverse must be on the device of y", (Y, N.to("meta"), W)),
        (ValueError, "weights must be on the device of y", (Y, N, W.to("meta"))),
    ],
)
def test_errors(error, match, args):
    for call in (tilefuse.moe_combine, torch.ops.tilefuse.moe_combine):
        with pytest.raises(error, match=match):
            call(*args)
