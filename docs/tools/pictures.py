"""The pictures of the documentation, each drawn from what the real functions return.

A function ``name`` makes ``pictures/name.svg`` (``-`` for ``_``). None of them knows a rule that it could get wrong:
masks, layouts and orders are read off the ops' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

import tilefuse
from tilefuse import fp8_layout
from tilefuse.ops.mla.layout import GROUP, RowLayout

plt.switch_backend("Agg")
# the same text gives the same file
plt.rcParams["svg.hashsalt"] = "tilefuse"
plt.rcParams["font.size"] = 9

SEEN = ListedColormap(["#f3f3f3", "#1b6ca8"])
PART_COLOURS = {"latent": "#1b6ca8", "scale": "#e08e45", "rope": "#3d9970"}


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _grid(axes: Any, mask: Tensor, title: str, cmap: Any = SEEN, vmax: float = 1.0) -> None:
    axes.imshow(mask.numpy(), cmap=cmap, vmin=0, vmax=vmax, interpolation="nearest")
    rows, columns = mask.shape
    axes.set_xticks(range(0, columns, 4))
    axes.set_yticks(range(0, rows, 4))
    # two collections: minor ticks as a grid take ten times as long
    axes.vlines([x + 0.5 for x in range(columns - 1)], -0.5, rows - 0.5, color="white", linewidth=0.6)
    axes.hlines([y + 0.5 for y in range(rows - 1)], -0.5, columns - 0.5, color="white", linewidth=0.6)
    axes.tick_params(length=0, labelsize=7)
    axes.set_title(title, fontsize=9)


def visible(attend: Callable[[Tensor, Tensor, Tensor], Tensor], queries: int, keys: int) -> Tensor:
    """bool [queries, keys]: which keys an attention op lets each query see.

    All scores are equal and the values are the unit vectors, so that an output is non-zero exactly at the keys seen.
    """
    q, k = torch.zeros(1, queries, 1, 16), torch.zeros(1, keys, 1, 16)
    return attend(q, k, torch.eye(keys)[None, :, None])[0, :, 0] != 0


def window_mask(size: Sequence[int], queries: int = 16, keys: int = 16, **options: Any) -> Tensor:
    return visible(lambda q, k, v: tilefuse.window_attention(q, k, v, window=tuple(size), **options)[0], queries, keys)


def attention_windows() -> Any:
    panels = [
        ("window=(-1, 0)\ncausal", window_mask((-1, 0))),
        ("window=(3, 0)\nthe last 4 keys", window_mask((3, 0))),
        ("window=(3, 3)\nboth sides", window_mask((3, 3))),
        ("window=(3, 0), sink_tokens=2\nStreamingLLM", window_mask((3, 0), sink_tokens=2)),
        ("window=(2, 2), dilation=3\nevery third key", window_mask((2, 2), dilation=3)),
        ("window=(3, 0), 8 queries, 16 keys\nbottom-right aligned", window_mask((3, 0), 8, 16)),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.6), layout="constrained")
    for ax, (title, mask) in zip(axes.flat, panels):
        _grid(ax, mask, title)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return figure


def attention_global() -> Any:
    index = torch.tensor([[0, 9]])

    def masked(**options: Any) -> Tensor:
        return visible(lambda q, k, v: tilefuse.global_attention(q, k, v, index, window=(2, 2), **options)[0], 16, 16)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key_mask = torch.arange(16)[None] < 13
        return tilefuse.global_attention(q, k, v, index, None, None, None, key_mask, window=(2, 2))[0]

    panels = [
        ("window=(2, 2), globals 0 and 9", masked()),
        ("the same, causal=True", masked(causal=True)),
        ("the last 3 tokens are padding", visible(padded, 16, 16)),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.0), layout="constrained")
    for ax, (title, mask) in zip(axes, panels):
        _grid(ax, mask, title)
        ax.set_xlabel("key", fontsize=8)
    axes[0].set_ylabel("query", fontsize=8)
    return figure


def attention_blocks() -> Any:
    tokens = 16 * 64
    kinds = [
        ("window", {"window": (128, 128)}),
        ("longformer", {"window": (64, 64), "global_blocks": (0, 5)}),
        ("bigbird", {"num_random": 2}),
        ("strided", {"stride": 4, "causal": True}),
        ("fixed", {"stride": 4, "summary": 1, "causal": True}),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.8), layout="constrained")
    for ax, (kind, options) in zip(axes.flat, kinds):
        pattern = tilefuse.block_pattern(kind, tokens, tokens, **options)
        _grid(ax, pattern.to_dense()[0, 0].float(), f'"{kind}": {pattern.density:.0%} of all blocks')
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < 0.2
    pattern = tilefuse.block_pattern("from_mask", tokens, tokens, mask=mask)
    _grid(axes.flat[-1], pattern.to_dense()[0, 0].float(), f'"from_mask": {pattern.density:.0%} of all blocks')
    figure.supxlabel("block of 64 keys", fontsize=9)
    figure.supylabel("block of 64 queries", fontsize=9)
    return figure


def rope_pairs() -> Any:
    """Which input dims each output dim depends on: the op applied to unit vectors."""
    dim = 16

    def matrix(rotary_dim: int, **options: Any) -> Tensor:
        cos, sin = tilefuse.rope_tables(rotary_dim, 2, base=4.0)
        # token p, dim p of the identity; all of them at position 1
        x = torch.eye(dim)[:, None]
        positions = torch.ones(dim, dtype=torch.int32)
        return tilefuse.rope(x, cos, sin, positions, **options)[:, 0].t().abs()

    panels = [
        ("default: pairs (i, i + R / 2)", matrix(16)),
        ("interleaved=True: pairs (2i, 2i + 1)", matrix(16, interleaved=True)),
        ("R = 8, rotary_offset=8\n(the tail, as in MLA)", matrix(8, rotary_offset=8)),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), layout="constrained")
    for ax, (title, weights) in zip(axes, panels):
        _grid(ax, weights, title, cmap="Blues")
        ax.set_xlabel("input dim", fontsize=8)
    axes[0].set_ylabel("output dim", fontsize=8)
    return figure


def rope_angles() -> Any:
    """Error of tables built from float32 angles, against exact ones."""
    figure, ax = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    dim, base = 128, 500000.0
    lengths = [2**n for n in range(8, 18)]
    for name, dtype, colour in (("float64", torch.float64, "#1b6ca8"), ("float32", torch.float32, "#b03a2e")):
        cos, _ = tilefuse.rope_tables(dim, lengths[-1], base=base, angle_dtype=dtype)
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        errors = []
        for length in lengths:
            position = torch.arange(length - 128, length, dtype=torch.float64)
            exact = torch.cos(position[:, None] * frequency)
            errors.append(float((cos[length - 128 : length].double() - exact).abs().max()))
        ax.plot(lengths, errors, "o-", color=colour, markersize=4, label=f"angle_dtype={name}")
    ax.set(xscale="log", yscale="log", xlabel="position", ylabel="largest error of cos")
    ax.set_xticks(lengths[::3], [f"{n}" for n in lengths[::3]], minor=False)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def fp8_scale_layout() -> Any:
    """Where each scale of a 6 x 512 activation lies in memory, in each library's layout."""
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    _, own = tilefuse.fp8_quantize(x, scale_format="pow2")
    _, square = tilefuse.fp8_quantize(torch.randn(512, 300), block=(128, 128))
    panels = [
        ("tilefuse and DeepGEMM, (1, 128)\nrows contiguous, padded to 8", own),
        ("torch scaled_mm, (1, 128)\nrows contiguous, not padded", fp8_layout.to_scaled_mm(own)),
        ("tilefuse and Hugging Face, (128, 128)\nrow-major", square),
        ("torch scaled_mm, (128, 128)\nK-blocks padded to 4", fp8_layout.to_scaled_mm(square, (128, 128)).t()),
    ]
    assert fp8_layout.to_deepgemm(own).stride() == own.stride()
    assert fp8_layout.to_huggingface(square).stride() == square.stride()
    figure, axes = plt.subplots(1, 4, figsize=(8.8, 3.2), layout="constrained")
    for ax, (title, scale) in zip(axes, panels):
        rows, columns = scale.shape
        place = torch.tensor([[i * scale.stride(0) + j * scale.stride(1) for j in range(columns)] for i in range(rows)])
        ax.imshow(place.numpy(), cmap="Blues", vmin=-4, vmax=2 * int(place.max()))
        for i in range(rows):
            for j in range(columns):
                ax.text(j, i, str(int(place[i, j])), ha="center", va="center", fontsize=8)
        ax.set_xticks(range(columns))
        ax.set_yticks(range(rows))
        ax.tick_params(length=0, labelsize=7)
        ax.set_title(title, fontsize=7.5)
        ax.set_xlabel("block of 128 along K", fontsize=7.5)
    axes[0].set_ylabel("row, or block of rows", fontsize=8)
    return figure


