"""linear_topk_distillation: the pass over the vocabulary, the divergence of k + 1 categories, and the backward.

* ``linear_topk_distillation_fwd_kernel``: a tile of tokens against 4,096 ids. As each token lists its ids in ascending
  order, a tile meets them one after the other: their logits are written out and leave the sums.
* ``linear_topk_distillation_fwd_merge_kernel``: of each token the sums of all blocks, its loss and the gradients of its
  categories, in float64, which needs no care where both sides agree.
* ``linear_topk_distillation_bwd_kernel``: gradients of a block's logits, for the two products of ``linear_logprobs``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device
from ..common.rows import Matrix
from .linear_logprobs import (
    STATS_BLOCK,
    Block,
    Head,
    head_gradients,
    kept_first,
    logits_config,
    logits_of,
)
from .logits import INFINITY, NO_ID

TAILS = {"bucket": 0, "renormalize": 1, "none": 2}
BUCKET, RENORMALIZE = tl.constexpr(0), tl.constexpr(1)
# divergences: KL(t || p), KL(p || t), and what lies between
FORWARD, REVERSE = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _first_listed(ids_row, listed, id, mask):
    """Of each row, how many of its ids in ascending order are below ``id``."""
    low = tl.zeros_like(mask.to(tl.int32))
    span = listed
    while span > 0:
        half = (span + 1) // 2
        inside = mask & (low + half <= listed)
        below = tl.load(ids_row + low + half - 1, mask=inside, other=0) < id
        low += tl.where(inside & below, half, 0)
        span -= half
    return low


@triton.jit
def _listed_at(ids_row, listed, place, mask):
    """The ids at these places of the rows; behind their end one that is larger than all."""
    id = tl.load(ids_row + place, mask=mask & (place < listed), other=NO_ID)
    return tl.minimum(id, NO_ID).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "listed"])
def linear_topk_distillation_fwd_kernel(
    head,
    ids_ptr,
    order_ptr,
    count_ptr,
    stats_ptr,
    logits_ptr,
    tokens,
    listed,
    hidden,
    vocabulary,
    temperature,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """stats [T, blocks, 2]: the largest logit that is not listed, and the sum of exp relative to it; logits [T, k]."""
    count = tl.load(count_ptr)
    blocks = tl.num_programs(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = row < count
    token = tl.load(order_ptr + row, mask=row < tokens, other=0).to(tl.int64)
    ids_row, logits_row = ids_ptr + token * listed, logits_ptr + token * listed
    peak = tl.full([BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, vocabulary)
    if tl.program_id(0) * BLOCK_M >= count:
        last = first
    place = _first_listed(ids_row, listed, first, kept)
    for start in range(first, last, BLOCK_N):
        id = start + tl.arange(0, BLOCK_N)
        inside = id < vocabulary
        z = logits_of(head, token, kept, id.to(tl.int64), inside, hidden, 1.0, 0.0, BLOCK_M, BLOCK_N, BLOCK_K, False)
        z = tl.where(inside[None, :], z / temperature, -INFINITY)
        stop = tl.minimum(start + BLOCK_N, vocabulary)
        next = _listed_at(ids_row, listed, place, kept)
        while tl.min(next, 0) < stop:
            here = id[None, :] == next[:, None]
            met = next < stop
            tl.store(logits_row + place, tl.sum(tl.where(here, z, 0.0), 1), mask=met)
            z = tl.where(here, -INFINITY, z)
            place += met.to(tl.int32)
            next = _listed_at(ids_row, listed, place, kept)
        top = tl.maximum(peak, tl.max(z, 1))
        # a row of -inf alone has a sum of 0
        base = tl.where(top == -INFINITY, 0.0, top)
        down = tl.where(peak == -INFINITY, 0.0, peak - base)
        total = total * tl.exp(down) + tl.sum(tl.exp(z - base[:, None]), 1)
        peak = top
    out = stats_ptr + (token * blocks + tl.program_id(1)) * 2
    tl.store(out, peak, mask=row < tokens)
    tl.store(out + 1, total, mask=row < tokens)


@triton.jit
def _excess(a, log_a, b, log_b):
    """b - a - a log(b / a) >= 0, what a category adds to KL(a || b) of sides with the same sum."""
    x = b - a - a * (log_b - log_a)
    return tl.where(a == 0.0, b, tl.where(x < 0.0, 0.0, x))


@triton.jit
def _category(log_s, log_t, beta, KIND: tl.constexpr):
    """(term, slope, student's mass, teacher's mass); the slope is p times the derivative of the loss in p."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    if KIND == FORWARD:
        term, slope = _excess(t, log_t, s, log_s), -t
    elif KIND == REVERSE:
        term, slope = _excess(s, log_s, t, log_t), tl.where(s == 0.0, 0.0, s * (log_s - log_t + 1.0))
    else:
        m = (1.0 - beta) * s + beta * t
        log_m = tl.log(m)
        term = beta * _excess(t, log_t, m, log_m) + (1.0 - beta) * _excess(s, log_s, m, log_m)
        slope = tl.where(s == 0.0, 0.0, (1.0 - beta) * s * (log_s - log_m))
    return term, slope, s, t


