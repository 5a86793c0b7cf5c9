"""``moe_plan``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.moe.moe_plan import ids_of

KERNEL = "moe_plan_fwd"


def by_hand(ids, experts):
    flat = ids.flatten().tolist()
    kept = sorted((e, f) for f, e in enumerate(flat) if 0 <= e < experts)
    order = [f for _, f in kept] + [f for f, e in enumerate(flat) if not 0 <= e < experts]
    inverse = [order.index(f) if 0 <= flat[f] < experts else -1 for f in range(len(flat))]
    offsets = [sum(e < x for e, _ in kept) for x in range(experts + 1)]
    return [torch.tensor(t, dtype=torch.int32) for t in (order, inverse, offsets)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "dropped"),
    [
        (1, 1, 1, 0.0),
        (7, 3, 5, 0.3),
        (40, 2, 8, 0.0),
        (33, 6, 160, 0.2),
        (9, 4, 4, 2.0),
        (0, 2, 4, 0.0),
        (5, 2, 384, 0.1),
    ],
)
def test_17_is_the_stable_sort(tokens, top_k, experts, dropped, dtype, where):
    ids = ids_of(tokens, top_k, experts, where, dropped).to(dtype)
    with poisoned():
        plan = tilefuse.moe_plan(ids, experts)
    for actual, expected in zip(plan, by_hand(ids, experts), strict=True):
        assert_bit_equal(actual.cpu(), expected)


@pytest.mark.parametrize("experts", [3, 257])
def test_17_many_slots(experts, where):
    """Past the size at which kernels work in chunks."""
    ids = torch.randint(-1, experts + 1, (4000, 4), dtype=torch.int32, device=where)
    order, inverse, offsets = tilefuse.moe_plan(ids, experts)
    with tilefuse.backend("reference"):
        for actual, expected in zip((order, inverse, offsets), tilefuse.moe_plan(ids, experts)):
            assert_bit_equal(actual, expected)
    kept = int(offsets[-1])
    assert (offsets[1:] >= offsets[:-1]).all() and offsets[0] == 0
    assert torch.equal(order.long().sort().values, torch.arange(16000, device=where))
    assert torch.equal(inverse[order[:kept].long()].long(), torch.arange(kept, device=where))
    assert (inverse[order[kept:].long()] == -1).all()


def test_3_all_to_one_expert(where):
    order, inverse, offsets = tilefuse.moe_plan(torch.full((300, 2), 5, dtype=torch.int32, device=where), 8)
    assert torch.equal(order.cpu(), torch.arange(600, dtype=torch.int32))
    assert torch.equal(inverse.cpu(), torch.arange(600, dtype=torch.int32))
    assert offsets.tolist() == [0] * 6 + [600] * 3


def test_10_hostile_ids(where):
    ids = torch.tensor([[2**40, -(2**40)], [1, 2**32], [0, 3]], dtype=torch.int64, device=where)
    order, inverse, offsets = tilefuse.moe_plan(ids, 3)
    assert order.tolist() == [4, 2, 0, 1, 3, 5]
    assert inverse.tolist() == [-1, -1, 1, -1, 0, -1]
    assert offsets.tolist() == [0, 1, 2, 2]


def test_13_repeatable(where, repeats):
    ids = ids_of(50, 4, 16, where, dropped=0.1)
    first = tilefuse.moe_plan(ids, 16)
    for _ in range(repeats(where)):
        for a, b in zip(tilefuse.moe_plan(ids, 16), first):
            assert_bit_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_15_cuda_graph_replay_with_other_routing(backend, assert_replays):
    logits = torch.randn(40, 8, device="cuda")

    def step():
        weights, ids = tilefuse.moe_route(logits, top_k=2)
        return weights, ids, *tilefuse.moe_plan(ids, 8)

    routings = torch.randn(3, 40, 8)
    for routing, empty in zip(routings, ([], [0, 3, 7], [0, 1, 2, 3, 4, 5])):
        routing[:, empty] = -30.0
    with tilefuse.backend(backend):
        assert_replays(step, logits, routings)


def test_strides(where):
    ids = ids_of(12, 4, 6, where)
    for view in (ids[:, :2], ids.T, ids[::2]):
        for a, b in zip(tilefuse.moe_plan(view, 6), tilefuse.moe_plan(view.contiguous(), 6)):
            assert_bit_equal(a, b)


def test_16_compile():
    compiled = torch.compile(tilefuse.moe_plan, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 11):
        ids = ids_of(tokens, 2, 8)
        for a, b in zip(compiled(ids, 8), tilefuse.moe_plan(ids, 8)):
            assert_bit_equal(a, b)


I = torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (ValueError, r"moe_plan: ids must be \[T, k\] int32 or int64, got \[2\] int32", (I[0], 4)),
        (TypeError, "ids must be int32 or int64, got", (I.float(), 4)),
        (ValueError, "num_experts must be >= 1, got 0", (I, 0)),
        (ValueError, r"ids must be \[T, k\] with T \* k < 2\^31", (I[:1, :1].expand(2**16, 2**15), 4)),
    ],
)
def test_errors(error, match, args):
    for call in (tilefuse.moe_plan, torch.ops.tilefuse.moe_plan):
        with pytest.raises(error, match=match):
            call(*args)
