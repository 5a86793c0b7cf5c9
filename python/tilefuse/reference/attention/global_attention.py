"""Window attention with global tokens in PyTorch: O(S * (window + G))."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import INFINITE, attend, attend_bwd, compute_dtype, row_delta
from .window_attention import _blocks


def global_positions(global_index: Tensor, key_mask: Tensor | None, length: int) -> Tensor:
    """Valid global positions [B, G] int64, ascending, each once; -1 for padding, repeats and hidden keys."""
    index = global_index.long()
    valid = (index >= 0) & (index < length)
    if key_mask is not None and length:
        valid &= key_mask.gather(1, index.clamp(0, length - 1))
    ordered = torch.where(valid, index, torch.full_like(index, length)).sort(1).values
    repeated = torch.zeros_like(valid)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated | (ordered == length), -1)


def _local(
    positions: Tensor, shown: Tensor, left: int, right: int, dilation: int, causal: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, keys, visible) of each block of local rows of one sequence; globals first, then the band."""
    length, device = shown.shape[0], shown.device
    if causal:
        right = 0
    local = shown.clone()
    local[positions] = False
    for block in _blocks(length, length, left, right, dilation, 0, device):
        rows = torch.arange(length, device=device)[block.rows]
        of_globals = torch.ones(rows.shape[0], positions.shape[0], dtype=torch.bool, device=device)
        if causal:
            of_globals &= positions[None, :] <= rows[:, None]
        visible = torch.cat([of_globals, block.visible & local[block.keys][None, :]], 1) & local[rows][:, None]
        yield block.rows, torch.cat([positions, block.keys]), visible


def _global_visible(positions: Tensor, shown: Tensor, causal: bool) -> Tensor:
    visible = shown[None, :].expand(positions.shape[0], -1)
    if causal:
        visible = visible & (torch.arange(shown.shape[0], device=shown.device)[None, :] <= positions[:, None])
    return visible


def _sequences(q: Tensor, global_index: Tensor, key_mask: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    positions = global_positions(global_index, key_mask, q.shape[1])
    for b in range(q.shape[0]):
        shown = torch.ones(q.shape[1], dtype=torch.bool, device=q.device) if key_mask is None else key_mask[b]
        yield slice(b, b + 1), positions[b][positions[b] >= 0], shown


def global_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_index: Tensor,
    q_global: Tensor | None,
    k_global: Tensor | None,
    v_global: Tensor | None,
    key_mask: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q_global, k_global, v_global = (
        a if a is not None else b for a, b in zip((q_global, k_global, v_global), (q, k, v))
    )
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -INFINITE, dtype=compute_dtype(q))
    for b, positions, shown in _sequences(q, global_index, key_mask):
        for rows, keys, visible in _local(positions, shown, left, right, dilation, causal):
            block, block_lse = attend(q[b, rows], k[b, keys], v[b, keys], visible, scale=scale)
            out[b, rows], lse[b, :, rows] = block.to(out.dtype), block_lse
        if positions.numel():
            visible = _global_visible(positions, shown, causal)
            block, block_lse = attend(q_global[b, positions], k_global[b], v_global[b], visible, scale=scale)
            out[b, positions], lse[b, :, positions] = block.to(out.dtype), block_lse
    return out, lse


def global_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    global_index: Tensor,
    q_global: Tensor | None,
    k_global: Tensor | None,
    v_global: Tensor | None,
    key_mask: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(q)
    delta = row_delta(dout, out, dlse, dtype)
    own = q, k, v
    others = tuple(a if a is not None else b for a, b in zip((q_global, k_global, v_global), own))
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in own]
    # without projections of its own a global row adds to the same gradients
    given = [a is not None for a in (q_global, k_global, v_global)]
    of_globals = [torch.zeros_like(g) if given[i] else g for i, g in enumerate(grads)]
    for b, positions, shown in _sequences(q, global_index, key_mask):
        for rows, keys, visible in _local(positions, shown, left, right, dilation, causal):
            dq, dk, dv = attend_bwd(
                dout[b, rows],
                delta[b, :, rows],
                q[b, rows],
                k[b, keys],
                v[b, keys],
                lse[b, :, rows],
                visible,
                scale=scale,
            )
            grads[0][b, rows] += dq
            grads[1][b].index_add_(1, keys, dk)
            grads[2][b].index_add_(1, keys, dv)
        if positions.numel():
            visible = _global_visible(positions, shown, causal)
            dq, dk, dv = attend_bwd(
                dout[b, positions],
                delta[b][:, :, positions],
                others[0][b, positions],
                others[1][b],
                others[2][b],
                lse[b][:, :, positions],
                visible,
                scale=scale,
            )
            of_globals[0][b, positions] += dq
            of_globals[1][b] += dk
            of_globals[2][b] += dv
    results = [g.to(x.dtype) for g, x in zip(grads, own)]
    results += [g.to(x.dtype) if there else x.new_empty(0) for g, x, there in zip(of_globals, own, given)]
    return tuple(results)
