"""Sliding-window attention in PyTorch: blocks of queries against the span of keys they can see.

Work and memory are O(S * window): per block of rows one gather of its keys and one small dense attention.
``window_mask`` is the rule itself, as a dense mask; the tests hold every backend against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import INFINITE, attend, attend_bwd, attend_bwd_bias, compute_dtype, row_delta, sink_gradient

MAX_BLOCK = 512


def window_mask(
    sq: int,
    sk: int,
    window: tuple[int, int],
    *,
    dilation: int = 1,
    sink_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees, bool [sq, sk]: the window rule, element by element."""
    left, right = window
    i = torch.arange(sq, device=device)[:, None] + (sk - sq)
    j = torch.arange(sk, device=device)[None, :]
    below_right = j <= i + right * dilation if right >= 0 else torch.ones_like(i + j, dtype=torch.bool)
    above_left = j >= i - left * dilation if left >= 0 else torch.ones_like(i + j, dtype=torch.bool)
    return below_right & ((above_left & ((i - j) % dilation == 0)) | (j < sink_tokens))


@dataclass(frozen=True)
class _Block:
    rows: slice  # into the sequence's queries
    keys: Tensor  # [n] indices into the sequence's keys
    visible: Tensor  # [m, n]
    offset: Tensor  # [m, n], from query to key

    def index(self, length: int) -> Tensor:
        """Where a table of biases by distance has those of this block, [m, n]."""
        return (length // 2 - self.offset).clamp(0, length - 1)

    def biases(self, slopes: Tensor | None, distance_bias: Tensor | None) -> dict[str, Tensor | None]:
        table = None if distance_bias is None else distance_bias[:, self.index(distance_bias.shape[1])]
        return {"slopes": slopes, "distance": self.offset.abs(), "bias": table}


def _blocks(
    sq: int, sk: int, left: int, right: int, dilation: int, sink_tokens: int, device: torch.device
) -> Iterator[_Block]:
    """Blocks of one sequence. Rows of a block share a residue class, so that no key between is touched."""
    delta = sk - sq
    far = sq + sk
    left, right = (left if left >= 0 else far), (right if right >= 0 else far)
    span = min(left + right + 1, sk)
    size = min(max(span // 2, 64), MAX_BLOCK)
    sinks = torch.arange(min(sink_tokens, sk), device=device)
    for residue in range(dilation):
        first = (residue - delta) % dilation
        count = len(range(first, sq, dilation))
        for start in range(0, count, size):
            stop = min(start + size, count)
            rows = slice(first + start * dilation, first + (stop - 1) * dilation + 1, dilation)
            at = torch.arange(rows.start, rows.stop, dilation, device=device) + delta
            low = int(rows.start) + delta - left * dilation
            high = int(rows.stop) - 1 + delta + right * dilation
            # the first key of this class that is neither before the band nor a sink token
            low = max(low, sink_tokens, 0)
            low += (residue - low) % dilation
            band = torch.arange(low, max(min(high + 1, sk), low), dilation, device=device)
            keys = torch.cat([sinks, band])
            offset = keys[None, :] - at[:, None]
            visible = offset <= right * dilation
            visible &= (offset >= -left * dilation) | (keys < sink_tokens)[None, :]
            yield _Block(rows, keys, visible, offset)


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Token ranges of each sequence; a batch of equal lengths is one sequence with a batch dimension."""
    if cu_q is None:
        yield slice(0, q.shape[1]), slice(0, k.shape[1])
        return
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(bounds_q) - 1):
        yield _clamped(bounds_q, b, q.shape[1]), _clamped(bounds_k, b, k.shape[1])


def _clamped(bounds: list[int], b: int, total: int) -> slice:
    start = min(max(bounds[b], 0), total)
    return slice(start, min(max(bounds[b + 1], start), total))


def window_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    distance_bias: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    scale: float,
    softcap: float,
    sink_tokens: int,
) -> tuple[Tensor, Tensor]:
    packed = q.dim() == 3
    if packed:
        q, k, v = q[None], k[None], v[None]
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -INFINITE, dtype=compute_dtype(q))
    for tokens_q, tokens_k in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        qs, ks, vs = q[:, tokens_q], k[:, tokens_k], v[:, tokens_k]
        for block in _blocks(qs.shape[1], ks.shape[1], left, right, dilation, sink_tokens, q.device):
            rows, row_lse = attend(
                qs[:, block.rows],
                ks[:, block.keys],
                vs[:, block.keys],
                block.visible,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                **block.biases(alibi_slopes, distance_bias),
            )
            out[:, tokens_q][:, block.rows] = rows.to(out.dtype)
            lse[:, :, tokens_q][:, :, block.rows] = row_lse
    return (out[0], lse[0]) if packed else (out, lse)


def window_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(q)
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, row_delta(dout, out, dlse, dtype))
    # [B, S, H, D], a batch of 1 where packed
    dq, dk, dv = (torch.zeros((1,) * (4 - x.dim()) + x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for call in _backward_calls(dout, dlse, q, k, v, out, lse, *options):
        grads = attend_bwd(*call.tensors, **call.options)
        dq[:, call.tokens_q][:, call.block.rows] = grads[0]
        dk[:, call.tokens_k].index_add_(1, call.block.keys, grads[1])
        dv[:, call.tokens_k].index_add_(1, call.block.keys, grads[2])
    return *(g.to(x.dtype).view(x.shape) for g, x in zip((dq, dk, dv), (q, k, v))), dsinks


def window_attention_bwd_bias(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *options: Any,
) -> Tensor:
    """Sums of the biased scores' gradients along their diagonals; an end has all that lies past it."""
    distance_bias = options[3]
    length = distance_bias.shape[1]
    dbias = torch.zeros(distance_bias.shape[::-1], dtype=compute_dtype(q), device=q.device)
    for call in _backward_calls(dout, dlse, q, k, v, out, lse, *options):
        ds = attend_bwd_bias(*call.tensors, **call.options).flatten(1).t()
        # adds in a fixed order, which index_add_ does not
        index = call.block.index(length).flatten()
        dbias += torch.ops.aten.embedding_dense_backward(ds.contiguous(), index, length, -1, False)
    return dbias.t().to(distance_bias.dtype).contiguous()


@dataclass(frozen=True)
class _BackwardCall:
    """What the backward of one block of one sequence takes."""

    tokens_q: slice
    tokens_k: slice
    block: _Block
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]


def _backward_calls(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    distance_bias: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    scale: float,
    softcap: float,
    sink_tokens: int,
) -> Iterator[_BackwardCall]:
    delta = row_delta(dout, out, dlse, compute_dtype(q))
    if q.dim() == 3:
        q, k, v, dout, lse, delta = q[None], k[None], v[None], dout[None], lse[None], delta[None]
    for tokens_q, tokens_k in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        qs, ks, vs = q[:, tokens_q], k[:, tokens_k], v[:, tokens_k]
        for block in _blocks(qs.shape[1], ks.shape[1], left, right, dilation, sink_tokens, q.device):
            tensors = (
                dout[:, tokens_q][:, block.rows],
                delta[:, :, tokens_q][:, :, block.rows],
                qs[:, block.rows],
                ks[:, block.keys],
                vs[:, block.keys],
                lse[:, :, tokens_q][:, :, block.rows],
                block.visible,
            )
            options = {"scale": scale, "softcap": softcap, **block.biases(alibi_slopes, distance_bias)}
            yield _BackwardCall(tokens_q, tokens_k, block, tensors, options)
