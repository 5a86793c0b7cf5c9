"""Expert-parallel training over the processes of torchrun: each rank owns its share of the experts.

Tokens travel to the ranks that own their experts and back (``tilefuse.distributed.ExpertParallel``, all-to-all over
gloo on CPUs, NCCL on GPUs). Every rank trains on its part of each batch; what all ranks share (router, shared expert)
averages its gradients. Rank 0 then trains the same model alone on the whole batches and compares the losses.

    torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

import argparse
import os

import torch
import torch.distributed as dist

from tilefuse.distributed import ExpertParallel
from tilefuse.nn import MoE


def build(args, device, parallel=None):
    """The same weights on every rank and alone; a rank draws all experts and keeps its own."""
    moe = MoE(
        args.width,
        args.width // 2,
        args.experts,
        2,
        score="sigmoid",
        correction_bias=True,
        num_shared_experts=1,
        parallel=parallel,
        initializer_range=0.1,
        device=device,
    )
    moe.reset_parameters(torch.Generator().manual_seed(args.seed))
    return moe


def batch(args, step, device):
    """A regression that experts can share: the target depends on the region that a token lies in."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    maps = torch.randn(4, args.width, args.width, generator=generator) / args.width**0.5
    generator.manual_seed(args.seed * 1_000_003 + step)
    x = torch.randn(args.tokens, args.width, generator=generator)
    region = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x.to(device), torch.einsum("td,tde->te", x, maps[region]).tanh().to(device)


def train(args, device, parallel=None):
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world)
    moe = build(args, device, parallel)
    optimizer = torch.optim.Adam(moe.parameters(), lr=args.lr)
    losses = []
    for step in range(args.steps):
        x, target = (t.chunk(world)[rank] for t in batch(args, step, device))
        out = x + moe(x)
        # the mean over the tokens of all ranks, as far as this rank knows it
        loss = (out - target).square().sum() / (args.tokens * args.width)
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if parallel is not None:
            # experts saw the tokens of all ranks; only what every rank holds adds up its gradients
            for name, parameter in moe.named_parameters():
                if not name.startswith("experts."):
                    dist.all_reduce(parameter.grad)
            dist.all_reduce(total)
        optimizer.step()
        moe.update_bias(1e-3)
        losses.append(float(total))
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("steps", 50), ("tokens", 512), ("width", 64), ("experts", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--lr", type=float, default=5e-3, help="default 5e-3")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with: torchrun --nproc-per-node 2 examples/expert_parallel.py")
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel = ExpertParallel(args.experts)
    losses = train(args, device, parallel)
    failed = False
    if parallel.rank == 0:
        alone = train(args, device)
        print(f"{parallel.world} processes on {device.type}, {parallel.local_experts} of {args.experts} experts each")
        print("step   parallel      alone")
        for step in sorted({*range(0, args.steps, max(1, args.steps // 10)), args.steps - 1}):
            print(f"{step + 1:4d}   {losses[step]:.6f}   {alone[step]:.6f}")
        worst = max(abs(a - b) / b for a, b in zip(losses, alone))
        failed = worst > 1e-3
        print(f"largest relative difference {worst:.1e}: {'DIFFERENT' if failed else 'the same training'}")
    dist.barrier()
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
