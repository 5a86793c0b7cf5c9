"""RMSNorm and rotary embedding of q and k in plain PyTorch, with the gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import compute_tables, rotate


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rotary_offset: int) -> Tensor:
    end = rotary_offset + 2 * cos.shape[-1]
    turned = rotate(x[..., rotary_offset:end], cos, sin, interleaved)
    return torch.cat((x[..., :rotary_offset], turned, x[..., end:]), -1)


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def qk_norm_rope_fwd(
    q, k, q_weight, k_weight, cos, sin, positions, cu_seqlens, eps, weight_offset, interleaved, rotary_offset
):
    cos, sin = compute_tables("qk_norm_rope", q, cos, sin, positions, cu_seqlens, False, (), False)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normed, _ = _norm(x.to(cos.dtype), eps)
        scaled = normed * (weight.to(cos.dtype) + weight_offset)
        return _turn(scaled, cos, sin, interleaved, rotary_offset).to(x.dtype).contiguous()

    return one(q, q_weight), one(k, k_weight)


def qk_norm_rope_bwd(
    dq_out,
    dk_out,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    positions,
    cu_seqlens,
    eps,
    weight_offset,
    interleaved,
    rotary_offset,
):
    cos, sin = compute_tables("qk_norm_rope", q, cos, sin, positions, cu_seqlens, True, (), False)

    def one(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dout = _turn(dout.to(cos.dtype), cos, sin, interleaved, rotary_offset)
        normed, rstd = _norm(x.to(cos.dtype), eps)
        dweight = (dout * normed).flatten(0, -2).sum(0)
        dout = dout * (weight.to(cos.dtype) + weight_offset)
        dx = rstd * (dout - normed * (dout * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)

    (dq, dq_weight), (dk, dk_weight) = one(dq_out, q, q_weight), one(dk_out, k, k_weight)
    return dq, dk, dq_weight, dk_weight