@triton.jit
def _or_zero(x):
    return tl.where(x == -INFINITY, 0.0, x)


@triton.jit
def _listed_rows(ids_row, logits_row, teacher_row, listed, place, mask, vocabulary):
    """Which places [BLOCK_M, BLOCK_N] hold ids of the vocabulary, and both sides' logits there, -inf elsewhere."""
    id = tl.load(ids_row[:, None] + place, mask=mask[:, None] & (place < listed), other=-1)
    there = (id >= 0) & (id < vocabulary)
    z = tl.load(logits_row[:, None] + place, mask=there, other=-INFINITY).to(tl.float64)
    return there, z, tl.load(teacher_row[:, None] + place, mask=there, other=-INFINITY).to(tl.float64)


@triton.jit(do_not_specialize=["tokens", "listed", "ignore_index"])
def linear_topk_distillation_fwd_merge_kernel(
    target_ptr,
    ids_ptr,
    teacher_ptr,
    stats_ptr,
    logits_ptr,
    losses_ptr,
    gradient_ptr,
    norm_ptr,
    tokens,
    listed,
    blocks,
    vocabulary,
    ignore_index,
    beta,
    TAIL: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = token < tokens
    kept = there & (tl.load(target_ptr + token, mask=there, other=0) != ignore_index)
    # 1 - beta in float64 too
    beta = tl.full([], beta, tl.float64)
    peak = tl.full([BLOCK_M], -INFINITY, tl.float64)
    total = tl.zeros([BLOCK_M], tl.float64)
    for block in range(blocks):
        part = stats_ptr + (token * blocks + block) * 2
        largest = tl.load(part, mask=kept, other=0.0).to(tl.float64)
        top = tl.maximum(peak, largest)
        added = tl.load(part + 1, mask=kept, other=0.0).to(tl.float64)
        added *= tl.exp(tl.where(largest == -INFINITY, 0.0, largest - top))
        total = total * tl.exp(tl.where(peak == -INFINITY, 0.0, peak - top)) + added
        peak = top

    ids_row, teacher_row, logits_row = (
        ids_ptr + token * listed,
        teacher_ptr + token * listed,
        logits_ptr + token * listed,
    )
    top_s = tl.full([BLOCK_M], -INFINITY, tl.float64)
    if TAIL != RENORMALIZE:
        top_s = peak
    top_t = tl.full([BLOCK_M], -INFINITY, tl.float64)
    known = tl.zeros([BLOCK_M], tl.int32)
    wrong = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, listed, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)[None, :]
        here, z, log_t = _listed_rows(ids_row, logits_row, teacher_row, listed, place, kept, vocabulary)
        id = tl.load(ids_row[:, None] + place, mask=kept[:, None] & (place < listed), other=-1)
        following = tl.load(ids_row[:, None] + place + 1, mask=kept[:, None] & (place + 1 < listed), other=-1)
        bad = (id < -1) | (id >= vocabulary) | (here & (id == following))
        wrong = tl.maximum(wrong, tl.max(bad.to(tl.int32), 1))
        known += tl.sum(here.to(tl.int32), 1)
        top_s, top_t = tl.maximum(top_s, tl.max(z, 1)), tl.maximum(top_t, tl.max(log_t, 1))
    top_s, top_t = _or_zero(top_s), _or_zero(top_t)
    sum_s = tl.zeros([BLOCK_M], tl.float64)
    sum_t = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, listed, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)[None, :]
        here, z, log_t = _listed_rows(ids_row, logits_row, teacher_row, listed, place, kept, vocabulary)
        sum_s += tl.sum(tl.exp(z - top_s[:, None]), 1)
        sum_t += tl.sum(tl.exp(log_t - top_t[:, None]), 1)

    rest = tl.zeros([BLOCK_M], tl.float64)
    shift = tl.zeros([BLOCK_M], tl.float64)
    if TAIL == RENORMALIZE:
        shift = top_t + _or_zero(tl.log(sum_t))
    else:
        rest = total * tl.exp(_or_zero(peak) - top_s)
    # of the student's masses, relative to top_s
    log_sum = _or_zero(tl.log(sum_s + rest))
    lse = top_s + log_sum
    tail_log_s = tl.log(rest) - log_sum
    terms = tl.zeros([BLOCK_M], tl.float64)
    tail_slope = tl.zeros([BLOCK_M], tl.float64)
    students = tl.zeros([BLOCK_M], tl.float64)
    teachers = tl.zeros([BLOCK_M], tl.float64)
    whole = there
    if TAIL == BUCKET:
        tail_t = 1.0 - sum_t * tl.exp(top_t)
        used = (known < vocabulary) & (tail_t > 0.0) & (rest != 0.0)
        whole = used | (known == vocabulary)
        terms, tail_slope, students, teachers = _category(
            tl.where(used, tail_log_s, -INFINITY), tl.log(tl.where(used, tail_t, 0.0)), beta, KIND
        )
    slopes = tail_slope
    for start in range(0, listed, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)[None, :]
        here, z, log_t = _listed_rows(ids_row, logits_row, teacher_row, listed, place, kept, vocabulary)
        a, b, c, d = _category(z - lse[:, None], log_t - shift[:, None], beta, KIND)
        # padding weighs nothing, whatever lse is
        terms += tl.sum(tl.where(here, a, 0.0), 1)
        slopes += tl.sum(tl.where(here, b, 0.0), 1)
        students += tl.sum(tl.where(here, c, 0.0), 1)
        teachers += tl.sum(tl.where(here, d, 0.0), 1)
    if TAIL != RENORMALIZE:
        # the sum that was asked for, where the sides' sums over it differ
        if TAIL == BUCKET:
            differ = tl.where(whole, 0.0, teachers - students)
        else:
            differ = teachers - students
        if KIND == FORWARD:
            terms += differ
        elif KIND == REVERSE:
            terms -= differ
    ok = wrong == 0
    for start in range(0, listed, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)[None, :]
        here, z, log_t = _listed_rows(ids_row, logits_row, teacher_row, listed, place, kept, vocabulary)
        a, b, c, d = _category(z - lse[:, None], log_t - shift[:, None], beta, KIND)
        gradient = tl.where(ok[:, None], tl.where(here, b - c * slopes[:, None], 0.0), float("nan"))
        gradient = tl.where(kept[:, None], gradient, 0.0)
        tl.store(
            gradient_ptr + token[:, None] * (listed + 1) + place,
            gradient.to(tl.float32),
            mask=there[:, None] & (place < listed),
        )
    gradient = tl.where(ok, tail_slope - tl.exp(tail_log_s) * slopes, float("nan"))
    tl.store(gradient_ptr + token * (listed + 1) + listed, tl.where(kept, gradient, 0.0).to(tl.float32), mask=there)
    losses = tl.where(ok, terms, float("nan"))
    tl.store(losses_ptr + token, tl.where(kept, losses, 0.0).to(tl.float32), mask=there)
    # shares of others where there are none are exp(z - 0 - inf)
    empty = total == 0.0
    tl.store(norm_ptr + token, tl.where(empty | ~kept, 0.0, peak).to(tl.float32), mask=there)
    log_total = tl.where(kept, tl.where(empty, INFINITY, tl.log(total)), 0.0)
    tl.store(norm_ptr + tokens + token, log_total.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["tokens", "listed", "first", "ids"])
