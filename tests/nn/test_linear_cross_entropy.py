"""``tilefuse.nn.LinearCrossEntropy``."""

import pytest
import torch
from torch import nn

from tilefuse.nn import LinearCrossEntropy
from tilefuse.testing import assert_bit_equal


@pytest.mark.parametrize("bias", [False, True])
def test_is_linear_and_cross_entropy(bias):
    head, ours = nn.Linear(12, 40, bias=bias), LinearCrossEntropy(12, 40, bias=bias, label_smoothing=0.1)
    ours.load_state_dict(head.state_dict())
    x, target = torch.randn(2, 7, 12, requires_grad=True), torch.randint(40, (2, 7))
    target[0, :3] = -100
    leaves = [x, *ours.parameters()]
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(head(x).flatten(0, 1), target.flatten())
    loss = ours(x, target)
    torch.testing.assert_close(loss, expected)
    right = torch.autograd.grad(expected, [x, *head.parameters()])
    for a, b in zip(torch.autograd.grad(loss, leaves), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert_bit_equal(ours.logits(x), head(x))


def test_options_reach_the_op():
    ours = LinearCrossEntropy(
        12, 40, scale=0.5, softcap=3.0, ignore_index=1, z_loss=0.1, reduction="sum", recompute=False
    )
    x, target, token_weight = torch.randn(9, 12), torch.randint(40, (9,)), torch.rand(9)
    target[::4] = 1
    z = ours.logits(x)
    assert z.abs().max() < 3
    kept = target != 1
    losses = nn.functional.cross_entropy(z, target, reduction="none") + 0.1 * z.logsumexp(-1).square()
    torch.testing.assert_close(ours(x, target, token_weight), (losses * token_weight)[kept].sum())
    mean = LinearCrossEntropy(12, 40)
    mean.load_state_dict(ours.state_dict())
    torch.testing.assert_close(mean(x, target, num_items=4) * 2, mean(x, target, num_items=2))


def test_tied_to_an_embedding():
    table, ours = nn.Embedding(40, 12), LinearCrossEntropy(12, 40)
    ours.weight = table.weight
    ids = torch.randint(40, (9,))
    ours(table(ids), ids).backward()
    expected = torch.autograd.grad(nn.functional.cross_entropy(table(ids) @ table.weight.t(), ids), table.weight)[0]
    torch.testing.assert_close(table.weight.grad, expected)


def test_the_same_seed_draws_the_same_weights():
    one, two = (LinearCrossEntropy(12, 40, bias=True, dtype=torch.float64) for _ in range(2))
    for module in (one, two):
        module.reset_parameters(torch.Generator().manual_seed(3))
    assert_bit_equal(one.weight, two.weight)
    assert one.bias.dtype == torch.float64
    assert "12, 40, bias=True" in repr(one) and LinearCrossEntropy(4, 5, device="meta").weight.is_meta
