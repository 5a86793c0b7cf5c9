"""Two attention results over disjoint keys made into one, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .mla_compress_kv import compute_dtype


def merged_weights(lse_a: Tensor, lse_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of each side and the merged lse, [.., H, S] in ``dtype``; an empty side weighs 0."""
    # +inf is another mark for no keys, as FlashMLA writes it
    lse_a, lse_b = (torch.where(x == float("inf"), float("-inf"), x.to(dtype)) for x in (lse_a, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == float("-inf"), 0.0, lse)
    return torch.exp(lse_a - base), torch.exp(lse_b - base), lse


def merge_attention_fwd(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(out_a)
    w_a, w_b, lse = merged_weights(lse_a, lse_b, dtype)
    # [.., H, S] -> [.., S, H, 1]
    w_a, w_b = w_a.transpose(-1, -2).unsqueeze(-1), w_b.transpose(-1, -2).unsqueeze(-1)
    # an empty side may hold anything: its product with 0 is not taken
    out = torch.where(w_a == 0, 0.0, w_a * out_a.to(dtype)) + torch.where(w_b == 0, 0.0, w_b * out_b.to(dtype))
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def merge_attention_bwd(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all four inputs."""
    dtype = compute_dtype(out_a)
    w_a, w_b, _ = merged_weights(lse_a, lse_b, dtype)
    column_a, column_b = w_a.transpose(-1, -2).unsqueeze(-1), w_b.transpose(-1, -2).unsqueeze(-1)
    dout, dlse = dout.to(dtype), dlse.to(dtype)
    a = torch.where(column_a == 0, 0.0, out_a.to(dtype))
    b = torch.where(column_b == 0, 0.0, out_b.to(dtype))
    # d out / d lse_a = w_a (a - out) = w_a w_b (a - b)
    inner = ((a - b) * dout).sum(-1).transpose(-1, -2) * w_a * w_b
    dlse_a = w_a * dlse + inner
    dlse_b = w_b * dlse - inner
    grads = (column_a * dout, dlse_a, column_b * dout, dlse_b)
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(grads, (out_a, lse_a, out_b, lse_b)))
