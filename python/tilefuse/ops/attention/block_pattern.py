"""Builders of block lists for ``block_sparse_attention``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...reference.attention.block_lists import transpose_lists

__all__ = ["BlockPattern", "block_pattern"]

KINDS = ("bigbird", "longformer", "strided", "fixed", "window", "from_mask")


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which blocks of keys each block of queries sees, as CSR lists.

    ``row_offsets [B or 1, H or 1, Mb + 1]`` int32 are absolute offsets into ``col_index [nnz]`` int32. Pass both to
    ``tilefuse.block_sparse_attention``.
    """

    row_offsets: Tensor
    col_index: Tensor
    block_size: int
    seq_len_q: int
    seq_len_k: int

    @property
    def rows(self) -> int:
        return -(-self.seq_len_q // self.block_size)

    @property
    def columns(self) -> int:
        return -(-self.seq_len_k // self.block_size)

    @property
    def density(self) -> float:
        """Listed blocks (repeats included) over all blocks."""
        batch, heads, _ = self.row_offsets.shape
        return self.col_index.numel() / max(1, batch * heads * self.rows * self.columns)

    def transpose(self) -> BlockPattern:
        """The same blocks listed per block of keys. Repeats are kept; a double transpose sorts the lists."""
        offsets, rows = transpose_lists(self.row_offsets, self.col_index, self.columns)
        return BlockPattern(offsets, rows, self.block_size, self.seq_len_k, self.seq_len_q)

    def to_dense(self) -> Tensor:
        """bool ``[B or 1, H or 1, Mb, Nb]``, True where a block is listed."""
        batch, heads, _ = self.row_offsets.shape
        dense = torch.zeros(batch * heads * self.rows * self.columns, dtype=torch.bool, device=self.col_index.device)
        counts = self.row_offsets.diff(dim=-1).flatten().long()
        row = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
        dense[row * self.columns + self.col_index[: row.shape[0]].long()] = True
        return dense.view(batch, heads, self.rows, self.columns)

    def plot(self, head: int = 0, batch: int = 0, ax: Any = None) -> Any:
        """Draws the lists of one head with matplotlib: darker means listed more often. Returns the axes."""
        import matplotlib.pyplot as plt

        counts = torch.zeros(self.rows, self.columns, dtype=torch.float32, device="cpu")
        offsets = self.row_offsets[batch % self.row_offsets.shape[0], head % self.row_offsets.shape[1]].tolist()
        columns = self.col_index.tolist()
        for i in range(self.rows):
            for j in columns[offsets[i] : offsets[i + 1]]:
                counts[i, j] += 1
        if ax is None:
            side = min(8.0, 2 + self.rows / 8)
            _, ax = plt.subplots(
                figsize=(side * max(0.5, self.columns / max(1, self.rows)), side), layout="constrained"
            )
        ax.imshow(counts.numpy(), cmap="Blues", vmin=0, vmax=max(1.0, float(counts.max())), interpolation="nearest")
        ax.set_xticks([x - 0.5 for x in range(self.columns + 1)], minor=True)
        ax.set_yticks([y - 0.5 for y in range(self.rows + 1)], minor=True)
        ax.grid(which="minor", color="white", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
        ax.locator_params(integer=True)
        ax.set_xlabel(f"blocks of {self.block_size} keys")
        ax.set_ylabel(f"blocks of {self.block_size} queries")
        ax.set_title(f"{self.density:.1%} of all blocks")
        return ax


def _csr(keys: Tensor, lists: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Sorted keys (list * rows + row) * columns + column -> offsets [lists, rows + 1], columns."""
    bounds = torch.searchsorted(keys, torch.arange(lists * rows + 1, device=keys.device) * columns)
    at = torch.arange(lists, device=keys.device)[:, None] * rows + torch.arange(rows + 1, device=keys.device)
    return bounds[at].int(), (keys % columns if columns else keys).int()


def _sparse_transformer(
    kind: str,
    pairs: Callable[[Tensor, Tensor], Tensor],
    row: Tensor,
    own: Tensor,
    columns: int,
    stride: int | None,
    summary: int,
    causal: bool,
) -> Tensor:
    """Keys of the patterns of Sparse Transformer; ``own``: the block of keys that belongs to each row."""
    name = "block_pattern"
    if stride is None or stride < 1:
        errors.value_error(name, "stride", "a number of blocks >= 1", stride)
    groups = torch.arange(-(-columns // stride), device=row.device)
    if kind == "strided":
        near = torch.arange(1 - stride, 1 if causal else stride, device=row.device)
        far = own[:, None] % stride + groups * stride
        return torch.cat([pairs(row[:, None], own[:, None] + near), pairs(row[:, None], far)])
    if not 1 <= summary <= stride:
        errors.value_error(name, "summary", f"in [1, stride {stride}]", summary)
    ends = (groups[:, None] * stride + torch.arange(stride - summary, stride, device=row.device)).flatten()
    inside = torch.arange(stride, device=row.device)
    group = torch.div(own, stride, rounding_mode="floor")
    return torch.cat([pairs(row[:, None], group[:, None] * stride + inside), pairs(row[:, None], ends[None, :])])


def _bigbird(
    pairs: Callable[[Tensor, Tensor], Tensor], row: Tensor, heads: int, num_random: int, seed: int | None
) -> Tensor:
    """Keys of BigBird: three neighbours, the first and the last block, which see all, and random blocks per head."""
    rows = row.shape[0]
    near = pairs(row[1:-1, None], row[1:-1, None] + torch.arange(-1, 2, device=row.device))
    ends = pairs(row[1:-1, None], torch.tensor([0, rows - 1], device=row.device)[None, :])
    fixed = torch.cat([near, ends, pairs(row[[0, -1], None], row[None, :])]).unique()
    keys = (torch.arange(heads, device=row.device)[:, None] * rows * rows + fixed).flatten()
    if num_random > 0:
        keys = torch.cat([keys, _random_blocks(rows, rows, heads, num_random, seed, row.device)])
    return keys


def _block_mask(
    mask: Tensor | None, tokens: tuple[int, int], blocks: tuple[int, int], block_size: int, device: torch.device
) -> Tensor:
    """[B, H, rows, columns] of a mask of tokens or of blocks."""
    name = "block_pattern"
    if mask is None or mask.dim() < 2 or mask.dim() > 4 or mask.dtype != torch.bool:
        errors.value_error(name, "mask", "bool [.., Mb, Nb] or [.., Sq, Sk]", mask)
    mask = mask.to(device)
    (seq_len_q, seq_len_k), (rows, columns) = tokens, blocks
    if tuple(mask.shape[-2:]) == tokens and blocks != tokens:
        padded = torch.nn.functional.pad(mask, (0, -seq_len_k % block_size, 0, -seq_len_q % block_size))
        mask = padded.unflatten(-1, (columns, block_size)).unflatten(-3, (rows, block_size)).any(-1).any(-2)
    if tuple(mask.shape[-2:]) != blocks:
        errors.value_error(name, "mask", f"[.., {rows}, {columns}] or [.., {seq_len_q}, {seq_len_k}] bool", mask)
    return mask[(None,) * (4 - mask.dim())]


def block_pattern(
    kind: str,
    seq_len_q: int,
    seq_len_k: int,
    *,
    block_size: int = 64,
    num_heads: int = 1,
    window: Sequence[int] | None = None,
    global_blocks: Sequence[int] = (0,),
    num_random: int = 3,
    seed: int | None = 0,
    stride: int | None = None,
    summary: int = 1,
    mask: Tensor | None = None,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> BlockPattern:
    """Lists the blocks of a known sparse attention. Whole blocks are listed; cost and memory are O(listed blocks).

    Args:
        kind:
            ``"window"``: the blocks that the token window ``window`` touches, bottom-right aligned.
            ``"longformer"``: the same, and every block of ``global_blocks`` sees and is seen by all.
            ``"bigbird"``: Hugging Face's BigBird: first and last block global, three neighbours, ``num_random``
            random blocks per row and head. ``seed=None`` is its evaluation mode, where the random blocks are all
            block 0, which then counts 1 + num_random times.
            ``"strided"`` (Sparse Transformer): the last ``stride`` blocks, and every ``stride``-th one.
            ``"fixed"`` (Sparse Transformer): the own group of ``stride`` blocks, and the last ``summary`` blocks of
            every group.
            ``"from_mask"``: the blocks with any True in ``mask``.
        seq_len_q, seq_len_k: tokens; BigBird's must be equal and at least five blocks.
        block_size: tokens of a block.
        num_heads: lists per head for ``"bigbird"``; 1 shares one list among all heads.
        window: ``(left, right)`` in tokens, -1 = unbounded.
        global_blocks: for ``"longformer"``; blocks of keys, and the blocks of queries of the same number.
        num_random, seed: for ``"bigbird"``; the same seed gives the same lists on every device.
        stride, summary: in blocks.
        mask: bool ``[.., Mb, Nb]`` or ``[.., Sq, Sk]`` with up to two leading dims (batch, head).
        causal: drops the blocks that lie after all tokens of their row, bottom-right aligned.
        device: where the lists live; that of mask by default.

    The lists of a row are in ascending order, the same in every run.

    Raises:
        ValueError: an unknown kind, arguments that do not fit it, or a mask on the meta device.

    Sources: Longformer (arXiv:2004.05150), BigBird (arXiv:2007.14062), Sparse Transformer (arXiv:1904.10509).
    """
    name = "block_pattern"
    if kind not in KINDS:
        errors.value_error(name, "kind", f"one of {', '.join(KINDS)}", kind)
    for arg, value, least in (
        ("seq_len_q", seq_len_q, 0), ("seq_len_k", seq_len_k, 0), ("block_size", block_size, 1),
        ("num_heads", num_heads, 1), ("num_random", num_random, 0),
    ):  # fmt: skip
        if value < least:
            errors.value_error(name, arg, f">= {least}", value)
    rows, columns = -(-seq_len_q // block_size), -(-seq_len_k // block_size)
    if mask is not None and mask.is_meta:
        errors.value_error(name, "mask", "with values, not on the meta device", mask)
    home = torch.device(device) if device is not None else mask.device if mask is not None else torch.device("cpu")
    # the number of listed blocks depends on values, which the meta device has none of
    device = torch.device("cpu") if home.type == "meta" else home
    delta = seq_len_k - seq_len_q
    row = torch.arange(rows, device=device)
    # positions of a row's first and last token among the keys
    first = row * block_size + delta
    last = (row * block_size + block_size).clamp(max=seq_len_q) - 1 + delta
    batch, heads = 1, 1

    def pairs(r: Tensor, c: Tensor) -> Tensor:
        """Keys of the (row, column) pairs that exist."""
        r, c = torch.broadcast_tensors(r, c)
        inside = (c >= 0) & (c < columns) & (r >= 0) & (r < rows)
        return (r * columns + c)[inside]

    def band(left: int, right: int) -> Tensor:
        low = torch.zeros_like(first) if left < 0 else ((first - left).clamp(min=0) // block_size)
        high = torch.full_like(last, seq_len_k - 1) if right < 0 else (last + right).clamp(max=seq_len_k - 1)
        high = torch.div(high, block_size, rounding_mode="floor")
        counts = (high - low + 1).clamp(min=0)
        starts = counts.cumsum(0) - counts
        of_row = torch.repeat_interleave(row, counts)
        return pairs(of_row, low[of_row] + torch.arange(of_row.shape[0], device=device) - starts[of_row])

    if kind in ("window", "longformer"):
        if window is None or len(window) != 2 or min(window) < -1:
            errors.value_error(name, "window", "(left, right) in tokens, each >= -1", window)
        parts = [band(*window)]
        if kind == "longformer":
            if any(not 0 <= g < max(rows, columns) for g in global_blocks):
                errors.value_error(name, "global_blocks", f"in [0, {max(rows, columns)})", tuple(global_blocks))
            chosen = torch.tensor(sorted(set(global_blocks)), dtype=torch.long, device=device)
            parts.append(pairs(row[:, None], chosen[None, :]))
            parts.append(pairs(chosen[:, None], torch.arange(columns, device=device)[None, :]))
        keys = torch.cat(parts)
    elif kind in ("strided", "fixed"):
        # the block of keys that a row's last token lies in
        own = torch.div(last, block_size, rounding_mode="floor")
        keys = _sparse_transformer(kind, pairs, row, own, columns, stride, summary, causal)
    elif kind == "bigbird":
        if rows != columns or rows < 5:
            got = (seq_len_q, seq_len_k)
            errors.value_error(name, "seq_len_q", "seq_len_k, and at least five blocks, for bigbird", got)
        heads = num_heads
        keys = _bigbird(pairs, row, heads, num_random, seed)
    else:
        mask = _block_mask(mask, (seq_len_q, seq_len_k), (rows, columns), block_size, device)
        batch, heads = mask.shape[:2]
        keys = mask.reshape(-1).nonzero()[:, 0]

    if kind != "bigbird":
        keys = keys.unique()
    else:
        keys = keys.sort().values
    if causal and rows:
        keys = keys[keys % columns * block_size <= last[keys // columns % rows]]
    offsets, cols = _csr(keys, batch * heads, rows, columns)
    offsets, cols = offsets.view(batch, heads, rows + 1).to(home), cols.to(home)
    return BlockPattern(offsets, cols, block_size, seq_len_q, seq_len_k)


def _random_blocks(rows: int, columns: int, heads: int, count: int, seed: int | None, device: torch.device) -> Tensor:
    """BigBird's random blocks of rows 1 .. n - 2, distinct and none that the row lists anyway; keys per head."""
    inner = torch.arange(1, rows - 1, device="cpu")
    if seed is None:
        chosen = torch.zeros(heads, rows - 2, count, dtype=torch.long, device="cpu")
    else:
        # rows list {0, i - 1, i, i + 1, n - 1}: the others in order are 1 .. i - 2, i + 2 .. n - 2
        free = columns - 5 + (inner == 1).long() + (inner == rows - 2).long()
        if int(free.min()) < count:
            errors.value_error("block_pattern", "num_random", f"<= {int(free.min())} with {rows} blocks", count)
        generator = torch.Generator().manual_seed(seed)
        # Floyd's sampling: O(count^2) per row, without a permutation of all blocks
        picks: list[Tensor] = []
        for j in range(count):
            limit = free - count + j
            drawn = torch.rand(heads, rows - 2, generator=generator, dtype=torch.float64, device="cpu")
            pick = (drawn * (limit + 1)).long()
            taken = torch.zeros_like(pick, dtype=torch.bool)
            for other in picks:
                taken |= other == pick
            picks.append(torch.where(taken, limit.expand_as(pick), pick))
        rank = torch.stack(picks, -1)
        # the rank-th block that is not listed: 1 .. low - 1, then from high + 1
        low, high = (inner - 1).clamp(min=1)[:, None], (inner + 1)[:, None]
        chosen = torch.where(rank + 1 < low, rank + 1, rank + 1 + (high - low + 1))
    key = (torch.arange(heads, device="cpu")[:, None, None] * rows + inner[None, :, None]) * columns + chosen
    return key.flatten().to(device)
