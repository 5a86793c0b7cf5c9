"""Attention as a dense masked softmax: the float64 oracle, and the plain low-precision computation.

Differentiable by autograd. ``visible`` broadcasts to ``[B, Hq, Sq, Sk]``; NaN in hidden keys is kept out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....reference.attention.window_attention import window_mask
from .window_attention import normal


def upstream(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random dout, of values of ``dtype``, and dlse: the same for all functions with outputs of these shapes.

    A row without keys gets no dlse.
    """
    dout = normal(*out.shape, device=out.device, dtype=dtype, seed=11).to(out.dtype)
    dlse = normal(*lse.shape, device=out.device, seed=12).masked_fill(lse.isinf(), 0).to(lse.dtype)
    return dout, dlse


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, Dv] in q's dtype and lse [B, Hq, Sq], every product in q's dtype."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = visible.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    anyone = seen.any(2)[..., None]
    k, v = (torch.where(anyone, x, torch.zeros_like(x)) for x in (k, v))
    x = (q @ k.transpose(-1, -2)) * factor
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = x.to(wide)
    i = torch.arange(x.shape[2], device=x.device)[:, None] + (x.shape[3] - x.shape[2])
    distance = i - torch.arange(x.shape[3], device=x.device)
    if alibi_slopes is not None:
        x = x - alibi_slopes.to(wide)[:, None, None] * distance.abs()
    if distance_bias is not None:
        half = (distance_bias.shape[1] - 1) // 2
        x = x + distance_bias.to(wide)[:, (distance + half).clamp(0, 2 * half)]
    x = x.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(*x.shape[:3], 1)
        x = torch.cat([x, column], -1)
    # a row without keys: no gradient may pass through a softmax of nothing
    alive = (x > float("-inf")).any(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(alive, x, torch.zeros_like(x)), -1)
    p = torch.where(alive, torch.softmax(torch.where(alive, x, torch.zeros_like(x)), -1), torch.zeros_like(x))
    p = p[..., : v.shape[2]].to(v.dtype)
    lse = torch.where(alive[..., 0], lse, torch.full_like(lse, float("-inf")))
    return (p @ v).transpose(1, 2), lse


def dense_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    distance_bias: Tensor | None = None,
    *,
    window: tuple[int, int] = (-1, -1),
    dilation: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """``window_attention`` by a dense mask, sequence by sequence."""
    biases = {"sinks": sinks, "alibi_slopes": alibi_slopes, "distance_bias": distance_bias}
    options = {"scale": scale, "softcap": softcap, **biases}

    def mask(sq: int, sk: int) -> Tensor:
        return window_mask(sq, sk, window, dilation=dilation, sink_tokens=sink_tokens, device=q.device)

    if q.dim() == 4:
        return dense_attention(q, k, v, mask(q.shape[1], k.shape[1]), **options)
    assert cu_seqlens_q is not None
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs = [q.new_zeros(cu_q[0], q.shape[1], v.shape[2])]
    lses = [torch.full((q.shape[1], cu_q[0]), float("-inf"), dtype=wide, device=q.device)]
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        out, lse = dense_attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], mask(q1 - q0, k1 - k0), **options)
        outs.append(out[0])
        lses.append(lse[0])
    rest = q.shape[0] - cu_q[-1]
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    lses.append(torch.full((q.shape[1], rest), float("-inf"), dtype=wide, device=q.device))
    return torch.cat(outs), torch.cat(lses, 1)


def dense_global(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_index: Tensor,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    window: tuple[int, int],
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``global_attention`` by two dense masks: local rows, then global rows over them."""
    batch, length = q.shape[:2]
    shown = torch.ones(batch, length, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    is_global = torch.zeros_like(shown)
    for b in range(batch):
        for g in global_index[b].tolist():
            if 0 <= g < length and shown[b, g]:
                is_global[b, g] = True
    band = window_mask(length, length, (window[0], 0) if causal else window, dilation=dilation, device=q.device)
    order = torch.ones(length, length, dtype=torch.bool, device=q.device)
    if causal:
        order = order.tril()
    local_rows = shown & ~is_global
    visible = order & (band | is_global[:, None, :]) & shown[:, None, :] & local_rows[:, :, None]
    out, lse = dense_attention(q, k, v, visible[:, None], scale=scale)
    visible = order & shown[:, None, :] & is_global[:, :, None]
    own_q, own_k, own_v = (a if a is not None else b for a, b in zip((q_global, k_global, v_global), (q, k, v)))
    wide, wide_lse = dense_attention(own_q, own_k, own_v, visible[:, None], scale=scale)
    return (
        torch.where(is_global[:, :, None, None], wide, out),
        torch.where(is_global[:, None, :], wide_lse, lse),
    )


def dense_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_offsets: Tensor,
    col_index: Tensor,
    key_mask: Tensor | None = None,
    *,
    block_size: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``block_sparse_attention`` row by row over its listed keys, repeats and all."""
    sq, sk, heads, group = q.shape[1], k.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    outs, lses = [], []
    offsets, listed = row_offsets.tolist(), col_index.tolist()
    for b in range(q.shape[0]):
        for h in range(heads):
            of_head = offsets[b % len(offsets)]
            of_head = of_head[h % len(of_head)]
            for i in range(len(of_head) - 1):
                blocks = [c for c in listed[of_head[i] : of_head[i + 1]] if 0 <= c * block_size < sk]
                keys = [t for c in blocks for t in range(c * block_size, min(sk, (c + 1) * block_size))]
                rows = torch.arange(i * block_size, min(sq, (i + 1) * block_size), device=q.device)
                keys = torch.tensor(keys, dtype=torch.long, device=q.device)
                visible = torch.ones(len(rows), len(keys), dtype=torch.bool, device=q.device)
                if causal:
                    visible = keys[None, :] <= rows[:, None] + (sk - sq)
                if key_mask is not None:
                    visible = visible & key_mask[b, keys]
                take = slice(h, h + 1), slice(h // group, h // group + 1)
                out, lse = dense_attention(
                    q[b : b + 1, rows, take[0]],
                    k[b : b + 1, keys][:, :, take[1]],
                    v[b : b + 1, keys][:, :, take[1]],
                    visible,
                    scale=scale,
                )
                outs.append(out[0, :, 0])
                lses.append(lse[0, 0])
    dim_v = v.shape[-1]
    out = torch.cat(outs).view(q.shape[0], heads, sq, dim_v).transpose(1, 2)
    return out, torch.cat(lses).view(q.shape[0], heads, sq)
