"""moe_route: one program routes a few rows; a row's experts lie in registers as [groups, experts per group]."""

import torch
import triton
import triton.language as tl

from ..common.launch import on_device


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
    logits, bias, weights, ids,
    tokens, stride_t, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP2: tl.constexpr,
    NAN_ZERO: tl.constexpr, ROWS: tl.constexpr, GP: tl.constexpr, PP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = EXPERTS // GROUPS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GP)
    member = tl.arange(0, PP)
    expert = group[:, None] * PER + member[None, :]  # [GP, PP]
    real = ((group[:, None] < GROUPS) & (member[None, :] < PER))[None, :, :]  # [1, GP, PP]
    inside = real & (row < tokens)[:, None, None]
    x = tl.load(
        logits + row.to(tl.int64)[:, None, None] * stride_t + expert[None, :, :], mask=inside, other=float("-inf")
    ).to(tl.float32)  # [ROWS, GP, PP]
    nan = x != x

    if SCORE == "softmax":
        top = tl.max(tl.max(tl.where(nan, float("-inf"), x), axis=2), axis=1)[:, None, None]
        e = tl.where(real, tl.exp(x - top), 0.0)
        s = e / tl.sum(tl.sum(e, axis=2), axis=1)[:, None, None]
        if HAS_BIAS or (TOP2 and GROUPS > 1):
            # NaN is set aside and the largest logit counts 1 even when it is infinite
            e = tl.where(nan | (real == 0), 0.0, tl.where(x == top, 1.0, e))
            biased = tl.where(nan, x, e / tl.sum(tl.sum(e, axis=2), axis=1)[:, None, None])
        else:
            biased = x
    else:
        s = _elementwise_score(x, SCORE)
        biased = s
    if HAS_BIAS:
        biased += tl.load(bias + expert, mask=(group[:, None] < GROUPS) & (member[None, :] < PER), other=0.0).to(
            tl.float32
        )[None, :, :]
    # without a bias, logits order like softmax scores and do not underflow to ties
    key_value = x if SCORE == "softmax" and not HAS_BIAS else biased
    key_nan = key_value != key_value
    key = _ordered(key_value, key_nan)

    if GROUPS > 1:
        of_group = (biased if TOP2 else key_value) + tl.zeros([ROWS, GP, PP], tl.float32)
        of_group = tl.where((of_group != of_group) | (real == 0), float("-inf"), of_group)
        best = tl.max(of_group, axis=2)  # [ROWS, GP]
        if TOP2 and PER > 1:
            # the second best: drop one occurrence of the best, the first
            at = tl.min(tl.where(of_group == best[:, :, None], member[None, None, :], PP), axis=2)
            second = tl.max(tl.where(member[None, None, :] == at[:, :, None], float("-inf"), of_group), axis=2)
            best += second
            # inf - inf
            best = tl.where(best != best, float("-inf"), best)
        packed = (_ordered(best, best != best).to(tl.int64) << 32) + (0x7FFFFFFF - group)[None, :]
        packed = tl.where((group < GROUPS)[None, :], packed, -0x8000000000000000)
        kept = tl.zeros([ROWS, GP], tl.int32)
        for _ in range(TOPK_GROUP):
            chosen = packed == tl.max(packed, axis=1)[:, None]
            kept = tl.where(chosen, 1, kept)
            packed = tl.where(chosen, -0x8000000000000000, packed)
        key = tl.where((kept != 0)[:, :, None], key, -2147483648)

    key = tl.where(real, key, -2147483648)
    keys = (key.to(tl.int64) << 32) + (0x7FFFFFFF - expert)[None, :, :]
    keys = tl.reshape(keys, [ROWS, GP * PP])
    flat_s = tl.reshape(s, [ROWS, GP * PP])
    slot = tl.arange(0, KP)
    chosen_s = tl.zeros([ROWS, KP], tl.float32)
    chosen_id = tl.zeros([ROWS, KP], tl.int32)
    for j in range(TOP_K):
        best_key = tl.max(keys, axis=1)  # [ROWS]
        best_id = 0x7FFFFFFF - (best_key & 0x7FFFFFFF).to(tl.int32)
        hit = keys == best_key[:, None]
        best_s = tl.sum(tl.where(hit, flat_s, 0.0), axis=1)
        chosen_s = tl.where(slot[None, :] == j, best_s[:, None], chosen_s)
        chosen_id = tl.where(slot[None, :] == j, best_id[:, None], chosen_id)
        keys = tl.where(hit, -0x8000000000000000, keys)

    if RENORMALIZE:
        chosen_s = tl.div_rn(chosen_s, tl.sum(chosen_s, axis=1)[:, None] + 1e-20 + tl.zeros([ROWS, KP], tl.float32))
    w = chosen_s * scale
    if NAN_ZERO:
        bad = tl.max((w != w).to(tl.int32), axis=1)
        w = tl.where((bad != 0)[:, None], 0.0, w)
    out = row.to(tl.int64)[:, None] * TOP_K + slot[None, :]
    stored = (row < tokens)[:, None] & (slot < TOP_K)[None, :]
    tl.store(weights + out, w, mask=stored)
    tl.store(ids + out, chosen_id, mask=stored)


