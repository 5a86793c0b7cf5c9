"""moe_route: one program routes a few rows; a row's experts lie in registers as [groups, experts per group]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import RowConfig, constants, on_device


@triton.jit
def _softplus(x):
    t = tl.exp(-tl.abs(x))
    u = 1.0 + t
    # log1p(t): the quotient cancels the rounding of 1 + t
    log1p = tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    # maximum may drop NaN, adding x * 0 would lose infinities: choose instead
    return tl.where(x > 0, x, tl.where(x != x, x, 0.0)) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _elementwise_score(x, SCORE: tl.constexpr):
    if SCORE == "sigmoid":
        s = _sigmoid(x)
    elif SCORE == "sqrtsoftplus":
        s = tl.sqrt_rn(_softplus(x))
    else:
        s = x
    return s


@triton.jit
def _ordered(x, nan):
    """float32 -> int32 with the same order, -0 equal to 0 and NaN below -inf; INT_MIN stays free for masked."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(nan, -2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit(do_not_specialize=["tokens"])
def moe_route_fwd_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    tokens,
    stride_t,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    MEMBERS_PAD: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
):
    PER: tl.constexpr = EXPERTS // GROUPS
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, GROUPS_PAD)
    member = tl.arange(0, MEMBERS_PAD)
    expert = group[:, None] * PER + member[None, :]  # [GP, PP]
    real = ((group[:, None] < GROUPS) & (member[None, :] < PER))[None, :, :]  # [1, GP, PP]
    inside = real & (row < tokens)[:, None, None]
    x = tl.load(
        logits_ptr + row.to(tl.int64)[:, None, None] * stride_t + expert[None, :, :], mask=inside, other=float("-inf")
    ).to(tl.float32)  # [ROWS, GP, PP]
    nan = x != x

    if SCORE == "softmax":
        top = tl.max(tl.max(tl.where(nan, float("-inf"), x), axis=2), axis=1)[:, None, None]
        e = tl.where(real, tl.exp(x - top), 0.0)
        s = e / tl.sum(tl.sum(e, axis=2), axis=1)[:, None, None]
        if bias_ptr is not None or (TOP2 and GROUPS > 1):
            # NaN is set aside and the largest logit counts 1 even when it is infinite
            e = tl.where(nan | (real == 0), 0.0, tl.where(x == top, 1.0, e))
            biased = tl.where(nan, x, e / tl.sum(tl.sum(e, axis=2), axis=1)[:, None, None])
        else:
            biased = x
    else:
        s = _elementwise_score(x, SCORE)
        biased = s
    if bias_ptr is not None:
        biased += tl.load(bias_ptr + expert, mask=(group[:, None] < GROUPS) & (member[None, :] < PER), other=0.0).to(
            tl.float32
        )[None, :, :]
    # without a bias, logits order like softmax scores and do not underflow to ties
    key_value = x if SCORE == "softmax" and bias_ptr is None else biased
    key_nan = key_value != key_value
    key = _ordered(key_value, key_nan)

    if GROUPS > 1:
        of_group = (biased if TOP2 else key_value) + tl.zeros([BLOCK_T, GROUPS_PAD, MEMBERS_PAD], tl.float32)
        of_group = tl.where((of_group != of_group) | (real == 0), float("-inf"), of_group)
        best = tl.max(of_group, axis=2)  # [ROWS, GP]
        if TOP2 and PER > 1:
            # the second best: drop one occurrence of the best, the first
            at = tl.min(tl.where(of_group == best[:, :, None], member[None, None, :], MEMBERS_PAD), axis=2)
            second = tl.max(tl.where(member[None, None, :] == at[:, :, None], float("-inf"), of_group), axis=2)
            best += second
            # inf - inf
            best = tl.where(best != best, float("-inf"), best)
        packed = (_ordered(best, best != best).to(tl.int64) << 32) + (0x7FFFFFFF - group)[None, :]
        packed = tl.where((group < GROUPS)[None, :], packed, -0x8000000000000000)
        kept = tl.zeros([BLOCK_T, GROUPS_PAD], tl.int32)
        for _ in range(TOPK_GROUP):
            chosen = packed == tl.max(packed, axis=1)[:, None]
            kept = tl.where(chosen, 1, kept)
            packed = tl.where(chosen, -0x8000000000000000, packed)
        key = tl.where((kept != 0)[:, :, None], key, -2147483648)

    key = tl.where(real, key, -2147483648)
    keys = (key.to(tl.int64) << 32) + (0x7FFFFFFF - expert)[None, :, :]
    keys = tl.reshape(keys, [BLOCK_T, GROUPS_PAD * MEMBERS_PAD])
    flat_s = tl.reshape(s, [BLOCK_T, GROUPS_PAD * MEMBERS_PAD])
    slot = tl.arange(0, TOP_K_PAD)
    chosen_s = tl.zeros([BLOCK_T, TOP_K_PAD], tl.float32)
    chosen_id = tl.zeros([BLOCK_T, TOP_K_PAD], tl.int32)
    for j in range(TOP_K):
        best_key = tl.max(keys, axis=1)  # [ROWS]
        best_id = 0x7FFFFFFF - (best_key & 0x7FFFFFFF).to(tl.int32)
        hit = keys == best_key[:, None]
        best_s = tl.sum(tl.where(hit, flat_s, 0.0), axis=1)
        chosen_s = tl.where(slot[None, :] == j, best_s[:, None], chosen_s)
        chosen_id = tl.where(slot[None, :] == j, best_id[:, None], chosen_id)
        keys = tl.where(hit, -0x8000000000000000, keys)

    if RENORMALIZE:
        chosen_s = tl.div_rn(
            chosen_s, tl.sum(chosen_s, axis=1)[:, None] + 1e-20 + tl.zeros([BLOCK_T, TOP_K_PAD], tl.float32)
        )
    w = chosen_s * scale
    if NAN_ZERO:
        bad = tl.max((w != w).to(tl.int32), axis=1)
        w = tl.where((bad != 0)[:, None], 0.0, w)
    out = row.to(tl.int64)[:, None] * TOP_K + slot[None, :]
    stored = (row < tokens)[:, None] & (slot < TOP_K)[None, :]
    tl.store(weights_ptr + out, w, mask=stored)
    tl.store(ids_ptr + out, chosen_id, mask=stored)