def linear_topk_distillation_bwd_kernel(
    head,
    ids_ptr,
    order_ptr,
    count_ptr,
    norm_ptr,
    coefficients_ptr,
    dz_ptr,
    dz_row,
    bias_sums_ptr,
    tokens,
    listed,
    hidden,
    first,
    ids,
    temperature,
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
    id = first + column
    z = logits_of(head, token, kept, id.to(tl.int64), inside, hidden, 1.0, 0.0, BLOCK_M, BLOCK_N, BLOCK_K, False)
    peak = tl.load(norm_ptr + token, mask=kept, other=0.0)
    log_total = tl.load(norm_ptr + tokens.to(tl.int64) + token, mask=kept, other=0.0)
    of_token = coefficients_ptr + token * (listed + 1)
    of_rest = tl.load(of_token + listed, mask=kept, other=0.0)
    dz = of_rest[:, None] * tl.exp((z / temperature - peak[:, None]) - log_total[:, None])
    ids_row = ids_ptr + token * listed
    begin = first + tl.program_id(1) * BLOCK_N
    stop = tl.minimum(begin + BLOCK_N, first + ids)
    place = _first_listed(ids_row, listed, begin, kept)
    next = _listed_at(ids_row, listed, place, kept)
    while tl.min(next, 0) < stop:
        met = next < stop
        own = tl.load(of_token + place, mask=met, other=0.0)
        dz = tl.where(id[None, :] == next[:, None], own[:, None], dz)
        place += met.to(tl.int32)
        next = _listed_at(ids_row, listed, place, kept)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + tile * dz_row + column, tl.sum(tl.where(kept[:, None], dz, 0.0), 0), mask=inside)
    out = dz_ptr + row[:, None] * dz_row + column[None, :]
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=kept[:, None] & inside[None, :])


