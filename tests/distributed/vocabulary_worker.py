"""One rank of the test of divided vocabularies, started as ``vocabulary_worker.py RANK WORLD RENDEZVOUS_FILE``."""

import sys

import torch
import torch.distributed as dist

import tilefuse
from tilefuse.distributed import vocabulary_parallel_logprobs
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.loss.linear_logprobs import case

# the last shard is ragged
VOCABULARY = 4 * 4096 - 30


def main(rank, world, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    x, weight, target, bias = case(9, VOCABULARY, 16, dtype=torch.bfloat16)
    options = {"softcap": 5.0, "temperature": 0.8}
    rows = 4 * 4096 // world
    shard = slice(rank * rows, min((rank + 1) * rows, VOCABULARY))
    whole = tilefuse.linear_logprobs(x, weight, target, bias, **options)

    stats = tilefuse.linear_logprob_stats(x, weight[shard], target, bias[shard], vocab_start=shard.start, **options)
    parts = [torch.empty_like(stats) for _ in range(world)]
    dist.all_gather(parts, stats)
    for a, b in zip(tilefuse.merge_logprobs(parts), whole):
        assert_bit_equal(a, b)

    upstream = [torch.randn(9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mine = [t.clone().requires_grad_() for t in (x, weight[shard], bias[shard])]
    out = vocabulary_parallel_logprobs(*mine[:2], target, mine[2], vocab_start=shard.start, **options)
    for a, b in zip(out, whole):
        assert_bit_equal(a.detach(), b)
    found = torch.autograd.grad(out[:3], mine, upstream)
    everything = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = tilefuse.linear_logprobs(*everything[:2], target, everything[2], **options)
    dx, dweight, dbias = torch.autograd.grad(out[:3], everything, upstream)
    assert_bit_equal(found[1], dweight[shard])
    assert_bit_equal(found[2], dbias[shard])
    if world == 1:
        assert_bit_equal(found[0], dx)
    torch.testing.assert_close(found[0], dx, rtol=2e-2, atol=2e-3 * dx.abs().max().item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