@triton.jit(do_not_specialize=["tokens"])
def moe_route_bwd_kernel(
    dweights_ptr,
    logits_ptr,
    ids_ptr,
    dlogits_ptr,
    tokens,
    stride_t,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXPERTS_PAD: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row64 = row.to(tl.int64)[:, None]
    valid = (row < tokens)[:, None]
    expert = tl.arange(0, EXPERTS_PAD)[None, :]
    inside = valid & (expert < EXPERTS)
    slot = tl.arange(0, TOP_K_PAD)[None, :]
    slots = valid & (slot < TOP_K)
    chosen = tl.load(ids_ptr + row64 * TOP_K + slot, mask=slots, other=0)  # [ROWS, KP]
    d = tl.load(dweights_ptr + row64 * TOP_K + slot, mask=slots, other=0.0).to(tl.float32) * scale  # [ROWS, KP]
    xc = tl.load(logits_ptr + row64 * stride_t + chosen, mask=slots, other=0.0).to(tl.float32)
    if SCORE == "softmax":
        x = tl.load(logits_ptr + row64 * stride_t + expert, mask=inside, other=float("-inf")).to(
            tl.float32
        )  # [ROWS, EP]
        top = tl.max(tl.where(x != x, float("-inf"), x), axis=1)[:, None]
        e = tl.where(expert < EXPERTS, tl.exp(x - top), 0.0)
        norm = tl.sum(e, axis=1)[:, None]
        s = e / norm
        sc = tl.exp(xc - top) / norm
    else:
        sc = _elementwise_score(xc, SCORE)
    sc = tl.where(slots, sc, 0.0)
    total = tl.sum(sc, axis=1)[:, None] + 1e-20
    dot = tl.sum(d * sc, axis=1)[:, None]
    inner = dot
    w = sc * scale
    if RENORMALIZE:
        d = (d - dot / total) / total
        # renormalised weights do not move with a common factor, up to eps
        inner = dot * 1e-20 / (total * total)
        w = sc / total * scale
    if SCORE == "sigmoid":
        d *= sc * (1.0 - sc)
    elif SCORE == "sqrtsoftplus":
        d *= tl.where(sc == 0, 0.0, _sigmoid(xc) / (2.0 * tl.where(sc == 0, 1.0, sc)))
    # elementwise scores leave the experts that were not chosen at exactly 0, whatever their logits hold
    dx = tl.zeros([BLOCK_T, EXPERTS_PAD], tl.float32)
    for j in range(TOP_K):
        at = slot == j
        dx = tl.where(
            expert == tl.sum(tl.where(at, chosen, 0), axis=1)[:, None],
            tl.sum(tl.where(at, d, 0.0), axis=1)[:, None],
            dx,
        )
    if SCORE == "softmax":
        dx = s * (dx - inner)
    if NAN_ZERO:
        bad = tl.max((w != w).to(tl.int32), axis=1)
        dx = tl.where((bad != 0)[:, None], 0.0, dx)
    tl.store(dlogits_ptr + row64 * EXPERTS + expert, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


def config(experts: int) -> RowConfig:
    """About 1,024 of the padded experts for each program."""
    return RowConfig(min(16, max(1, 1024 // experts)), 8 if experts > 2048 else 4)


def moe_route_fwd(logits, bias, top_k, score, renormalize, n_group, topk_group, group_score, scale, nan_policy):
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
    if tokens:
        groups_pad, members_pad = triton.next_power_of_2(n_group), triton.next_power_of_2(experts // n_group)
        tile = config(groups_pad * members_pad)
        with on_device(logits):
            moe_route_fwd_kernel[(triton.cdiv(tokens, tile.block_t),)](
                logits,
                bias,
                weights,
                ids,
                tokens,
                logits.stride(0),
                scale,
                EXPERTS=experts,
                TOP_K=top_k,
                SCORE=score,
                RENORMALIZE=renormalize,
                GROUPS=n_group,
                TOPK_GROUP=topk_group,
                TOP2=group_score == "top2",
                NAN_ZERO=nan_policy == "zero",
                GROUPS_PAD=groups_pad,
                MEMBERS_PAD=members_pad,
                TOP_K_PAD=triton.next_power_of_2(top_k),
                **constants(tile),
            )
    return weights, ids


def moe_route_bwd(dweights, logits, ids, score, renormalize, scale, nan_policy):
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    dlogits = logits.new_empty(logits.shape)
    if tokens:
        experts_pad = triton.next_power_of_2(experts)
        tile = config(experts_pad)
        with on_device(logits):
            moe_route_bwd_kernel[(triton.cdiv(tokens, tile.block_t),)](
                dweights,
                logits,
                ids,
                dlogits,
                tokens,
                logits.stride(0),
                scale,
                EXPERTS=experts,
                TOP_K=top_k,
                SCORE=score,
                RENORMALIZE=renormalize,
                NAN_ZERO=nan_policy == "zero",
                EXPERTS_PAD=experts_pad,
                TOP_K_PAD=triton.next_power_of_2(top_k),
                **constants(tile),
            )
    return dlogits


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for name, experts, score, groups, kept, biased in (
        ("deepseek_v3", 256, "sigmoid", 8, 4, True),
        ("qwen3", 128, "softmax", 1, 1, False),
        ("kimi_k2", 384, "sigmoid", 1, 1, True),
        ("wide", 4096, "softmax", 1, 1, False),
    ):
        bias = (tensor("fp32", experts),) if biased else ()
        options = {"top_k": 8, "score": score, "n_group": groups, "topk_group": kept}
        yield AotCase(name, train("moe_route", tensor("bf16", 4096, experts), *bias, **options))
