"""``moe_apply_capacity``. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.moe.moe_plan import ids_of

KERNEL = "moe_plan_fwd"


def by_hand(ids, weights, experts, capacity, policy):
    """The kept flat slots."""
    tokens, top_k = ids.shape
    slots = [(t, j) for t in range(tokens) for j in range(top_k) if 0 <= ids[t, j] < experts]
    if policy == "position":
        slots.sort(key=lambda s: (s[1], s[0]))
    else:
        slots.sort(key=lambda s: -weights[s].item() if not weights[s].isnan() else math.inf)
    kept, taken = set(), [0] * experts
    for t, j in slots:
        e = int(ids[t, j])
        if taken[e] < capacity:
            kept.add((t, j))
        taken[e] += 1
    return kept


@pytest.mark.parametrize("policy", ["position", "weight"])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.5, 100.0])
def test_21_exact_drop_set(policy, factor, where):
    """Also with less room than there are slots (a factor below 1), ties, dropped ids and a NaN weight."""
    ids = ids_of(40, 3, 6, where, dropped=0.2)
    weights = torch.randint(1, 6, (40, 3)).float().to(where)
    weights[7, 1] = math.nan
    capacity = math.ceil(factor * 40 * 3 / 6)
    new_ids, new_weights = tilefuse.moe_apply_capacity(ids, weights, 6, capacity, policy=policy)
    kept = by_hand(ids.cpu(), weights.cpu(), 6, capacity, policy)
    for t in range(40):
        for j in range(3):
            inside = (t, j) in kept
            assert new_ids[t, j] == (ids[t, j] if inside else -1)
            assert_bit_equal(new_weights[t, j], weights[t, j] if inside else torch.zeros_like(weights[t, j]))
    assert new_ids.dtype == torch.int32


def test_21_first_choices_come_before_second_ones(where):
    ids = torch.tensor([[1, 0], [0, 1], [0, 1]], device=where)
    weights = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]], device=where)
    assert tilefuse.moe_apply_capacity(ids, weights, 2, 2)[0].tolist() == [[1, -1], [0, 1], [0, -1]]
    by_weight = tilefuse.moe_apply_capacity(ids, weights, 2, 2, policy="weight")
    assert by_weight[0].tolist() == [[-1, 0], [-1, 1], [0, 1]]


@pytest.mark.parametrize("policy", ["position", "weight"])
def test_21_gradient_flows_to_the_kept_weights(policy, where):
    ids, weights = ids_of(20, 2, 4, where), torch.rand(20, 2, device=where).requires_grad_()
    new_ids, new_weights = tilefuse.moe_apply_capacity(ids, weights, 4, 5, policy=policy)
    new_weights.sum().backward()
    assert_bit_equal(weights.grad, (new_ids >= 0).float())


def test_1_no_tokens(where):
    ids, weights = torch.zeros(0, 2, dtype=torch.int32, device=where), torch.zeros(0, 2, device=where)
    for policy in ("position", "weight"):
        out = tilefuse.moe_apply_capacity(ids, weights, 4, 3, policy=policy)
        assert out[0].shape == out[1].shape == (0, 2)


def test_16_compile():
    compiled = torch.compile(tilefuse.moe_apply_capacity, fullgraph=True, backend="aot_eager", dynamic=True)
    for policy in ("position", "weight"):
        args = (ids_of(9, 2, 4), torch.rand(9, 2), 4, 3)
        for a, b in zip(compiled(*args, policy=policy), tilefuse.moe_apply_capacity(*args, policy=policy)):
            assert_bit_equal(a, b)


I, W = torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"moe_apply_capacity: ids must be \[T, k\]", (I[0], W, 4, 2), {}),
        (TypeError, "ids must be int32 or int64", (I.float(), W, 4, 2), {}),
        (ValueError, r"weights must be \[4, 2\] float32, got \[4\] float32", (I, W[:, 0], 4, 2), {}),
        (TypeError, "weights must be", (I, W.int(), 4, 2), {}),
        (ValueError, "weights must be on the device of ids", (I, W.to("meta"), 4, 2), {}),
        (ValueError, "num_experts must be >= 1, got 0", (I, W, 0, 2), {}),
        (ValueError, "capacity must be >= 0, got -1", (I, W, 4, -1), {}),
        (ValueError, "policy must be one of position, weight, got 'probs'", (I, W, 4, 2), {"policy": "probs"}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.moe_apply_capacity, torch.ops.tilefuse.moe_apply_capacity):
        with pytest.raises(error, match=match):
            call(*args, **options)
