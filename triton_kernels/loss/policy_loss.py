"""policy_loss: a program for each span of a sequence, and one more that adds up their sums in their order.

A span is a whole sequence where something is a mean over it, or where sequences are packed; otherwise at most ``SPAN``
tokens of one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import constants, on_device

# tokens of a span that need not be a whole sequence
SPAN = 4096
# sums of a span: tokens; clipped low, high, dual; k1; k3; ratio; the largest ratio; loss
COLUMNS = 9
INFINITY = float("inf")


class Given(NamedTuple):
    """Tensors of the call, flat and contiguous; None where they are not given."""

    logp: Any
    advantages: Any
    old_logp: Any
    ref_logp: Any
    mask: Any
    token_weight: Any
    cu_seqlens: Any


class Rule(NamedTuple):
    """What the loss is, for the compiler."""

    KIND: Any
    KL: Any  # "none" where it has no weight
    KL_WEIGHTED: Any
    BY_SEQUENCE: Any  # one ratio for each sequence
    PER_SEQUENCE: Any  # one advantage for each sequence


@functools.lru_cache
def rule(*values: Any) -> Rule:
    return Rule(*map(tl.constexpr, values))


@triton.jit
def _limited(x, limit):
    """NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _inside(x, limit):
    return ((x > limit) | (x < -limit)) == 0


