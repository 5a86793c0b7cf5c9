"""One rank of the expert-parallel tests: runs every case and writes ``{case: "" or traceback}`` as JSON.

Started by test_expert_parallel.py as ``worker.py RANK WORLD RENDEZVOUS_FILE RESULT_FILE [CASE]``.
"""

import datetime
import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tilefuse
from tilefuse.distributed import ExpertParallel, exclude_experts
from tilefuse.nn import MoE
from tilefuse.testing import assert_close

EXPERTS, HIDDEN, INNER, TOP_K = 8, 24, 16, 3


def layer(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator).mul(0.2).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator).mul(0.2).to(dtype)
    return gate_up, down


def tokens(seed, counts, dtype=torch.float32, experts=None):
    """The tokens of every rank, made alike everywhere so that each rank can check itself."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rank, count in enumerate(counts):
        x = torch.randn(count, HIDDEN, generator=generator).to(dtype)
        scores = torch.rand(count, EXPERTS, generator=generator)
        if experts is not None:
            scores[:, [e for e in range(EXPERTS) if e not in experts[rank]]] = -1.0
        weights, ids = scores.topk(TOP_K)
        made.append((x, weights.contiguous(), ids.to(torch.int32)))
    return made


def run_experts(gate_up, down):
    def experts(rows, ids):
        ones = torch.ones(rows.shape[0], 1)
        return tilefuse.moe_experts(rows, gate_up, down, ones, ids)

    return experts


def loop(x, gate_up, down, weights, ids):
    """The expert loop that models run eagerly, in x's dtype."""
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, slot = torch.where(ids == e)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, -1)
        out = out.index_add(0, token, ((F.silu(gate) * up) @ down[e].T) * weights[token, slot, None])
    return out


