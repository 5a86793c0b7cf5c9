"""linear_logprobs: statistics of logits that stay in registers, and the backward, a block of the vocabulary at a time.

* ``linear_logprob_stats_fwd_kernel``: a tile of tokens against 4,096 ids, one after the other.
* ``merge_logprobs_fwd_kernel``: the blocks of each token, in ascending order.
* ``linear_logprobs_bwd_kernel``: the logits of a block again, and their gradients, in the dtype of the products.
* ``linear_logprobs_bwd_weight_kernel``, ``linear_logprobs_bwd_x_kernel``: the two products that those meet.

Tokens are taken in an ``order`` that puts the ignored ones last. Their number stays on the device: programs that have
none end at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common.launch import constants, on_device
from ..common.rows import Matrix
from .logits import INFINITY, add_tile, capped_logits, logit_gradients, start_stats, store_stats

STATS_BLOCK = 4096
COLUMNS, SMOOTHED_COLUMNS = 5, 7
# of a block's gradients, and ids of one at most
BLOCK_BYTES, BLOCK_IDS = 256 << 20, 32768


class Head(NamedTuple):
    """The tensors of a head, and what they are read with."""

    x: Any
    weight: Any
    bias: Any
    class_weight: Any


@triton.jit
def logits_of(
    head,
    token,
    token_mask,
    id,
    id_mask,
    hidden,
    scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Logits before the temperature, [BLOCK_M, BLOCK_N]; ``token`` and ``id`` are int64."""
    x_row = head.x.ptr + token[:, None] * head.x.row
    w_row = head.weight.ptr + id[:, None] * head.weight.row
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < hidden)[None, :]
        a = tl.load(x_row + k[None, :], mask=token_mask[:, None] & inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(w_row + k[None, :], mask=id_mask[:, None] & inside, other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if head.bias is not None:
        acc += tl.load(head.bias + id, mask=id_mask, other=0.0).to(tl.float32)[None, :]
    return capped_logits(acc, scale, softcap, CAPPED)


@triton.jit(do_not_specialize=["tokens", "vocab_start"])
def linear_logprob_stats_fwd_kernel(
    head,
    target_ptr,
    order_ptr,
    count_ptr,
    stats_ptr,
    tokens,
    hidden,
    vocabulary,
    vocab_start,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    count = tl.load(count_ptr)
    blocks = tl.num_programs(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = row < count
    token = tl.load(order_ptr + row, mask=row < tokens, other=0).to(tl.int64)
    target = tl.load(target_ptr + token, mask=kept, other=-1).to(tl.int64) - vocab_start

    stats = start_stats(BLOCK_M)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, vocabulary)
    if tl.program_id(0) * BLOCK_M >= count:
        last = first
    for start in range(first, last, BLOCK_N):
        id = start + tl.arange(0, BLOCK_N)
        inside = id < vocabulary
        z = logits_of(
            head, token, kept, id.to(tl.int64), inside, hidden, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_K, CAPPED
        )
        stats = add_tile(stats, z / temperature, start, vocabulary, target, head.class_weight, COLUMNS > 5)
    out = stats_ptr + (token * blocks + tl.program_id(1)) * COLUMNS
    store_stats(out, stats, vocab_start, kept, row < tokens, COLUMNS > 5)


@triton.jit(do_not_specialize=["tokens"])
def merge_logprobs_fwd_kernel(
    stats_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    argmax_ptr,
    smoothed_ptr,
    norm_ptr,
    tokens,
    blocks,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = token < tokens
    peak = tl.full([BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    costs = tl.zeros([BLOCK_M], tl.float32)
    classes = tl.zeros([BLOCK_M], tl.float32)
    logit = tl.full([BLOCK_M], float("nan"), tl.float32)
    argmax = tl.full([BLOCK_M], -1.0, tl.float32)
    row = stats_ptr + token * blocks * COLUMNS
    for block in range(blocks):
        part = row + block * COLUMNS
        largest = tl.load(part, mask=mask, other=0.0)
        part_total = tl.load(part + 1, mask=mask, other=1.0)
        part_logit = tl.load(part + 3, mask=mask, other=0.0)
        top = tl.maximum(peak, largest, propagate_nan=tl.PropagateNan.ALL)
        down = tl.where(peak == -INFINITY, 0.0, peak - top)
        new = tl.where(largest == -INFINITY, 0.0, largest - top)
        part_weighted = tl.load(part + 2, mask=mask, other=0.0) + part_total * new
        weighted = (weighted + total * down) * tl.exp(down) + part_weighted * tl.exp(new)
        total = total * tl.exp(down) + part_total * tl.exp(new)
        logit = tl.where(part_logit == part_logit, part_logit, logit)
        argmax = tl.where((argmax < 0) | (largest > peak), tl.load(part + 4, mask=mask, other=0.0), argmax)
        if COLUMNS > 5:
            part_classes = tl.load(part + 6, mask=mask, other=0.0)
            costs += classes * down + tl.load(part + 5, mask=mask, other=0.0) + part_classes * new
            classes += part_classes
        peak = top
    kept = argmax >= 0
    log_total = tl.log(tl.where(kept, total, 1.0))
    tl.store(logp_ptr + token, tl.where(kept, (logit - peak) - log_total, 0.0), mask=mask)
    tl.store(lse_ptr + token, tl.where(kept, peak + log_total, 0.0), mask=mask)
    tl.store(entropy_ptr + token, tl.where(kept, log_total - weighted / total, 0.0), mask=mask)
    tl.store(argmax_ptr + token, argmax.to(tl.int32), mask=mask)
    if COLUMNS > 5:
        tl.store(smoothed_ptr + token, tl.where(kept, classes * log_total - costs, 0.0), mask=mask)
    tl.store(norm_ptr + token, tl.where(kept, peak, 0.0), mask=mask)
    # without the target's logit the token's gradient is NaN too
    norm = tl.where(logit == logit, log_total, logit)
    tl.store(norm_ptr + tokens.to(tl.int64) + token, tl.where(kept, norm, 0.0), mask=mask)


@triton.jit(do_not_specialize=["tokens", "vocab_start", "first", "ids"])
def linear_logprobs_bwd_kernel(
    head,
    target_ptr,
    order_ptr,
    count_ptr,
    norm_ptr,
    entropy_ptr,
    coefficients_ptr,
    dz_ptr,
    dz_row,
    bias_sums_ptr,
    tokens,
    hidden,
    vocab_start,
    first,
    ids,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
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
    capped = logits_of(head, token, kept, id, inside, hidden, scale, softcap, BLOCK_M, BLOCK_N, BLOCK_K, CAPPED)
    target = tl.load(target_ptr + token, mask=kept, other=-1).to(tl.int64) - vocab_start
    dz = logit_gradients(
        capped,
        id,
        inside,
        target,
        head.class_weight,
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
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + tile * dz_row + column, tl.sum(tl.where(kept[:, None], dz, 0.0), 0), mask=inside)
    out = dz_ptr + row[:, None] * dz_row + column[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=kept[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["first", "ids"])
def linear_logprobs_bwd_weight_kernel(
    x,
    order_ptr,
    count_ptr,
    factor_ptr,
    dz_ptr,
    dz_row,
    dweight_ptr,
    hidden,
    first,
    ids,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of ids from ``first`` on: dz^T x, summed over tokens in their order, rounded once."""
    count = tl.load(count_ptr)
    factor = tl.load(factor_ptr)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (row < count)[:, None]
        token = tl.load(order_ptr + row, mask=row < count, other=0).to(tl.int64)
        # [BLOCK_K, BLOCK_M], [BLOCK_K, BLOCK_N]
        a = tl.load(dz_ptr + row[:, None] * dz_row + m[None, :], mask=inside & (m < ids)[None, :], other=0.0)
        b = tl.load(x.ptr + token[:, None] * x.row + n[None, :], mask=inside & (n < hidden)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    keep = (m < ids)[:, None] & (n < hidden)[None, :]
    out = dweight_ptr + (first + m)[:, None] * hidden + n[None, :]
    tl.store(out, (acc * factor).to(dweight_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["first", "ids", "last"])
def linear_logprobs_bwd_x_kernel(
    weight,
    order_ptr,
    count_ptr,
    factor_ptr,
    dz_ptr,
    dz_row,
    sums_ptr,
    dx_ptr,
    hidden,
    first,
    ids,
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums += dz w over ids from ``first`` on; after the last block the sums become rows of dx."""
    count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = (row < count)[:, None] & (n < hidden)[None, :]
    sums = sums_ptr + row[:, None] * hidden + n[None, :]
    acc = tl.load(sums, mask=keep & (first > 0), other=0.0)  # [BLOCK_M, BLOCK_N]
    for start in range(0, ids, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = k < ids
        a = tl.load(
            dz_ptr + row[:, None] * dz_row + k[None, :], mask=(row < count)[:, None] & inside[None, :], other=0.0
        )
        at = weight.ptr + (first + k)[:, None] * weight.row + n[None, :]
        b = tl.load(at, mask=inside[:, None] & (n < hidden)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if last != 0:
        token = tl.load(order_ptr + row, mask=row < count, other=0).to(tl.int64)
        out = dx_ptr + token[:, None] * hidden + n[None, :]
        tl.store(out, (acc * tl.load(factor_ptr)).to(dx_ptr.dtype.element_ty), mask=keep)
    else:
        tl.store(sums, acc, mask=keep)


@dataclass(frozen=True)
class Config:
    """Tile of a product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(rows: int, itemsize: int) -> Config:
    """For products of ``rows`` rows; float32 has no matrix unit and keeps its operands in registers."""
    if itemsize > 2:
        return Config(32 if rows > 16 else 16, 64, 32, 4, 2)
    if rows <= 64:
        return Config(16 if rows <= 16 else 64, 128, 64, 4, 3)
    return Config(128, 128, 64, 8, 3)


def logits_config(rows: int, x: Tensor) -> Config:
    """Of products whose sums become logits: that takes registers, which the operands of Hopper leave free."""
    tile = config(rows, x.element_size())
    return tile if arch.of(x.device) in ("sm_90", "sm_100") else replace(tile, block_n=64)


def kept_first(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Tokens in their order, the ignored ones last, and how many the others are; nothing waits for the device."""
    ignored = target == ignore_index
    order = torch.sort(ignored.to(torch.uint8), stable=True).indices.to(torch.int32)
    return order, (~ignored).sum(dtype=torch.int32)


def linear_logprob_stats_fwd(
    x, weight, target, bias, class_weight, vocab_start, scale, softcap, temperature, ignore_index, smooth
):
    tokens, hidden = x.shape
    columns = SMOOTHED_COLUMNS if smooth else COLUMNS
    blocks = triton.cdiv(weight.shape[0], STATS_BLOCK)
    stats = x.new_empty((tokens, blocks, columns), dtype=torch.float32)
    if tokens:
        order, count = kept_first(target, ignore_index)
        tile = logits_config(tokens, x)
        with on_device(x):
            linear_logprob_stats_fwd_kernel[(triton.cdiv(tokens, tile.block_m), blocks)](
                Head(Matrix.of(x), Matrix.of(weight), bias, class_weight),
                target,
                order,
                count,
                stats,
                tokens,
                hidden,
                weight.shape[0],
                vocab_start,
                float(scale),
                float(softcap),
                float(temperature),
                CAPPED=softcap > 0,
                COLUMNS=columns,
                SPAN=STATS_BLOCK,
                **constants(tile),
            )
    return stats


def merge_logprobs_fwd(stats):
    tokens, blocks, columns = stats.shape
    logp, lse, entropy = (stats.new_empty(tokens) for _ in range(3))
    argmax = stats.new_empty(tokens, dtype=torch.int32)
    smoothed = stats.new_empty(tokens if columns == SMOOTHED_COLUMNS else 0)
    norm = stats.new_empty(2, tokens)
    if tokens:
        with on_device(stats):
            merge_logprobs_fwd_kernel[(triton.cdiv(tokens, 128),)](
                stats,
                logp,
                lse,
                entropy,
                argmax,
                smoothed,
                norm,
                tokens,
                blocks,
                COLUMNS=columns,
                BLOCK_M=128,
                num_warps=4,
            )
    return logp, lse, entropy, argmax, smoothed, norm


def linear_logprobs_fwd(x, weight, target, bias, class_weight, scale, softcap, temperature, ignore_index, smooth):
    return merge_logprobs_fwd(
        linear_logprob_stats_fwd(
            x, weight, target, bias, class_weight, 0, scale, softcap, temperature, ignore_index, smooth
        )
    )


class Block(NamedTuple):
    """Ids whose logits' gradients are wanted at a time, and where they go: [kept tokens, ids] and sums of tiles."""

    grid: tuple[int, int]
    tile: Config
    head: Head
    order: Tensor
    count: Tensor
    dz: Tensor
    bias_sums: Tensor | None
    first: int
    ids: int


def head_gradients(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    write: Callable[[Block], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, a block of the vocabulary at a time; ``write`` launches what makes its dz."""
    (tokens, hidden), vocabulary = x.shape, weight.shape[0]
    # rows of ignored tokens have no other writer
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need_x else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    dbias = weight.new_empty(vocabulary if need_bias else 0, dtype=x.dtype if bias is None else bias.dtype)
    if tokens == 0:
        return dx, dweight.zero_(), dbias.zero_()
    fit = BLOCK_BYTES // (tokens * x.element_size()) // 128 * 128
    block = min(max(fit, 128), BLOCK_IDS, vocabulary)
    dz = x.new_empty(tokens, block)
    logits, by_token = logits_config(tokens, x), config(tokens, x.element_size())
    by_id = config(block, x.element_size())
    bias_sums = x.new_empty(triton.cdiv(tokens, logits.block_m), block, dtype=torch.float32) if need_bias else None
    sums = x.new_empty((tokens, hidden) if need_x and block < vocabulary else (0,), dtype=torch.float32)
    order, count = kept_first(target, ignore_index)
    head = Head(Matrix.of(x), Matrix.of(weight), bias, class_weight)
    for first in range(0, vocabulary, block):
        ids = min(block, vocabulary - first)
        grid = (triton.cdiv(tokens, logits.block_m), triton.cdiv(ids, logits.block_n))
        write(Block(grid, logits, head, order, count, dz, bias_sums, first, ids))
        if bias_sums is not None:
            dbias[first : first + ids] = (bias_sums[:, :ids].sum(0) * factor).to(dbias.dtype)
        with on_device(x):
            if need_weight:
                grid = (triton.cdiv(ids, by_id.block_m), triton.cdiv(hidden, by_id.block_n))
                linear_logprobs_bwd_weight_kernel[grid](
                    head.x,
                    order,
                    count,
                    factor,
                    dz,
                    dz.stride(0),
                    dweight,
                    hidden,
                    first,
                    ids,
                    **constants(by_id),
                )
            if need_x:
                grid = (triton.cdiv(tokens, by_token.block_m), triton.cdiv(hidden, by_token.block_n))
                linear_logprobs_bwd_x_kernel[grid](
                    head.weight,
                    order,
                    count,
                    factor,
                    dz,
                    dz.stride(0),
                    sums,
                    dx,
                    hidden,
                    first,
                    ids,
                    int(first + ids == vocabulary),
                    **constants(by_token),
                )
    return dx, dweight, dbias


def linear_logprobs_bwd(
    x,
    weight,
    target,
    bias,
    class_weight,
    norm,
    entropy,
    coefficients,
    factor,
    vocab_start,
    scale,
    softcap,
    temperature,
    ignore_index,
    *needs,
):
    def write(block: Block) -> None:
        with on_device(x):
            linear_logprobs_bwd_kernel[block.grid](
                block.head,
                target,
                block.order,
                block.count,
                norm,
                entropy,
                coefficients,
                block.dz,
                block.dz.stride(0),
                block.bias_sums,
                x.shape[0],
                x.shape[1],
                vocab_start,
                block.first,
                block.ids,
                float(scale),
                float(softcap),
                float(temperature),
                CAPPED=softcap > 0,
                **constants(block.tile),
            )

    return head_gradients(x, weight, target, bias, class_weight, factor, ignore_index, *needs, write)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    products = (
        "linear_logprob_stats_fwd",
        "linear_logprobs_bwd",
        "linear_logprobs_bwd_weight",
        "linear_logprobs_bwd_x",
    )
    for dtype in ("bf16", "fp32"):
        wanted = ("LDG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        x, weight, target = tensor(dtype, 4096, 4096), tensor(dtype, 128256, 4096), tensor("i64", 4096)
        yield AotCase(
            dtype,
            train("linear_logprobs", x, weight, target),
            expect={f"{name}_kernel": wanted for name in products},
        )
