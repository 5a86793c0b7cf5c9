"""``tilefuse.nn.MTPLoss``: one call is the sum of the separate losses."""

import itertools

import pytest
import torch
from torch import nn

import tilefuse
from tilefuse.nn import LinearCrossEntropy, MTPLoss
from tilefuse.testing import assert_bit_equal

H, V = 12, 40
# documents of 4, 0, 1 and 5 tokens: most are shorter than the largest depth
BOUNDS = (0, 4, 4, 5, 10)


def ids(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def states(depth, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + depth, *shape, H, generator=generator, dtype=torch.float64, requires_grad=True)


def separate(x, weight, target, bounds, mtp_weight, token_weight=None, num_items=None):
    """The sum of each prediction's own loss over flat tokens, from full logits, documents one by one."""
    depth, count, total = len(x) - 1, 0, weight.new_zeros(())
    for k, rows in enumerate(x.flatten(1, -2)):
        pairs = [(t, t + k) for a, b in itertools.pairwise(bounds) for t in range(a, b - k)]
        pairs = [(t, at) for t, at in pairs if target.flatten()[at] != -100]
        if k == 0:
            count = len(pairs)
        losses = [
            nn.functional.cross_entropy(rows[t] @ weight.t(), target.flatten()[at])
            * (1.0 if token_weight is None else token_weight.flatten()[at])
            for t, at in pairs
        ]
        if losses:
            mean = torch.stack(losses).mean() * (1.0 if num_items is None else count / num_items)
            total = total + mean * (1.0 if k == 0 else mtp_weight / depth)
    return total


@pytest.mark.parametrize("options", [{}, {"token_weight": True}, {"num_items": 35}], ids=["plain", "weights", "items"])
@pytest.mark.parametrize("depth", [0, 1, 3, 6])
def test_is_the_sum_of_separate_losses(depth, options):
    target = ids(10)
    target[2] = target[7] = -100
    loss = MTPLoss(H, V, mtp_weight=0.7, dtype=torch.float64)
    if "token_weight" in options:
        options = {"token_weight": torch.rand(10, dtype=torch.float64) - 0.2}
    for cu_seqlens, bounds in ((torch.tensor(BOUNDS), BOUNDS), (None, (0, 10))):
        x = states(depth, 10)
        found = loss(x, target, cu_seqlens=cu_seqlens, **options)
        expected = separate(x, loss.weight, target, bounds, 0.7, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        leaves = (x, loss.weight)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_rows_are_documents_and_states_may_come_apart():
    target, weights = ids(2, 5), torch.rand(2, 5, dtype=torch.float64)
    x, loss = states(2, 2, 5), MTPLoss(H, V, dtype=torch.float64)
    found = loss(x, target, weights)
    torch.testing.assert_close(found, separate(x, loss.weight, target, (0, 5, 10), 0.3, weights), rtol=1e-12, atol=0)
    assert_bit_equal(loss([*x], target, weights), found)
    packed = loss(x.flatten(1, 2), target.flatten(), weights.flatten(), None, torch.tensor([0, 5, 10]))
    torch.testing.assert_close(packed, found, rtol=1e-12, atol=0)


def test_nothing_to_predict():
    loss, x = MTPLoss(H, V), states(2, 6).float().detach().requires_grad_()
    for target in (torch.full((6,), -100), torch.tensor([7, -100, -100, -100, -100, -100])):
        found = loss(x, target)
        gradients = torch.autograd.grad(found, (x, loss.weight))
        # the extra predictions are without targets either way
        assert found.isfinite() and not gradients[0][1:].any()
        if target[0] == -100:
            assert found == 0 and not any(g.any() for g in gradients)
    assert loss(torch.zeros(3, 0, H), torch.zeros(0, dtype=torch.int64)) == 0
    assert loss(x, ids(6), num_items=0) == 0


def test_micro_batches_add_up():
    """Of equal size: the means of extra predictions are those of each micro-batch."""
    target, x, loss = ids(4, 6), states(1, 4, 6), MTPLoss(H, V, dtype=torch.float64)
    parts = [loss(x[:, i : i + 2], target[i : i + 2], num_items=torch.tensor(24)) for i in (0, 2)]
    torch.testing.assert_close(parts[0] + parts[1], loss(x, target), rtol=1e-12, atol=0)


def test_without_extra_predictions_it_is_the_plain_loss():
    plain, ours = LinearCrossEntropy(H, V, bias=True), MTPLoss(H, V, bias=True)
    ours.load_state_dict(plain.state_dict())
    x, target = torch.randn(9, H), ids(9)
    assert_bit_equal(ours([x], target), plain(x, target))
    assert_bit_equal(ours.logits(x), plain.logits(x))


def test_options_reach_the_op():
    options = {"scale": 0.5, "softcap": 3.0, "ignore_index": 1, "label_smoothing": 0.1, "z_loss": 0.1}
    target = ids(9)
    target[::4] = 1
    ours = MTPLoss(H, V, bias=True, recompute=False, mtp_weight=0.5, dtype=torch.float64, **options)
    x = states(1, 9)
    further = tilefuse.mtp_targets(target, 1, ignore_index=1)[0]
    head = (ours.weight, target, ours.bias), (ours.weight, further, ours.bias)
    expected = tilefuse.linear_cross_entropy(x[0], *head[0], **options)
    expected = expected + 0.5 * tilefuse.linear_cross_entropy(x[1], *head[1], **options)
    torch.testing.assert_close(ours(x, target), expected, rtol=1e-12, atol=0)
    assert "12, 40, bias=True" in repr(ours) and "mtp_weight=0.5" in repr(ours)


def test_compiles_for_all_lengths():
    loss = MTPLoss(H, V)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (10, 14):
        x, target = states(2, tokens).float().detach().requires_grad_(), ids(tokens)
        bounds = torch.tensor([0, 5, tokens])
        expected, found = (f(x, target, cu_seqlens=bounds) for f in (loss, compiled))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (found, expected)))


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_states_and_targets_of_different_shapes(where):
    loss = MTPLoss(H, V, device=where)
    with pytest.raises(ValueError, match=r"x must be the states of one prediction at least, got \[\]"):
        loss([], ids(9).to(where))
    right = torch.zeros(9, H, device=where)
    for x in (torch.zeros(2, 8, H), torch.zeros(9, H), [right, right[:8]], [right, right[:, 1:]], [right, right[None]]):
        x = x.to(where) if isinstance(x, torch.Tensor) else x
        with pytest.raises(
            ValueError, match=r"nn.MTPLoss: x must be \[1 \+ D, 9, H\], or 1 \+ D of \[9, H\], for this"
        ):
            loss(x, ids(9).to(where))


def test_a_negative_weight():
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="MTPLoss: mtp_weight must be at least 0"):
            MTPLoss(H, V, mtp_weight=weight)