def fp8_outlier() -> Any:
    """Error of e4m3 codes with one scale per 128 elements, and with one for the whole row."""
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
    x[0, 300] = 3e4
    q, scale = tilefuse.fp8_quantize(x)
    blocked = tilefuse.fp8_dequantize(q, scale, out_dtype=torch.float32)
    largest = x.abs().max() / 448
    whole = (x / largest).to(torch.float8_e4m3fn).float() * largest
    figure, ax = plt.subplots(figsize=(7.4, 2.6), layout="constrained")
    for i, (name, y, colour) in enumerate(
        (("one scale per row", whole, "#b03a2e"), ("one scale per block: (1, 128)", blocked, "#1b6ca8"))
    ):
        # the outlier itself is exact enough in both; what matters are its neighbours
        error, size = (y - x).where(x.abs() < 1e4, 0), x.where(x.abs() < 1e4, 0)
        rms = (
            error.unflatten(1, (8, 128)).square().mean(-1).sqrt() / size.unflatten(1, (8, 128)).square().mean(-1).sqrt()
        )
        ax.bar([block + 0.38 * (i - 0.5) for block in range(8)], rms[0], width=0.36, color=colour, label=name)
    ax.set(
        yscale="log", xlabel="block of 128 elements (block 2 holds an outlier of 30000)", ylabel="relative RMS error"
    )
    ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def moe_plan_order() -> Any:
    """Slots by token and choice, and the same slots as moe_plan orders them."""
    ids = torch.tensor([[2, 0], [1, 2], [0, 2], [2, -1], [1, 0], [2, 1]], dtype=torch.int32)
    order, inverse, offsets = tilefuse.moe_plan(ids, 3)
    colours = ["#1b6ca8", "#e08e45", "#3d9970"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.4, 3.4), layout="constrained", height_ratios=(1, 1.25))

    def box(ax: Any, x: int, expert: int, text: str) -> None:
        dropped = not 0 <= expert < 3
        ax.add_patch(plt.Rectangle((x, 0), 0.94, 1, color="#dddddd" if dropped else colours[expert]))
        ax.text(x + 0.47, 0.5, text, ha="center", va="center", fontsize=8, color="black" if dropped else "white")

    flat = ids.flatten().tolist()
    for slot, expert in enumerate(flat):
        box(top, slot, expert, f"slot {slot}\nexpert {expert}" if expert >= 0 else f"slot {slot}\ndropped")
    for token in range(ids.shape[0]):
        top.text(2 * token + 0.97, 1.2, f"token {token}", ha="center", fontsize=8)
    for row, slot in enumerate(order.tolist()):
        box(bottom, row, flat[slot], f"slot {slot}\ntoken {slot // 2}")
        assert inverse[slot] == (row if flat[slot] >= 0 else -1)
    for expert, at in enumerate(offsets.tolist()):
        bottom.plot([at - 0.03] * 2, [-0.25, 1.25], color="black", linewidth=1.2)
        bottom.text(at - 0.03, -0.6, f"offsets[{expert}] = {at}", ha="center", fontsize=8)
    top.set_title("ids [T, k]: two choices of six tokens", fontsize=9, loc="left", pad=16)
    bottom.set_title("order: the rows that the experts work on", fontsize=9, loc="left")
    for ax in (top, bottom):
        ax.set_xlim(-0.6, 12.6)
        ax.axis("off")
    top.set_ylim(0, 1.4)
    bottom.set_ylim(-0.8, 1.3)
    return figure


