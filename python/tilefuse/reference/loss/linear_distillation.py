"""Reference of linear_distillation: logits of a block of the vocabulary at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .distillation import BLOCK, Blocks, forward, gradients


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, ids: slice) -> Tensor:
    z = x @ weight[ids].to(x.dtype).t()
    return z if bias is None else z + bias[ids].to(x.dtype)


def _heads(x, weight, teacher_x, teacher_weight, bias, teacher_bias, keep) -> tuple[Blocks, Tensor, int]:
    """Their logits, the student's rows in the dtype of the computation, those not kept 0, and the size in common."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, teacher_rows = (torch.where(keep[:, None], side, 0).to(dtype) for side in (x, teacher_x))
    last = min(weight.shape[0], teacher_weight.shape[0])

    def block(start: int) -> tuple[Tensor, Tensor]:
        ids = slice(start, min(start + BLOCK, last))
        return _logits(rows, weight, bias, ids), _logits(teacher_rows, teacher_weight, teacher_bias, ids)

    return block, rows, last


def linear_distillation_fwd(
    x, weight, teacher_x, teacher_weight, bias, teacher_bias, keep, beta, temperature
) -> tuple[Tensor, Tensor]:
    blocks, rows, last = _heads(x, weight, teacher_x, teacher_weight, bias, teacher_bias, keep)
    return forward(blocks, last, rows, keep, beta, temperature)


def linear_distillation_bwd(
    x,
    weight,
    teacher_x,
    teacher_weight,
    bias,
    teacher_bias,
    statistics,
    coefficients,
    factor,
    beta,
    temperature,
    need_x,
    need_weight,
    need_bias,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, rows, last = _heads(x, weight, teacher_x, teacher_weight, bias, teacher_bias, coefficients != 0)
    dx = torch.zeros_like(rows)
    # rows past those in common keep their zeros
    dweight = weight.new_zeros(weight.shape if need_weight else 0)
    dbias = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=x.dtype if bias is None else bias.dtype)
    for start in range(0, last, BLOCK):
        dz = gradients(*blocks(start), statistics, coefficients, beta, temperature)
        ids = slice(start, start + dz.shape[1])
        if need_x:
            dx += dz @ weight[ids].to(rows.dtype)
        if need_weight:
            dweight[ids] = (factor * (dz.t() @ rows)).to(weight.dtype)
        if need_bias:
            dbias[ids] = (factor * dz.sum(0)).to(dbias.dtype)
    return (factor * dx).to(x.dtype) if need_x else x.new_empty(0), dweight, dbias
