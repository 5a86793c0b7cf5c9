"""``nn.DistillationLoss`` is its two ops with their options held."""

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
    args = (target, bias, torch.rand(9))
    for options in ({}, OPTIONS, *({name: value} for name, value in OPTIONS.items())):
        found = tilefuse.nn.DistillationLoss(**options)(x, weight, (logp, ids), *args)
        assert_bit_equal(found, tilefuse.linear_topk_distillation(x, weight, logp, ids, *args, **options))
    criterion = tilefuse.nn.DistillationLoss()
    halved = criterion(x, weight, (logp, ids), *args, num_items=4)
    torch.testing.assert_close(halved * 2, criterion(x, weight, (logp, ids), *args, num_items=2))


def test_has_the_options_and_defaults_of_the_op():
    op = inspect.signature(tilefuse.linear_topk_distillation).parameters.values()
    options = {p.name: p.default for p in op if p.kind is p.KEYWORD_ONLY}
    module = inspect.signature(tilefuse.nn.DistillationLoss).parameters.values()
    assert {p.name: p.default for p in module} == options


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_a_teacher_may_bring_its_head(biased):
    x, weight, *_, target, bias = case(9, 40, 8, 5)
    target[::3] = 3
    teacher = (torch.randn(9, 12), torch.randn(44, 12), torch.randn(44))[: 2 + biased]
    options = {name: value for name, value in OPTIONS.items() if name != "tail"}
    found = tilefuse.nn.DistillationLoss(**OPTIONS)(x, weight, teacher, target, bias, torch.ones(9))
    of_teacher = (*teacher[:2], target, bias, *teacher[2:])
    right = tilefuse.linear_distillation(x, weight, *of_teacher, token_weight=torch.ones(9), **options)
    assert_bit_equal(found, right)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_teacher_is_a_list_or_a_head(parts):
    x, weight, logp, ids, *_ = case(9, 40, 8, 5)
    for teacher in ((logp, ids, ids, ids)[:parts], logp):
        with pytest.raises(ValueError, match=r"tilefuse\.nn\.DistillationLoss: teacher must be \(teacher_logp"):
            tilefuse.nn.DistillationLoss()(x, weight, teacher)


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
            listed = teacher(x).log_softmax(-1).topk(8)
        loss = criterion(x, student.weight, listed, bias=student.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0] and not criterion.state_dict()
    assert "beta=0.0, tail='bucket'" in repr(criterion)
