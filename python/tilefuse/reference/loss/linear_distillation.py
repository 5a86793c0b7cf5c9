"""Reference of linear_distillation: logits of a block of the vocabulary at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .distillation import BLOCK, Blocks, forward, gradients
from .linear_logprobs import head_gradients


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


def padded(gradient: Tensor, ids: int, needed: bool) -> Tensor:
    """With zeros for the ids that pad the head, and as it is where it is not needed."""
    if not needed or gradient.shape[0] == ids:
        return gradient
    return torch.cat((gradient, gradient.new_zeros(ids - gradient.shape[0], *gradient.shape[1:])))


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
    kept = coefficients != 0
    blocks, rows, last = _heads(x, weight, teacher_x, teacher_weight, bias, teacher_bias, kept)

    def parts():
        for start in range(0, last, BLOCK):
            dz = gradients(*blocks(start), statistics, coefficients, beta, temperature)
            yield weight[start : start + dz.shape[1]], dz

    needs = (need_x, need_weight, need_bias)
    dx, dweight, dbias = head_gradients(x, weight, bias, rows, kept, parts(), factor, *needs)
    ids = weight.shape[0]
    return dx, padded(dweight, ids, need_weight), padded(dbias, ids, need_bias)
