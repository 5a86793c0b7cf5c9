"""``nn.DistillationLoss`` is the op with its options held."""

import inspect

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.loss.linear_topk_distillation import case

OPTIONS = {"beta": 0.3, "tail": "renormalize", "temperature": 1.7, "ignore_index": 3, "reduction": "sum"}


def test_every_option_reaches_the_op():
    x, weight, logp, ids, target, bias = case(9, 40, 8, 5)
    target[::3] = 3
    args = (x, weight, logp, ids, target, bias, torch.rand(9))
    for options in ({}, OPTIONS, *({name: value} for name, value in OPTIONS.items())):
        ids = args[3] if options.get("ignore_index") != 3 else torch.where(target[:, None] == 3, -1, args[3])
        call = (*args[:3], ids, *args[4:])
        assert_bit_equal(
            tilefuse.nn.DistillationLoss(**options)(*call), tilefuse.linear_topk_distillation(*call, **options)
        )
    criterion = tilefuse.nn.DistillationLoss()
    torch.testing.assert_close(criterion(*args, num_items=4) * 2, criterion(*args, num_items=2))


def test_has_the_arguments_and_defaults_of_the_op():
    op = inspect.signature(tilefuse.linear_topk_distillation).parameters
    module = dict(inspect.signature(tilefuse.nn.DistillationLoss).parameters)
    forward = dict([*inspect.signature(tilefuse.nn.DistillationLoss.forward).parameters.items()][1:])
    assert {**forward, **module} == dict(op)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ({"tail": "drop"}, "tail must be one of bucket, renormalize, none"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, none"),
    ],
)
def test_options_are_checked_where_the_module_is_made(options, match):
    with pytest.raises(ValueError, match=rf"tilefuse\.nn\.DistillationLoss: {match}"):
        tilefuse.nn.DistillationLoss(**options)


def test_a_student_learns_its_teacher():
    torch.manual_seed(0)
    teacher, student = torch.nn.Linear(6, 30), torch.nn.Linear(6, 30)
    criterion = tilefuse.nn.DistillationLoss()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    losses = []
    for _ in range(100):
        x = torch.randn(64, 6)
        with torch.no_grad():
            logp, ids = teacher(x).log_softmax(-1).topk(8)
        loss = criterion(x, student.weight, logp, ids, bias=student.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0] and not criterion.state_dict()
    assert "beta=0.0, tail='bucket'" in repr(criterion)
