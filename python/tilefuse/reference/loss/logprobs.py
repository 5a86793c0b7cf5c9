"""Reference of logprobs: blocks of the vocabulary, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear_logprobs import (
    BLOCK,
    block_stats,
    capped,
    check_targets,
    logit_gradients,
    mark_ignored,
    merge_logprobs_fwd,
)


def _blocks(logits: Tensor, target: Tensor, ignore_index: int) -> Iterator[tuple[int, Tensor]]:
    """(first id, logits [T, 4096 or fewer]) in the dtype of the computation, those of ignored tokens 0."""
    kept = (target != ignore_index)[:, None]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for start in range(0, logits.shape[-1], BLOCK):
        block = logits[..., start : start + BLOCK]
        yield start, torch.where(kept, block.reshape(target.shape[0], block.shape[-1]), 0).to(wide)


def logprobs_fwd(logits, target, class_weight, scale, softcap, temperature, ignore_index, smooth) -> tuple[Tensor, ...]:
    check_targets("logprobs", target, logits.shape[-1], ignore_index)
    parts = []
    for start, z in _blocks(logits, target, ignore_index):
        c = None if class_weight is None else class_weight[start : start + BLOCK]
        parts.append(block_stats(capped(z, scale, softcap) / temperature, target, c, start, smooth))
    return merge_logprobs_fwd(mark_ignored(torch.stack(parts, 1), target, ignore_index))


def logprobs_bwd(
    logits,
    target,
    class_weight,
    norm,
    entropy,
    coefficients,
    scale,
    softcap,
    temperature,
    ignore_index,
) -> Tensor:
    parts = []
    for start, z in _blocks(logits, target, ignore_index):
        c = None if class_weight is None else class_weight[start : start + BLOCK]
        dz = logit_gradients(
            capped(z, scale, softcap), target, c, norm, entropy, coefficients, start, softcap, temperature
        )
        parts.append(torch.where((target != ignore_index)[:, None], dz, 0.0).to(logits.dtype))
    return torch.cat(parts, 1).view(logits.shape)