def linear_topk_distillation_fwd(
    x, weight, target, bias, teacher_logp, teacher_ids, beta, tail, temperature, ignore_index
):
    (tokens, hidden), vocabulary, listed = x.shape, weight.shape[0], teacher_ids.shape[1]
    blocks = triton.cdiv(vocabulary, STATS_BLOCK)
    losses, gradient, norm = (
        x.new_empty(shape, dtype=torch.float32) for shape in ((tokens,), (tokens, listed + 1), (2, tokens))
    )
    if tokens == 0:
        return losses, gradient, norm
    stats = x.new_empty((tokens, blocks, 2), dtype=torch.float32)
    logits = x.new_empty((tokens, listed), dtype=torch.float32)
    order, count = kept_first(target, ignore_index)
    tile = logits_config(tokens, x)
    if x.element_size() > 2:
        # places in the lists take registers too
        tile = replace(tile, block_k=16)
    with on_device(x):
        linear_topk_distillation_fwd_kernel[(triton.cdiv(tokens, tile.block_m), blocks)](
            Head(Matrix.of(x), Matrix.of(weight), bias, None),
            teacher_ids,
            order,
            count,
            stats,
            logits,
            tokens,
            listed,
            hidden,
            vocabulary,
            float(temperature),
            SPAN=STATS_BLOCK,
            **constants(tile),
        )
        linear_topk_distillation_fwd_merge_kernel[(triton.cdiv(tokens, 16),)](
            target,
            teacher_ids,
            teacher_logp,
            stats,
            logits,
            losses,
            gradient,
            norm,
            tokens,
            listed,
            blocks,
            vocabulary,
            ignore_index,
            float(beta),
            TAIL=TAILS[tail],
            KIND=0 if beta == 0 else 1 if beta == 1 else 2,
            BLOCK_M=16,
            BLOCK_N=16,
            num_warps=4,
        )
    return losses, gradient, norm


def linear_topk_distillation_bwd(
    x, weight, target, bias, teacher_ids, norm, coefficients, factor, temperature, ignore_index, *needs
):
    def write(block: Block) -> None:
        with on_device(x):
            linear_topk_distillation_bwd_kernel[block.grid](
                block.head,
                teacher_ids,
                block.order,
                block.count,
                norm,
                coefficients,
                block.dz,
                block.dz.stride(0),
                block.bias_sums,
                x.shape[0],
                teacher_ids.shape[1],
                x.shape[1],
                block.first,
                block.ids,
                float(temperature),
                **constants(block.tile),
            )

    return head_gradients(x, weight, target, bias, None, factor, ignore_index, *needs, write)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    passes = ("linear_topk_distillation_fwd_kernel", "linear_topk_distillation_bwd_kernel")
    for dtype in ("bf16", "fp32"):
        wanted = ("LDG.128", "MMA") if dtype == "bf16" else ("LDG.128",)
        x, weight = tensor(dtype, 4096, 4096), tensor(dtype, 128256, 4096)
        teacher = tensor("fp32", 4096, 64), tensor("i64", 4096, 64)
        yield AotCase(
            dtype, train("linear_topk_distillation", x, weight, *teacher), expect={name: wanted for name in passes}
        )
