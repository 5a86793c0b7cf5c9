"""logprobs: rows of logits, a block of the vocabulary at a time; no program holds a whole row.

* ``logprobs_fwd_kernel``: statistics of some tokens' block, which ``merge_logprobs_fwd`` puts together.
* ``logprobs_bwd_kernel``: the gradients of some tokens' block.

Logits of ignored tokens are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import constants, on_device
from .linear_logprobs import COLUMNS, SMOOTHED_COLUMNS, STATS_BLOCK, merge_logprobs_fwd
from .logits import add_tile, capped_logits, logit_gradients, start_stats, store_stats


class LogitRows(NamedTuple):
    """Rows of logits [A, B, V], whose last dim is contiguous."""

    ptr: Any
    outer: Any
    row: Any

    @classmethod
    def of(cls, logits: Tensor) -> LogitRows:
        # a stride of no meaning would compile the kernel anew
        return cls(logits, 0 if logits.shape[0] == 1 else logits.stride(0), logits.stride(1))


@triton.jit
def _place(target_ptr, tokens, ignore_index, BLOCK_M: tl.constexpr):
    """Tokens of this program (int64), which of them there are, which are kept, and their targets."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = token < tokens
    target = tl.load(target_ptr + token, mask=there, other=0).to(tl.int64)
    return token, there, there & (target != ignore_index), target


@triton.jit
def _load(logits, token, kept, inner, id, inside):
    """Logits in float32, [BLOCK_M, BLOCK_N]."""
    row = logits.ptr + token // inner * logits.outer + token % inner * logits.row
    return tl.load(row[:, None] + id[None, :], mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "inner", "ignore_index"])
def logprobs_fwd_kernel(
    logits,
    target_ptr,
    class_weight_ptr,
    stats_ptr,
    tokens,
    inner,
    vocabulary,
    scale,
    softcap,
    temperature,
    ignore_index,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token, there, kept, target = _place(target_ptr, tokens, ignore_index, BLOCK_M)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, vocabulary)
    if tl.max(kept.to(tl.int32), 0) == 0:
        last = first
    stats = start_stats(BLOCK_M)
    for start in range(first, last, BLOCK_N):
        id = start + tl.arange(0, BLOCK_N)
        z = capped_logits(_load(logits, token, kept, inner, id, id < vocabulary), scale, softcap, CAPPED)
        stats = add_tile(stats, z / temperature, start, vocabulary, target, class_weight_ptr, COLUMNS > 5)
    out = stats_ptr + (token * tl.num_programs(1) + tl.program_id(1)) * COLUMNS
    store_stats(out, stats, 0, kept, there, COLUMNS > 5)


@triton.jit(do_not_specialize=["tokens", "inner", "ignore_index"])
def logprobs_bwd_kernel(
    logits,
    target_ptr,
    class_weight_ptr,
    norm_ptr,
    entropy_ptr,
    coefficients_ptr,
    dlogits_ptr,
    tokens,
    inner,
    vocabulary,
    scale,
    softcap,
    temperature,
    ignore_index,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dlogits [T, V] contiguous."""
    token, there, kept, target = _place(target_ptr, tokens, ignore_index, BLOCK_M)
    id = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = id < vocabulary
    out = dlogits_ptr + token[:, None] * vocabulary + id[None, :]
    mask = there[:, None] & inside[None, :]
    if tl.max(kept.to(tl.int32), 0) == 0:
        tl.store(out, tl.zeros([BLOCK_M, BLOCK_N], dlogits_ptr.dtype.element_ty), mask=mask)
        return
    capped = capped_logits(_load(logits, token, kept, inner, id, inside), scale, softcap, CAPPED)
    dz = logit_gradients(
        capped,
        id,
        inside,
        target,
        class_weight_ptr,
        norm_ptr,
        entropy_ptr,
        coefficients_ptr,
        token,
        kept,
        tokens,
        softcap,
        temperature,
        CAPPED,
    )
    tl.store(out, tl.where(kept[:, None], dz, 0.0).to(dlogits_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Tokens and ids of a tile."""

    block_m: int
    block_n: int
    num_warps: int


def config(vocabulary: int) -> Config:
    """8 logits a thread: enough for one wide access of bfloat16, two of float32."""
    block_n = min(max(triton.next_power_of_2(vocabulary), 64), 2048)
    return Config(2048 // block_n, block_n, 8)


def logprobs_fwd(logits, target, class_weight, scale, softcap, temperature, ignore_index, smooth):
    tokens, vocabulary = target.shape[0], logits.shape[2]
    columns = SMOOTHED_COLUMNS if smooth else COLUMNS
    blocks = triton.cdiv(vocabulary, STATS_BLOCK)
    stats = logits.new_empty((tokens, blocks, columns), dtype=torch.float32)
    if tokens:
        tile = config(vocabulary)
        with on_device(logits):
            logprobs_fwd_kernel[(triton.cdiv(tokens, tile.block_m), blocks)](
                LogitRows.of(logits),
                target,
                class_weight,
                stats,
                tokens,
                logits.shape[1],
                vocabulary,
                float(scale),
                float(softcap),
                float(temperature),
                ignore_index,
                CAPPED=softcap > 0,
                COLUMNS=columns,
                SPAN=STATS_BLOCK,
                **constants(tile),
            )
    return merge_logprobs_fwd(stats)


def logprobs_bwd(logits, target, class_weight, norm, entropy, coefficients, scale, softcap, temperature, ignore_index):
    tokens, vocabulary = target.shape[0], logits.shape[2]
    dlogits = logits.new_empty(logits.shape)
    if tokens:
        tile = config(vocabulary)
        with on_device(logits):
            logprobs_bwd_kernel[(triton.cdiv(tokens, tile.block_m), triton.cdiv(vocabulary, tile.block_n))](
                LogitRows.of(logits),
                target,
                class_weight,
                norm,
                entropy,
                coefficients,
                dlogits,
                tokens,
                logits.shape[1],
                vocabulary,
                float(scale),
                float(softcap),
                float(temperature),
                ignore_index,
                CAPPED=softcap > 0,
                **constants(tile),
            )
    return dlogits


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype in ("bf16", "fp32"):
        yield AotCase(
            dtype,
            train("logprobs", tensor(dtype, 4096, 128256), tensor("i64", 4096)),
            expect={"logprobs_fwd_kernel": ("LDG.128",), "logprobs_bwd_kernel": ("LDG.128", "STG.128")},
        )
