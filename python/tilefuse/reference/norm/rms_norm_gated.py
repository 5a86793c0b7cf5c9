"""RMSNorm and a silu gate in plain PyTorch, with the gradient written out."""

from __future__ import annotations

import torch

from .rms_norm import compute_dtype, norm_gradient, normalize, scale_of


def rms_norm_gated_fwd(x, gate, weight, eps, norm_first):
    dtype = compute_dtype(x)
    wide, activated = x.to(dtype), torch.nn.functional.silu(gate.to(dtype))
    normed, rstd = normalize(wide if norm_first else wide * activated, eps)
    y = normed * scale_of(weight, 0.0, dtype)
    return (y * activated if norm_first else y).to(x.dtype).contiguous(), rstd.squeeze(-1)


def rms_norm_gated_bwd(dout, x, gate, weight, rstd, norm_first, with_dweight):
    dtype = compute_dtype(x)
    dout, wide, wide_gate, rstd = dout.to(dtype), x.to(dtype), gate.to(dtype), rstd.unsqueeze(-1)
    share = torch.sigmoid(wide_gate)
    activated = wide_gate * share
    slope = share + activated * (1.0 - share)
    scale = scale_of(weight, 0.0, dtype)
    if norm_first:
        normed = wide * rstd
        dactivated = dout * normed * scale
        dscaled = dout * activated
        dx = norm_gradient(dscaled * scale, normed, rstd)
    else:
        normed = wide * activated * rstd
        dscaled = dout
        dgated = norm_gradient(dscaled * scale, normed, rstd)
        dx, dactivated = dgated * activated, dgated * wide
    dweight = (
        (dscaled * normed).sum(0).to(weight.dtype) if with_dweight else (x if weight is None else weight).new_empty(0)
    )
    dgate = dactivated * slope
    return dx.to(x.dtype).contiguous(), dgate.to(gate.dtype).contiguous(), dweight
