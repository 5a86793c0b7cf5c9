"""Queries taken into the latent space, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rope.rope import rotate
from .mla_compress_kv import compute_dtype, tables_of


def mla_absorb_query_fwd(
    q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    dtype = compute_dtype(q)
    nope = w_uk.shape[1]
    latent = torch.einsum("thp,hpr->thr", q[..., :nope].to(dtype), w_uk.to(dtype))
    cos, sin = tables_of("mla_absorb_query", cos, sin, positions, q.shape[0], dtype)
    return torch.cat((latent, rotate(q[..., nope:].to(dtype), cos, sin, interleaved)), -1).to(q.dtype)


def mla_absorb_query_bwd(
    dout: Tensor, q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of q and w_uk."""
    dtype = compute_dtype(q)
    _, nope, rank = w_uk.shape
    dlatent = dout[..., :rank].to(dtype)
    dnope = torch.einsum("thr,hpr->thp", dlatent, w_uk.to(dtype))
    cos, sin = tables_of("mla_absorb_query", cos, sin, positions, q.shape[0], dtype, conjugate=True)
    drope = rotate(dout[..., rank:].to(dtype), cos, sin, interleaved)
    dw_uk = torch.einsum("thp,thr->hpr", q[..., :nope].to(dtype), dlatent)
    return torch.cat((dnope, drope), -1).to(q.dtype), dw_uk.to(w_uk.dtype)
