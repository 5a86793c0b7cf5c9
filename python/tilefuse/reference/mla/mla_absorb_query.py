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
    grad: Tensor, q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of q and w_uk."""
    dtype = compute_dtype(q)
    _, nope, rank = w_uk.shape
    grad_latent = grad[..., :rank].to(dtype)
    grad_nope = torch.einsum("thr,hpr->thp", grad_latent, w_uk.to(dtype))
    cos, sin = tables_of("mla_absorb_query", cos, sin, positions, q.shape[0], dtype, conjugate=True)
    grad_rope = rotate(grad[..., rank:].to(dtype), cos, sin, interleaved)
    grad_w = torch.einsum("thp,thr->hpr", q[..., :nope].to(dtype), grad_latent)
    return torch.cat((grad_nope, grad_rope), -1).to(q.dtype), grad_w.to(w_uk.dtype)
