"""Draws sparse attention patterns: which blocks of keys each block of queries sees.

python examples/show_pattern.py                                    # all known patterns side by side
python examples/show_pattern.py --kind bigbird --length 4096 --out bigbird.png
"""

import argparse
from pathlib import Path

import matplotlib

import tilefuse

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# a window of 3 blocks to the left, and what else each kind needs
KINDS = {
    "window": {"causal": True},
    "longformer": {"global_blocks": (0, 5)},
    "bigbird": {"num_random": 2},
    "strided": {"stride": 4, "causal": True},
    "fixed": {"stride": 4, "summary": 1, "causal": True},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), help="one pattern instead of all")
    parser.add_argument("--length", type=int, default=2048, help="tokens, default 2048")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block, default 64")
    parser.add_argument("--out", type=Path, default=Path("patterns.png"))
    args = parser.parse_args()
    kinds = [args.kind] if args.kind else list(KINDS)
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 4), layout="constrained", squeeze=False)
    for kind, ax in zip(kinds, axes[0]):
        options = dict(KINDS[kind])
        if kind in ("window", "longformer"):
            left = 3 * args.block - 1
            options["window"] = (left, 0) if options.get("causal") else (left, left)
        pattern = tilefuse.block_pattern(kind, args.length, args.length, block_size=args.block, **options)
        pattern.plot(ax=ax)
        ax.set_title(f"{kind}: {pattern.density:.0%} of all blocks")
        print(f"{kind:10s} {pattern.col_index.numel():5d} blocks listed, {pattern.density:.1%} of all")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
