"""linear_distillation: logits of both heads meet in the terms of distillation.

* ``linear_distillation_fwd_kernel``: the logits of one head and of as many tokens as fit into a buffer, of which
  ``distillation_fwd_kernel`` then makes losses.
* ``linear_distillation_bwd_kernel``: the logits of both heads again, in registers, for a block of the vocabulary, and
  the student's gradients, in the dtype of the two products, which are those of linear_logprobs.

Tokens are taken in an ``order`` that puts those without a share last, as there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device
from ..common.rows import Matrix
from .distillation import Rows, divergence, gradient_of, launch_losses
from .host import padded
from .linear_logprobs import Block, Head, head_gradients, kept_first, logits_config, logits_of

# of the logits of both heads, in the forward
LOGITS_BYTES = 256 << 20


@triton.jit(do_not_specialize=["first", "rows"])
def linear_distillation_fwd_kernel(
    head,
    order_ptr,
    count_ptr,
    logits_ptr,
    first,
    rows,
    hidden,
    vocabulary,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits [rows, vocabulary] of the tokens from entry ``first`` of the order on."""
    count = tl.load(count_ptr)
    if first + tl.program_id(0) * BLOCK_M >= count:
        return
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = (row < rows) & (first + row < count)
    token = tl.load(order_ptr + first + row, mask=kept, other=0).to(tl.int64)
    id = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = id < vocabulary
    z = logits_of(head, token, kept, id, inside, hidden, 1.0, 0.0, BLOCK_M, BLOCK_N, BLOCK_K, False)
    out = logits_ptr + row[:, None] * vocabulary + id[None, :]
    tl.store(out, z, mask=kept[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens", "first", "ids"])
def linear_distillation_bwd_kernel(
    head,
    teacher_head,
    order_ptr,
    count_ptr,
    statistics_ptr,
    coefficients_ptr,
    dz_ptr,
    dz_row,
    bias_sums_ptr,
    tokens,
    hidden,
    teacher_hidden,
    first,
    ids,
    temperature,
    beta,
    rest_of_beta,
    OF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz [kept tokens, ids] of ids from ``first`` on, and of each tile of tokens their sum."""
    count = tl.load(count_ptr)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < ids
    tile = tl.program_id(0).to(tl.int64)
    if tl.program_id(0) * BLOCK_M >= count:
        if bias_sums_ptr is not None:
            tl.store(bias_sums_ptr + tile * dz_row + column, tl.zeros([BLOCK_N], tl.float32), mask=inside)
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = row < count
    token = tl.load(order_ptr + row, mask=kept, other=0).to(tl.int64)
    id = (first + column).to(tl.int64)
    # [BLOCK_M, BLOCK_N] each
    teacher = logits_of(
        teacher_head, token, kept, id, inside, teacher_hidden, 1.0, 0.0, BLOCK_M, BLOCK_N, BLOCK_K, False
    )
    student = logits_of(head, token, kept, id, inside, hidden, 1.0, 0.0, BLOCK_M, BLOCK_N, BLOCK_K, False)
    wide = tokens.to(tl.int64)
    statistics = statistics_ptr + token
    peak = tl.load(statistics, mask=kept, other=0.0)
    log_total = tl.load(statistics + wide, mask=kept, other=0.0)
    teacher_peak = tl.load(statistics + 2 * wide, mask=kept, other=0.0)
    teacher_log_total = tl.load(statistics + 3 * wide, mask=kept, other=0.0)
    shift = tl.load(statistics + 4 * wide, mask=kept, other=0.0)
    dz = gradient_of(
        student,
        teacher,
        peak[:, None],
        log_total[:, None],
        teacher_peak[:, None],
        teacher_log_total[:, None],
        shift[:, None],
        temperature,
        beta,
        rest_of_beta,
        OF,
    )
    dz *= tl.load(coefficients_ptr + token, mask=kept, other=0.0)[:, None]
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + tile * dz_row + column, tl.sum(tl.where(kept[:, None], dz, 0.0), 0), mask=inside)
    out = dz_ptr + row[:, None] * dz_row + column[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=kept[:, None] & inside[None, :])


def linear_distillation_fwd(x, weight, teacher_x, teacher_weight, bias, teacher_bias, keep, beta, temperature):
    tokens, vocabulary = x.shape[0], min(weight.shape[0], teacher_weight.shape[0])
    losses = x.new_empty(tokens, dtype=torch.float32)
    statistics = x.new_empty((5, tokens), dtype=torch.float32)
    if tokens == 0:
        return losses, statistics
    order, count = kept_first(keep, False)
    chunk = min(max(LOGITS_BYTES // (8 * vocabulary), 1), tokens)
    logits = x.new_empty((2, chunk, vocabulary), dtype=torch.float32)
    sides = (
        (Head(Matrix.of(x), Matrix.of(weight), bias, None), x),
        (Head(Matrix.of(teacher_x), Matrix.of(teacher_weight), teacher_bias, None), teacher_x),
    )
    for first in range(0, tokens, chunk):
        rows = min(chunk, tokens - first)
        for (head, states), z in zip(sides, logits):
            # by the number of all tokens: which chunk a token is in does not matter
            tile = logits_config(tokens, states)
            with on_device(x):
                linear_distillation_fwd_kernel[
                    (triton.cdiv(rows, tile.block_m), triton.cdiv(vocabulary, tile.block_n))
                ](head, order, count, z, first, rows, states.shape[1], vocabulary, **constants(tile))
        pair = Rows(Matrix.of(logits[0]), Matrix.of(logits[1]))
        launch_losses(pair, rows, vocabulary, keep, order, first, losses, statistics, beta, temperature)
    return losses, statistics


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
):
    ids, vocabulary = weight.shape[0], min(weight.shape[0], teacher_weight.shape[0])
    teacher_head = Head(Matrix.of(teacher_x), Matrix.of(teacher_weight), teacher_bias, None)
    # the sums of both heads are in registers at once
    width = 64 if max(x.element_size(), teacher_x.element_size()) <= 2 else 32

    def write(block: Block) -> None:
        tile = replace(block.tile, block_n=width)
        with on_device(x):
            linear_distillation_bwd_kernel[(block.grid[0], triton.cdiv(block.ids, width))](
                block.head,
                teacher_head,
                block.order,
                block.count,
                statistics,
                coefficients,
                block.dz,
                block.dz.stride(0),
                block.bias_sums,
                x.shape[0],
                x.shape[1],
                teacher_x.shape[1],
                block.first,
                block.ids,
                **divergence(beta, temperature),
                **constants(tile),
            )

    shared_bias = None if bias is None else bias[:vocabulary]
    needs = (need_x, need_weight, need_bias)
    dx, dweight, dbias = head_gradients(
        x, weight[:vocabulary], coefficients, shared_bias, None, factor, 0, *needs, write
    )
    return dx, padded(dweight, ids, need_weight), padded(dbias, ids, need_bias)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype in ("bf16", "fp32"):
        wanted = ("LDG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        student = tensor(dtype, 4096, 2048), tensor(dtype, 128256, 2048)
        teacher = tensor(dtype, 4096, 4096), tensor(dtype, 128256, 4096)
        yield AotCase(
            dtype,
            train("linear_distillation", *student, *teacher, tensor("i64", 4096)),
            expect={f"linear_distillation_{way}_kernel": wanted for way in ("fwd", "bwd")},
        )
