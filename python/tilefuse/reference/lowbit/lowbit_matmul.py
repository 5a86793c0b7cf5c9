"""Products with weights of few bits in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import group_of_columns, unpack_codes, zero_of


def _levels(q: Tensor, zero: Tensor | None, k: int, bits: int, group_size: int) -> Tensor:
    """``code - zero``, ``[N, K]`` float32."""
    codes = unpack_codes(q, bits)[:, :k].to(torch.float32)
    if zero is None:
        return codes - zero_of(bits)
    return codes - group_of_columns(zero, k, group_size).to(torch.float32)


def _groups(k: int, group_size: int) -> list[slice]:
    size = group_size or k
    return [slice(start, min(start + size, k)) for start in range(0, k, size)] if k else []


def _finish(out: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return (out if bias is None else out + bias).to(out_dtype)


def lowbit_matmul_fwd(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    k = x.shape[1]
    wide = torch.float64 if torch.float64 in (x.dtype, out_dtype) else torch.float32
    levels = _levels(q, zero, k, bits, group_size).to(wide)
    out = torch.zeros((x.shape[0], q.shape[0]), dtype=wide, device=x.device)
    for g, part in enumerate(_groups(k, group_size)):
        out += (x[:, part].to(wide) @ levels[:, part].t()) * scale[:, g].to(wide)
    return _finish(out, bias, out_dtype)


def lowbit_matmul_int8(
    x: Tensor,
    x_scale: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    k = x.shape[1]
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    # float64 holds every sum of products exactly, in any order
    levels = _levels(q, zero, k, bits, group_size).double()
    out = torch.zeros((x.shape[0], q.shape[0]), dtype=wide, device=x.device)
    for g, part in enumerate(_groups(k, group_size)):
        sums = (x[:, part].double() @ levels[:, part].t()).to(wide)
        out += sums * (x_scale[:, g, None].to(wide) * scale[None, :, g].to(wide))
    return _finish(out, bias, out_dtype)