@triton.jit
def _nonzero(factor, x):
    """factor * x, where a factor of 0 gives 0 even times inf."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _k3(e):
    """exp(e) - e - 1, by its series where that cancels."""
    series = 1.0 + e * (1.0 / 11.0)
    series = 1.0 + series * e * (1.0 / 10.0)
    series = 1.0 + series * e * (1.0 / 9.0)
    series = 1.0 + series * e * (1.0 / 8.0)
    series = 1.0 + series * e * (1.0 / 7.0)
    series = 1.0 + series * e * (1.0 / 6.0)
    series = 1.0 + series * e * (1.0 / 5.0)
    series = 1.0 + series * e * (1.0 / 4.0)
    series = 1.0 + series * e * (1.0 / 3.0)
    return tl.where(tl.abs(e) < 1.0, e * e * 0.5 * series, tl.exp(e) - 1.0 - e)


@triton.jit
def _span(given, tokens, length, span):
    """This program's (sequence, first token, number of tokens)."""
    if given.cu_seqlens is not None:
        sequence = tl.program_id(0).to(tl.int64)
        end = tl.minimum(tl.load(given.cu_seqlens + sequence + 1).to(tl.int64), tokens)
        begin = tl.maximum(tl.load(given.cu_seqlens + sequence).to(tl.int64), 0)
    else:
        parts = tl.maximum(tl.cdiv(length, span), 1)
        sequence = (tl.program_id(0) // parts).to(tl.int64)
        inside = (tl.program_id(0) % parts).to(tl.int64) * span
        begin = sequence * length + inside
        end = begin + tl.minimum(length - inside, span)
    return sequence, begin, tl.maximum(end - begin, 0).to(tl.int32)


@triton.jit
def _places(given, begin, size, start, BLOCK: tl.constexpr):
    """A block's tokens, which of them are the span's, and which of those are kept."""
    column = start + tl.arange(0, BLOCK)
    at, inside = begin + column, column < size
    keep = inside
    if given.mask is not None:
        keep = inside & (tl.load(given.mask + at, inside, 0) != 0)
    return at, inside, keep


@triton.jit
def _log_ratio(given, at, keep):
    """Of the two policies, [BLOCK]; 0 where masked, and without the old one."""
    if given.old_logp is None:
        x = tl.zeros(at.shape, tl.float32)
    else:
        x = tl.load(given.logp + at, keep, 0.0) - tl.load(given.old_logp + at, keep, 0.0)
    return x


@triton.jit
def _mean(given, begin, size, BLOCK: tl.constexpr, BY_SEQUENCE: tl.constexpr):
    """(tokens kept, but 1 at least; the mean of their log-ratios, where the ratio is the sequence's)."""
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at, _, keep = _places(given, begin, size, start, BLOCK)
        count += keep.to(tl.float32)
        if BY_SEQUENCE:
            total += _log_ratio(given, at, keep)
    kept = tl.maximum(tl.sum(count), 1.0)
    return kept, tl.div_rn(tl.sum(total), kept)


@triton.jit
def _policy(log_ratio, mean, a, logp, low, high, dual, limit, RULE):
    """Of each token [BLOCK]: the loss, its derivatives in the ratio's logarithm and in logp, clips, and the ratio."""
    if RULE.BY_SEQUENCE:
        log_ratio = tl.zeros(a.shape, tl.float32) + mean
    ratio = tl.exp(_limited(log_ratio, limit))
    clipped_low = (a < 0.0) & (ratio < low)
    clipped_high = (a > 0.0) & (ratio > high)
    clipped_dual = (a < 0.0) & (ratio > dual)
    zero = tl.zeros(a.shape, tl.float32)
    if RULE.KIND == "clip":
        used = tl.where(clipped_dual, dual, ratio)
        used = tl.where(clipped_high, high, used)
        used = tl.where(clipped_low, low, used)
        loss, dlogp = _nonzero(-a, used), zero
        clipped = clipped_low | clipped_high | clipped_dual
        dratio = tl.where(_inside(log_ratio, limit) & (clipped == 0), _nonzero(-a, ratio), 0.0)
    else:
        clipped_low = tl.zeros(a.shape, tl.int1)
        clipped_high, clipped_dual = clipped_low, clipped_low
        used = zero + 1.0
        if RULE.KIND == "cispo":
            clipped_high = ratio > high
            used = tl.where(clipped_high, high, ratio)
        dlogp, dratio = _nonzero(-a, used), zero
        loss = _nonzero(dlogp, logp)
    return loss, dratio, dlogp, clipped_low, clipped_high, clipped_dual, ratio


@triton.jit
def _divergence(given, at, keep, log_ratio, logp, limit, RULE):
    """Of each token [BLOCK]: k1, k3, the divergence that is asked for and its derivative in logp."""
    k1 = tl.zeros(at.shape, tl.float32)
    k3 = k1
    value, slope = k1, k1
    if given.ref_logp is not None:
        difference = tl.load(given.ref_logp + at, keep, 0.0) - logp
        e = _limited(difference, limit)
        k1, k3 = -e, _k3(e)
        if RULE.KL == "k1":
            value, slope = k1, tl.zeros(at.shape, tl.float32) + 1.0
        elif RULE.KL == "k2":
            value, slope = e * e * 0.5, k1
        elif RULE.KL == "k3":
            value, slope = k3, -(k3 + e)
        elif RULE.KL == "k3+":
            value, slope = k3, k1
        if RULE.KL != "none":
            slope = tl.where(_inside(difference, limit), slope, 0.0)
            if RULE.KL_WEIGHTED:
                ratio = tl.exp(_limited(log_ratio, limit))
                slope = ratio * (slope + tl.where(_inside(log_ratio, limit), value, 0.0))
                value = ratio * value
    return k1, k3, value, slope


@triton.jit
def _load(given, sequence, at, keep, RULE):
    """(log-ratio, logp, advantage, weight) of each token [BLOCK], neutral where masked."""
    logp = tl.load(given.logp + at, keep, 0.0)
    a_at = at
    if RULE.PER_SEQUENCE:
        a_at = sequence + tl.zeros(at.shape, tl.int64)
    a = tl.load(given.advantages + a_at, keep, 0.0)
    weight = keep.to(tl.float32)
    if given.token_weight is not None:
        weight = tl.load(given.token_weight + at, keep, 0.0)
    return _log_ratio(given, at, keep), logp, a, weight


@triton.jit(do_not_specialize=["tokens", "length", "span", "low", "high", "dual", "beta", "limit"])
def policy_loss_fwd_kernel(
    given,
    loss_ptr,
    sums_ptr,
    tokens,
    length,
    span,
    low,
    high,
    dual,
    beta,
    limit,
    RULE,
    BLOCK: tl.constexpr,
):
    """sums [COLUMNS, spans], and with loss_ptr each token's loss."""
    sequence, begin, size = _span(given, tokens, length, span)
    mean = 0.0
    if RULE.BY_SEQUENCE:
        mean = _mean(given, begin, size, BLOCK, True)[1]
    count = tl.zeros([BLOCK], tl.float32)
    low_sum, high_sum, dual_sum, k1_sum = count, count, count, count
    k3_sum, ratio_sum, largest, loss_sum = count, count, count, count
    for start in range(0, size, BLOCK):
        at, inside, keep = _places(given, begin, size, start, BLOCK)
        log_ratio, logp, a, weight = _load(given, sequence, at, keep, RULE)
        loss, _, _, is_low, is_high, is_dual, ratio = _policy(log_ratio, mean, a, logp, low, high, dual, limit, RULE)
        k1, k3, value, _ = _divergence(given, at, keep, log_ratio, logp, limit, RULE)
        if RULE.KL != "none":
            loss += beta * value
        loss = _nonzero(weight, loss)
        if loss_ptr is not None:
            tl.store(loss_ptr + at, loss, inside)
        ratio = tl.where(keep, ratio, 0.0)
        count += keep.to(tl.float32)
        low_sum += is_low.to(tl.float32)
        high_sum += (is_high & keep).to(tl.float32)
        dual_sum += is_dual.to(tl.float32)
        k1_sum += k1
        k3_sum += k3
        ratio_sum += ratio
        largest = tl.maximum(largest, ratio)
        loss_sum += loss
    out, spans = sums_ptr + tl.program_id(0), tl.num_programs(0).to(tl.int64)
    tl.store(out, tl.sum(count))
    tl.store(out + spans, tl.sum(low_sum))
    tl.store(out + 2 * spans, tl.sum(high_sum))
    tl.store(out + 3 * spans, tl.sum(dual_sum))
    tl.store(out + 4 * spans, tl.sum(k1_sum))
    tl.store(out + 5 * spans, tl.sum(k3_sum))
    tl.store(out + 6 * spans, tl.sum(ratio_sum))
    tl.store(out + 7 * spans, tl.max(largest))
    tl.store(out + 8 * spans, tl.sum(loss_sum))


@triton.jit
def _divisor(num_items_ptr, count, sequences, REDUCTION: tl.constexpr):
    if REDUCTION != "token" and REDUCTION != "sequence":
        divisor = 1.0
    elif num_items_ptr is not None:
        divisor = tl.load(num_items_ptr)
    elif REDUCTION == "token":
        divisor = count
    else:
        divisor = sequences.to(tl.float32)
    return divisor


@triton.jit(do_not_specialize=["spans", "sequences"])
def policy_loss_fwd_sum_kernel(
    sums_ptr,
    num_items_ptr,
    loss_ptr,
    stats_ptr,
    spans,
    sequences,
    REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of all spans in float64, each lane's in order; stats [8] and, but for "none", the loss."""
    column = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, spans, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        inside = row < spans
        at = sums_ptr + column[:, None].to(tl.int64) * spans + row[None, :]
        value = tl.load(at, (column < COLUMNS)[:, None] & inside[None, :], 0.0).to(tl.float64)
        if REDUCTION == "sequence":
            size = tl.maximum(tl.load(sums_ptr + row, inside, 1.0), 1.0).to(tl.float64)
            value = tl.where((column == COLUMNS - 1)[:, None], value / size[None, :], value)
        total += value
        largest = tl.maximum(largest, tl.load(sums_ptr + 7 * spans.to(tl.int64) + row, inside, 0.0))
    sums = tl.sum(total, 1)
    count = tl.sum(tl.where(column == 0, sums, 0.0))
    ratio = tl.sum(tl.where(column == 6, sums, 0.0))
    stats = tl.where(column == 0, sums, sums / tl.maximum(count, 1.0)).to(tl.float32)
    # maxima leave NaN out
    stats = tl.where(column == 7, tl.where(ratio == ratio, tl.max(largest), float("nan")), stats)
    tl.store(stats_ptr + column, stats, column < COLUMNS - 1)
    if loss_ptr is not None:
        divisor = _divisor(num_items_ptr, count, sequences, REDUCTION)
        loss = tl.sum(tl.where(column == COLUMNS - 1, sums, 0.0))
        tl.store(loss_ptr, tl.where(divisor == 0.0, 0.0, loss / divisor).to(tl.float32))


@triton.jit(do_not_specialize=["tokens", "sequences", "length", "span", "low", "high", "dual", "beta", "limit"])
def policy_loss_bwd_kernel(
    given,
    dloss_ptr,
    stats_ptr,
    num_items_ptr,
    dlogp_ptr,
    tokens,
    sequences,
    length,
    span,
    low,
    high,
    dual,
    beta,
    limit,
    RULE,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence, begin, size = _span(given, tokens, length, span)
    kept, mean = 1.0, 0.0
    if RULE.BY_SEQUENCE or REDUCTION == "sequence":
        kept, mean = _mean(given, begin, size, BLOCK, RULE.BY_SEQUENCE)
    one = 0.0
    if REDUCTION != "none":
        divisor = _divisor(num_items_ptr, tl.load(stats_ptr), sequences, REDUCTION)
        one = tl.where(divisor == 0.0, 0.0, tl.div_rn(tl.load(dloss_ptr), divisor))
        if REDUCTION == "sequence":
            one = tl.div_rn(one, kept)
    # of the sequence's ratio the first pass collects what the second one spreads
    spread = 0.0
    if RULE.BY_SEQUENCE and RULE.KIND == "clip":
        collected = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            at, inside, keep = _places(given, begin, size, start, BLOCK)
            log_ratio, logp, a, weight = _load(given, sequence, at, keep, RULE)
            upstream = one if REDUCTION != "none" else tl.load(dloss_ptr + at, keep, 0.0)
            _, dratio, _, _, _, _, _ = _policy(log_ratio, mean, a, logp, low, high, dual, limit, RULE)
            collected += _nonzero(_nonzero(weight, upstream), dratio)
        spread = tl.div_rn(tl.sum(collected), kept)
    for start in range(0, size, BLOCK):
        at, inside, keep = _places(given, begin, size, start, BLOCK)
        log_ratio, logp, a, weight = _load(given, sequence, at, keep, RULE)
        upstream = one if REDUCTION != "none" else tl.load(dloss_ptr + at, keep, 0.0)
        _, dratio, dlogp, _, _, _, _ = _policy(log_ratio, mean, a, logp, low, high, dual, limit, RULE)
        _, _, _, slope = _divergence(given, at, keep, log_ratio, logp, limit, RULE)
        if RULE.KL != "none":
            dlogp += beta * slope
        factor = _nonzero(weight, upstream)
        through = _nonzero(factor, dratio)
        if RULE.BY_SEQUENCE and RULE.KIND == "clip":
            through = tl.where(keep, spread, 0.0)
        tl.store(dlogp_ptr + at, through + _nonzero(factor, dlogp), inside)


@dataclass(frozen=True)
class Config:
    """Tokens of one step of a program."""

    block: int
    num_warps: int


# four tokens for each thread: nine sums and what they are made of stay in registers
TILE = Config(block=1024, num_warps=8)


class Launch(NamedTuple):
    """What both directions launch with."""

    spans: int
    sequences: int
    given: Given
    numbers: dict[str, Any]
    options: dict[str, Any]


def _launch(
    logp,
    advantages,
    old_logp,
    ref_logp,
    mask,
    token_weight,
    cu_seqlens,
    kind,
    level,
    clip_low,
    clip_high,
    dual_clip,
    kl,
    kl_beta,
    kl_weighted,
    log_ratio_limit,
    reduction,
) -> Launch:
    by_sequence = "sequence" in (level, reduction)
    tokens = logp.numel()
    sequences, length = logp.shape if logp.dim() == 2 else (1, tokens)
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        length = span = tokens
        spans = sequences
    else:
        span = max(1, length if by_sequence else min(length, SPAN))
        spans = sequences * max(1, triton.cdiv(length, span))
    per_sequence = advantages.dim() == 2 and advantages.shape[1] == 1
    given = Given(
        logp, advantages, old_logp, ref_logp, None if mask is None else mask.view(torch.uint8), token_weight, cu_seqlens
    )
    numbers = {
        "tokens": tokens,
        "length": length,
        "span": span,
        "low": 1.0 - clip_low,
        "high": 1.0 + clip_high,
        "dual": dual_clip or INFINITY,
        "beta": kl_beta,
        "limit": log_ratio_limit or INFINITY,
    }
    has_kl = kl_beta != 0
    flags = rule(kind, kl if has_kl else "none", has_kl and kl_weighted, level == "sequence", per_sequence)
    return Launch(spans, sequences, given, numbers, {"RULE": flags, **constants(TILE)})


def policy_loss_fwd(logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, num_items, *options):
    reduction = options[-1]
    call = _launch(logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, *options)
    each = reduction == "none"
    # tokens outside of all sequences have no other writer
    loss = torch.zeros_like(logp) if each else logp.new_empty(())
    sums, stats = logp.new_empty(COLUMNS, call.spans), logp.new_empty(COLUMNS - 1)
    with on_device(logp):
        if call.spans:
            policy_loss_fwd_kernel[(call.spans,)](
                call.given, loss if each else None, sums, **call.numbers, **call.options
            )
        policy_loss_fwd_sum_kernel[(1,)](
            sums,
            num_items,
            None if each else loss,
            stats,
            call.spans,
            call.sequences,
            REDUCTION=reduction,
            COLUMNS=COLUMNS,
            BLOCK_M=16,
            BLOCK_N=64,
            num_warps=4,
        )
    return loss, stats


def policy_loss_bwd(
    dloss, stats, logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, num_items, *options
):
    call = _launch(logp, advantages, old_logp, ref_logp, mask, token_weight, cu_seqlens, *options)
    dlogp = torch.empty_like(logp) if cu_seqlens is None else torch.zeros_like(logp)
    if call.spans:
        with on_device(logp):
            policy_loss_bwd_kernel[(call.spans,)](
                call.given,
                dloss,
                stats,
                num_items,
                dlogp,
                sequences=call.sequences,
                REDUCTION=options[-1],
                **call.numbers,
                **call.options,
            )
    return dlogp


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    answers = tensor("fp32", 32, 1024)
    grpo = answers, tensor("fp32", 32), answers, answers, tensor("bool", 32, 1024)
    yield AotCase("grpo", train("policy_loss", *grpo, kl_beta=0.04, reduction="sequence"))
    packed, bounds = tensor("fp32", 32768), tensor("i32", 33)
    yield AotCase(
        "packed",
        train("policy_loss", *(packed,) * 4, None, packed, bounds, kl="k3+", kl_beta=0.04, kl_weighted=True),
    )
    gspo = packed, tensor("fp32", 32), packed, packed, None, None, bounds
    yield AotCase("gspo", train("policy_loss", *gspo, kl_beta=0.04, level="sequence", reduction="sequence"))
    yield AotCase("cispo", train("policy_loss", *(packed,) * 3, kind="cispo"))
    yield AotCase("reinforce", train("policy_loss", packed, packed, kind="reinforce", reduction="none"))