def check(counts, *, dtype=torch.float32, capacity=None, experts=None, exact=True):
    """Outputs and all gradients of the parallel layer against the single-process layer on every rank's tokens."""
    rank, world = dist.get_rank(), dist.get_world_size()
    local = EXPERTS // world
    gate_up, down = layer(1, dtype)
    everyone = tokens(2, counts, dtype, experts)
    x, weights, ids = everyone[rank]
    mine = [t.clone().requires_grad_() for t in (x, weights)]
    shard = [w[rank * local : (rank + 1) * local].clone().requires_grad_() for w in (gate_up, down)]
    parallel = ExpertParallel(EXPERTS, capacity=capacity)
    out = parallel(*mine, ids, run_experts(*shard))

    whole = [w.clone().requires_grad_() for w in (gate_up, down)]
    x_ref, weights_ref = (t.clone().requires_grad_() for t in (x, weights))
    expected = tilefuse.moe_experts(x_ref, *whole, weights_ref, ids)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3 + rank)).to(dtype)
    out.backward(grad)
    expected.backward(grad)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(out, expected, **tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(mine[0].grad, x_ref.grad)
        torch.testing.assert_close(mine[1].grad, weights_ref.grad)
        # the weights of an expert see the tokens of all ranks
        for shard_weight, single in zip(shard, whole):
            total = single.grad.clone()
            dist.all_reduce(total)
            here = total[rank * local : (rank + 1) * local]
            torch.testing.assert_close(shard_weight.grad, here, rtol=1e-4, atol=1e-5)
        return
    results = []
    for wide in (torch.float64, dtype):
        leaves = [t.to(wide, copy=True).requires_grad_() for t in (x, gate_up, down, weights)]
        loop(*leaves, ids).backward(grad.to(wide))
        grads = [leaf.grad for leaf in leaves]
        for i in (1, 2):
            dist.all_reduce(grads[i])
            grads[i] = grads[i][rank * local : (rank + 1) * local]
        results.append(grads)
    for ours, right, naive in zip((mine[0], *shard, mine[1]), *results):
        assert_close(ours.grad, right, naive, rows=False)


def case_uneven():
    check([5 + 3 * r for r in range(dist.get_world_size())])


def case_equal_counts():
    check([6] * dist.get_world_size())


def case_rank_without_tokens():
    check([0 if r == 1 else 7 for r in range(dist.get_world_size())])


def case_no_tokens_at_all():
    check([0] * dist.get_world_size())


def case_rank_that_receives_nothing():
    # every token goes to experts that rank 0 owns
    world = dist.get_world_size()
    first = range(max(EXPERTS // world, TOP_K))
    check([4] * world, experts=[first] * world)


def case_capacity_large_enough():
    check([5] * dist.get_world_size(), capacity=5 * TOP_K)


def case_capacity_drops_later_slots():
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weights, ids = tokens(4, [9] * world)[rank]
    gate_up, down = layer(1)
    local = EXPERTS // world
    capacity = 4
    parallel = ExpertParallel(EXPERTS, capacity=capacity)
    out = parallel(x, weights, ids, run_experts(gate_up[rank * local :][:local], down[rank * local :][:local]))
    # the same by hand: slots of one destination in the order of the plan, the first `capacity` survive
    kept = ids.clone()
    order, _, _ = tilefuse.moe_plan(ids, EXPERTS)
    seen = [0] * world
    for flat in order.tolist():
        owner = int(ids.view(-1)[flat]) // local
        seen[owner] += 1
        if seen[owner] > capacity:
            kept.view(-1)[flat] = -1
    assert (kept == -1).any()
    torch.testing.assert_close(out, tilefuse.moe_experts(x, gate_up, down, weights, kept), rtol=0, atol=0)


def case_dropped_ids():
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weights, ids = tokens(5, [6] * world)[rank]
    ids[0] = -1
    ids[1, 1] = EXPERTS
    x[0] = float("nan")
    gate_up, down = layer(1)
    local = EXPERTS // world
    for capacity in (None, 6 * TOP_K):
        parallel = ExpertParallel(EXPERTS, capacity=capacity)
        out = parallel(x, weights, ids, run_experts(gate_up[rank * local :][:local], down[rank * local :][:local]))
        torch.testing.assert_close(out, tilefuse.moe_experts(x, gate_up, down, weights, ids), rtol=0, atol=0)
        assert (out[0] == 0).all()


def case_fp8_payload():
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = tokens(6, [5] * world)
    codes = [x.to(torch.float8_e4m3fn) for x, _, _ in everyone]
    for capacity in (None, 5 * TOP_K):
        got = ExpertParallel(EXPERTS, capacity=capacity).dispatch(codes[rank], everyone[rank][2])
        assert got.x.dtype == torch.float8_e4m3fn
        local = EXPERTS // world
        expected = []
        for source in range(world):
            ids = everyone[source][2]
            for expert in range(rank * local, (rank + 1) * local):
                for token in range(ids.shape[0]):
                    expected += [(expert - rank * local, codes[source][token])] * int((ids[token] == expert).sum())
        used = got.ids[:, 0] >= 0
        assert got.ids[used, 0].tolist() == [e for e, _ in expected]
        rows = torch.stack([c.view(torch.uint8) for _, c in expected]) if expected else torch.empty(0, HIDDEN)
        assert torch.equal(got.x[used].view(torch.uint8), rows.to(torch.uint8))


def case_router_gradient_reaches_weights():
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weights, ids = tokens(7, [4] * world)[rank]
    weights.requires_grad_()
    gate_up, down = layer(1)
    local = EXPERTS // world
    out = ExpertParallel(EXPERTS)(
        x, weights, ids, run_experts(gate_up[rank * local :][:local], down[rank * local :][:local])
    )
    out.sum().backward()
    reference = F.normalize(weights.grad, dim=-1)
    assert torch.isfinite(reference).all() and weights.grad.abs().sum() > 0


def case_bfloat16():
    check([5 + 3 * r for r in range(dist.get_world_size())], dtype=torch.bfloat16)


def case_gradient_of_dispatch_is_one_rounded_sum():
    """The gradients of a token's rows are summed in float32 in slot order, as ``moe_combine`` sums, not in bf16."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, _, ids = tokens(11, [9] * world, torch.bfloat16)[rank]
    local = EXPERTS // world
    for capacity in (None, 9 * TOP_K, 4):
        leaf = x.clone().requires_grad_()
        got = ExpertParallel(EXPERTS, capacity=capacity).dispatch(leaf, ids)
        got.x.backward((got.x.detach().float() * (1 + 0.37 * (got.ids + rank * local))).bfloat16())
        expected = torch.zeros(x.shape)
        for j in range(TOP_K):
            row = (x.float() * (1 + 0.37 * ids[:, j, None])).bfloat16().float()
            expected += torch.where((got.inverse.view(ids.shape)[:, j, None] >= 0), row, 0.0)
        torch.testing.assert_close(leaf.grad, expected.bfloat16(), rtol=0, atol=0)


# float32 sums in an order that depends on timing, on a GPU
ATOMIC = (torch.ops.aten.index_add, torch.ops.aten.scatter_add, torch.ops.aten.index_add_, torch.ops.aten.scatter_add_)


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operations would wait for values on the host, and which would add atomically."""

    def __init__(self):
        super().__init__()
        self.waits, self.atomic = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # indexing has the tag for boolean masks alone
        integers = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
        if torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags and not integers
        ):
            self.waits.add(func)
        if func.overloadpacket in ATOMIC:
            self.atomic.add(func)
        return func(*args, **kwargs or {})


def case_no_host_reads_with_capacity_and_no_atomics():
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weights, ids = tokens(12, [5] * world)[rank]
    leaves = [t.requires_grad_() for t in (x, weights)]
    for capacity in (5 * TOP_K, None):
        parallel = ExpertParallel(EXPERTS, capacity=capacity)
        with _Watch() as watch:
            dispatched = parallel.dispatch(x, ids)
            torch.autograd.grad(parallel.combine(dispatched.x.square(), weights, dispatched).sum(), leaves)
        assert not watch.atomic, watch.atomic
        # the exact variant needs the counts
        assert bool(watch.waits) == (capacity is None), watch.waits


def case_arguments():
    world = dist.get_world_size()
    for arguments, kwargs, message in [
        ((world + 1,), {}, "num_experts must be a positive multiple"),
        ((0,), {}, "num_experts must be a positive multiple"),
        ((world,), {"capacity": 0}, "capacity must be at least 1"),
    ]:
        try:
            ExpertParallel(*arguments, **kwargs)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no ValueError for {arguments} {kwargs}")
    x, weights, ids = tokens(8, [3] * world)[dist.get_rank()]
    parallel = ExpertParallel(EXPERTS)
    for call in (lambda: parallel.dispatch(x, ids[:2]), lambda: parallel.dispatch(x, ids[:, 0])):
        try:
            call()
        except ValueError as error:
            assert "ids must be [T, k]" in str(error), error
        else:
            raise AssertionError("no ValueError for ids of a wrong shape")
    dispatched = parallel.dispatch(x, ids)
    try:
        parallel.combine(x.new_zeros(dispatched.x.shape[0] + 1, 2), weights, dispatched)
    except ValueError as error:
        assert "y must be" in str(error), error
    else:
        raise AssertionError("no ValueError for y of a wrong shape")


class Model(nn.Module):
    """A dense layer, then experts; the same on every rank but for the experts of ``parallel``."""

    def __init__(self, parallel=None):
        super().__init__()
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(HIDDEN, INNER, EXPERTS, TOP_K, correction_bias=True, parallel=parallel, initializer_range=0.2)
        self.dense.weight.data = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(6))
        self.dense.bias.data.zero_()
        self.moe.reset_parameters(torch.Generator().manual_seed(7))

    def forward(self, x):
        return self.moe(self.dense(x))


def case_data_parallel_around_experts():
    """Every gradient is that of the mean of the ranks' losses, and no rank's experts are another's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = [x for x, _, _ in tokens(13, [5 + 3 * r for r in range(world)])]
    model = Model(ExpertParallel(EXPERTS, average_gradients=True))
    names = exclude_experts(model)
    assert names == ["moe.experts.gate_up_proj", "moe.experts.down_proj"], names
    ddp = DistributedDataParallel(model)
    ddp(everyone[rank]).square().mean().backward()

    alone = Model()
    torch.stack([alone(x).square().mean() for x in everyone]).mean().backward()
    local = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters()):
        part = local if name in names else slice(None)
        torch.testing.assert_close(ours, theirs[part], rtol=0, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad[part], rtol=1e-4, atol=1e-6)


def refused(run, message):
    try:
        run()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def case_data_parallel_that_would_be_wrong():
    rank, world = dist.get_rank(), dist.get_world_size()
    x = tokens(13, [5] * world)[rank][0]
    model = Model(ExpertParallel(EXPERTS, average_gradients=True))
    refused(lambda: DistributedDataParallel(model)(x), "call tilefuse.distributed.exclude_experts(model) before")
    model = Model(ExpertParallel(EXPERTS))
    exclude_experts(model)
    refused(lambda: DistributedDataParallel(model)(x), "average_gradients must be True")
    # each expert twice, on half of the ranks each: nobody averages them
    half = [dist.new_group(ranks) for ranks in (range(world // 2), range(world // 2, world))][rank * 2 // world]
    model = Model(ExpertParallel(EXPERTS, half, average_gradients=True))
    exclude_experts(model)
    refused(lambda: DistributedDataParallel(model)(x), "DDP's process group must have the ranks")


def case_counts_under_data_parallel():
    """Each rank keeps the counts of its own tokens over all micro-batches; the update sums them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    micro_batches = [tokens(seed, [5 + 3 * r for r in range(world)])[rank][0] for seed in (14, 15, 16)]
    alone = Model()
    for x in micro_batches:
        alone(x)
    want = alone.moe.gate.expert_counts
    ddp = DistributedDataParallel(Model())
    for x in micro_batches:
        ddp(x).sum().backward()
    gate = ddp.module.moe.gate
    assert torch.equal(gate.expert_counts, want), (gate.expert_counts, want)
    total = want.clone()
    dist.all_reduce(total)
    bias = tilefuse.moe_update_bias(torch.zeros(EXPERTS), total, rate=1e-3)
    ddp.module.moe.update_bias(1e-3, group=dist.group.WORLD)
    assert torch.equal(gate.e_score_correction_bias, bias)


def case_rank_dies():
    """Only run on its own: rank 1 leaves between two layers, the others must raise instead of waiting for ever."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weights, ids = tokens(9, [4] * world)[rank]
    gate_up, down = layer(1)
    local = EXPERTS // world
    parallel = ExpertParallel(EXPERTS, timeout=5.0)
    experts = run_experts(gate_up[rank * local :][:local], down[rank * local :][:local])
    parallel(x, weights, ids, experts)
    if rank == 1:
        os._exit(0)
    try:
        parallel(x, weights, ids, experts)
    except RuntimeError as error:
        assert f"rank {rank} of {world} failed in" in str(error), error
    else:
        raise AssertionError("a layer finished without rank 1")


def case_rank_stalls():
    """Only run on its own: rank 1 stops calling but lives; the time limit must end the wait of the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, _, ids = tokens(9, [4] * world)[rank]
    parallel = ExpertParallel(EXPERTS, timeout=2.0)
    if rank == 1:
        # long enough for the others' limit to pass
        import time

        time.sleep(6)
        return
    try:
        parallel.dispatch(x, ids)
    except RuntimeError as error:
        assert f"rank {rank} of {world} failed in dispatch" in str(error), error
    else:
        raise AssertionError("dispatch finished without rank 1")


ALONE = ("rank_dies", "rank_stalls")
CASES = {name.removeprefix("case_"): run for name, run in list(globals().items()) if name.startswith("case_")}


def main():
    rank, world, rendezvous, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    chosen = sys.argv[5:] or [name for name in CASES if name not in ALONE]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    outcome = {}
    for name in chosen:
        try:
            CASES[name]()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
            # the other ranks may be in another collective by now: nothing after this can be trusted
            break
    with open(result, "w") as file:
        json.dump(outcome, file)
    os._exit(0)


if __name__ == "__main__":
    main()
