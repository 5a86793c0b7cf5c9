"""``nn.PolicyLoss`` is the op with its options held."""

import inspect

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.loss.policy_loss import bounds, case

OPTIONS = {
    "kind": "cispo", "level": "sequence", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl": "k2",
    "kl_beta": 0.2, "kl_weighted": True, "log_ratio_limit": 5.0, "reduction": "sequence",
}  # fmt: skip


def test_every_option_reaches_the_op():
    args = (*case((20,), spread=2.0), bounds(), 7)
    for options in ({}, OPTIONS, *({name: value} for name, value in OPTIONS.items())):
        expected = tilefuse.policy_loss(*args, **options)
        for a, b in zip(tilefuse.nn.PolicyLoss(**options)(*args), expected):
            assert_bit_equal(a, b)


def test_has_the_arguments_and_defaults_of_the_op():
    op = inspect.signature(tilefuse.policy_loss).parameters
    module = {n: p for n, p in inspect.signature(tilefuse.nn.PolicyLoss).parameters.items()}
    forward = dict([*inspect.signature(tilefuse.nn.PolicyLoss.forward).parameters.items()][1:])
    assert {**forward, **module} == dict(op)


def test_options_are_checked_where_the_module_is_made():
    with pytest.raises(ValueError, match=r"tilefuse\.policy_loss: kind must be one of clip"):
        tilefuse.nn.PolicyLoss(kind="ppo")


def test_a_step_of_training():
    torch.manual_seed(0)
    logp, advantages, old, ref, mask, _ = case((4, 6), masked=0.0)
    logits = torch.nn.Parameter(logp)
    criterion = tilefuse.nn.PolicyLoss(kl_beta=0.04, reduction="sequence")
    optimizer = torch.optim.SGD([logits], lr=1.0)
    losses = []
    for _ in range(3):
        loss, _ = criterion(logits, advantages, old, ref, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] and not criterion.state_dict()
    assert "kl_beta=0.04" in repr(criterion)