@triton.jit(do_not_specialize=["tokens"])
def moe_route_bwd_kernel(
    grad, logits, ids, grad_logits,
    tokens, stride_t, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    NAN_ZERO: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row64 = row.to(tl.int64)[:, None]
    valid = (row < tokens)[:, None]
    expert = tl.arange(0, EP)[None, :]
    inside = valid & (expert < EXPERTS)
    slot = tl.arange(0, KP)[None, :]
    slots = valid & (slot < TOP_K)
    chosen = tl.load(ids + row64 * TOP_K + slot, mask=slots, other=0)
    d = tl.load(grad + row64 * TOP_K + slot, mask=slots, other=0.0).to(tl.float32) * scale  # [ROWS, KP]
    xc = tl.load(logits + row64 * stride_t + chosen, mask=slots, other=0.0).to(tl.float32)
    if SCORE == "softmax":
        x = tl.load(logits + row64 * stride_t + expert, mask=inside, other=float("-inf")).to(tl.float32)  # [ROWS, EP]
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
    dx = tl.zeros([ROWS, EP], tl.float32)
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
    tl.store(grad_logits + row64 * EXPERTS + expert, dx.to(grad_logits.dtype.element_ty), mask=inside)


def config(experts: int, groups: int) -> dict[str, int]:
    """Padded group shape, rows per program and warps for E experts."""
    gp = triton.next_power_of_2(groups)
    pp = triton.next_power_of_2(experts // groups)
    rows = max(1, 1024 // (gp * pp))
    return {"ROWS": min(rows, 16), "GP": gp, "PP": pp, "num_warps": 8 if gp * pp > 2048 else 4}


def moe_route_fwd(logits, bias, top_k, score, renormalize, n_group, topk_group, group_score, scale, nan_policy):
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int32)
    if tokens:
        tile = config(experts, n_group)
        with on_device(logits):
            moe_route_fwd_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
                logits, bias, weights, ids, tokens, logits.stride(0), scale,
                EXPERTS=experts, TOP_K=top_k, SCORE=score, RENORMALIZE=renormalize, HAS_BIAS=bias is not None,
                GROUPS=n_group, TOPK_GROUP=topk_group, TOP2=group_score == "top2", NAN_ZERO=nan_policy == "zero",
                KP=triton.next_power_of_2(top_k), **tile,
            )  # fmt: skip
    return weights, ids


def moe_route_bwd(grad, logits, ids, score, renormalize, scale, nan_policy):
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    out = logits.new_empty(logits.shape)
    if tokens:
        ep = triton.next_power_of_2(experts)
        rows = min(16, max(1, 1024 // ep))
        with on_device(logits):
            moe_route_bwd_kernel[(triton.cdiv(tokens, rows),)](
                grad, logits, ids, out, tokens, logits.stride(0), scale,
                EXPERTS=experts, TOP_K=top_k, SCORE=score, RENORMALIZE=renormalize, NAN_ZERO=nan_policy == "zero",
                ROWS=rows, EP=ep, KP=triton.next_power_of_2(top_k), num_warps=8 if ep > 2048 else 4,
            )  # fmt: skip
    return out


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
