"""Keys and values from latent rows, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .mla_compress_kv import compute_dtype


def mla_expand_kv_fwd(
    latent: Tensor, w_ukv: Tensor, kv_lora_rank: int, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(latent)
    heads = w_ukv.shape[0] // (nope_dim + v_dim)
    up = latent[:, :kv_lora_rank].to(dtype) @ w_ukv.to(dtype).T
    k_nope, v = up.view(-1, heads, nope_dim + v_dim).split((nope_dim, v_dim), -1)
    rope = latent[:, None, kv_lora_rank:].to(dtype).expand(-1, heads, -1)
    return torch.cat((k_nope, rope), -1).to(latent.dtype), v.to(latent.dtype).contiguous()


def mla_expand_kv_bwd(
    grad_k: Tensor, grad_v: Tensor, latent: Tensor, w_ukv: Tensor, kv_lora_rank: int, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of latent and w_ukv."""
    dtype = compute_dtype(latent)
    grad_up = torch.cat((grad_k[..., :nope_dim], grad_v), -1).to(dtype).flatten(1)
    grad_latent = grad_up @ w_ukv.to(dtype)
    grad_rope = grad_k[..., nope_dim:].to(dtype).sum(1)
    grad_w = grad_up.T @ latent[:, :kv_lora_rank].to(dtype)
    return torch.cat((grad_latent, grad_rope), -1).to(latent.dtype), grad_w.to(w_ukv.dtype)