def moe_groups() -> Any:
    """Group-limited routing of one token: which experts compete."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 32, generator=generator)
    options = {"score": "sigmoid", "n_group": 8, "topk_group": 3, "group_score": "top2"}
    _, ids = tilefuse.moe_route(logits, top_k=4, **options)
    # every expert of the groups that compete: as many choices as they hold
    _, competing = tilefuse.moe_route(logits, top_k=12, **options)
    scores = logits.sigmoid()[0]
    chosen, allowed = set(ids[0].tolist()), set(competing[0].tolist())
    colours = ["#1b6ca8" if e in chosen else "#9cc3e0" if e in allowed else "#dddddd" for e in range(32)]
    figure, ax = plt.subplots(figsize=(8.4, 2.6), layout="constrained")
    ax.bar(range(32), scores.tolist(), color=colours, width=0.85)
    for edge in range(4, 32, 4):
        ax.axvline(edge - 0.5, color="black", linewidth=0.6)
    ax.set(xlabel="expert (8 groups of 4)", ylabel="score")
    for name, colour in (("chosen", "#1b6ca8"), ("competes", "#9cc3e0"), ("group is out", "#dddddd")):
        ax.bar([0], [0], color=colour, label=name)
    ax.set_xlim(-0.6, 31.6)
    ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def mla_cache_rows() -> Any:
    """The bytes of one cache row in both layouts, to scale."""
    figure, axes = plt.subplots(2, 1, figsize=(8.6, 3.2), layout="constrained")
    for ax, layout in zip(axes, ("bf16", "fp8")):
        row = RowLayout(layout, 512, 64)
        unit = 1 if row.is_fp8 else 2
        total = row.width * unit
        parts = [("latent", 0, row.rank * unit, "512 e4m3 codes" if row.is_fp8 else "512 bfloat16, normed latent")]
        if row.is_fp8:
            parts.append(("scale", row.scale_offset, row.rope_offset, ""))
        parts.append(("rope", row.rope_offset * unit, total, "RoPE, 64 bf16"))
        for kind, start, end, text in parts:
            ax.add_patch(plt.Rectangle((start, 0), end - start, 1, color=PART_COLOURS[kind]))
            ax.text((start + end) / 2, 0.5, text, ha="center", va="center", color="white", fontsize=8)
        if row.is_fp8:
            for edge in range(GROUP, row.rank, GROUP):
                ax.plot([edge] * 2, [0, 1], color="white", linewidth=0.8)
            scales = f"{(row.rope_offset - row.scale_offset) // 4} float32 scales"
            ax.annotate(
                scales,
                (row.scale_offset + 8, 1),
                (row.scale_offset - 120, 1.35),
                fontsize=8,
                arrowprops={"arrowstyle": "->"},
            )
        edges = sorted({start for _, start, _, _ in parts} | {total})
        for edge in edges:
            # neighbours closer than their numbers step down
            near = any(0 < edge - other < 40 for other in edges)
            ax.text(edge, -0.5 if near else -0.22, str(edge), ha="center", fontsize=8)
        ax.set_xlim(-10, 1165)
        ax.set_ylim(-0.6, 1.7)
        ax.axis("off")
        ax.set_title(f'layout="{layout}": {total} bytes per token', fontsize=9, loc="left")
    return figure


def mla_cache_size() -> Any:
    """Bytes per token and layer of the cache, against what full keys and values would take."""
    full = 128 * (192 + 128) * 2
    sizes = [
        ("keys and values of 128 heads, bf16", full),
        ('latent row, layout="bf16"', RowLayout("bf16", 512, 64).width * 2),
        ('latent row, layout="fp8"', RowLayout("fp8", 512, 64).width),
    ]
    figure, ax = plt.subplots(figsize=(7.4, 1.6), layout="constrained")
    ax.barh([name for name, _ in sizes], [size for _, size in sizes], color=["#9a9a9a", "#1b6ca8", "#1b6ca8"])
    for i, (_, size) in enumerate(sizes):
        ax.text(size, i, f" {size} bytes", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(300, 500000)
    ax.set_xlabel("bytes per token and layer (DeepSeek-V3)")
    ax.spines[["top", "right"]].set_visible(False)
    return figure
