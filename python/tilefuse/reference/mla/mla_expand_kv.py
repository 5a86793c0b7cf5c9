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
    dk: Tensor, dv: Tensor, latent: Tensor, w_ukv: Tensor, kv_lora_rank: int, nope_dim: int, v_dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of latent and w_ukv."""
    dtype = compute_dtype(latent)
    dup = torch.cat((dk[..., :nope_dim], dv), -1).to(dtype).flatten(1)
    dlatent = dup @ w_ukv.to(dtype)
    drope = dk[..., nope_dim:].to(dtype).sum(1)
    dw_ukv = dup.T @ latent[:, :kv_lora_rank].to(dtype)
    return torch.cat((dlatent, drope), -1).to(latent.dtype), dw_ukv.to(w_ukv.dtype)
