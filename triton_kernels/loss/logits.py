"""What kernels make of a tile of logits: statistics, and gradients. Ops on logits and on heads share it."""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
# no id is larger
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1) loses the small ones, for which the series is exact to float32."""
    q = x * x
    p = -1382.0 / 155925.0
    p = p * q + 62.0 / 2835.0
    p = p * q - 17.0 / 315.0
    p = p * q + 2.0 / 15.0
    p = p * q - 1.0 / 3.0
    return tl.where(q < 0.1, x + x * (p * q), 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def capped_logits(z, scale, softcap, CAPPED: tl.constexpr):
    """Scaled, then capped; before the temperature."""
    z = z * scale
    if CAPPED:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def start_stats(BLOCK_M: tl.constexpr):
    """(maximum, sum of exp, sum of (z - max) exp, sum of c (z - max), sum of c, target's logit, argmax) of nothing."""
    zeros = tl.zeros([BLOCK_M], tl.float32)
    nan = tl.full([BLOCK_M], float("nan"), tl.float32)
    argmax = tl.full([BLOCK_M], -1, tl.int32)
    return tl.full([BLOCK_M], -INFINITY, tl.float32), zeros, zeros, zeros, zeros, nan, argmax


@triton.jit
def add_tile(stats, z, start, vocabulary, target, class_weight_ptr, SMOOTH: tl.constexpr):
    """``stats`` and those of logits z [BLOCK_M, BLOCK_N] of ids from ``start`` on; a target may lie elsewhere."""
    peak, total, weighted, costs, classes, logit, argmax = stats
    id = start + tl.arange(0, z.shape[1])
    inside = id < vocabulary
    z = tl.where(inside[None, :], z, -INFINITY)
    largest = tl.max(z, 1)
    lowest = tl.min(tl.where(z == largest[:, None], id[None, :], NO_ID), 1)
    argmax = tl.where((largest > peak) | (argmax < 0), tl.minimum(lowest, vocabulary - 1), argmax)
    top = tl.maximum(peak, largest)
    # a row of -inf alone has a sum of 0
    base = tl.where(top == -INFINITY, 0.0, top)
    down = tl.where(peak == -INFINITY, 0.0, peak - base)
    d = z - base[:, None]
    e = tl.exp(d)
    weighted = (weighted + total * down) * tl.exp(down) + tl.sum(tl.where(e == 0.0, 0.0, e * d), 1)
    total = total * tl.exp(down) + tl.sum(e, 1)
    here = (id[None, :] == target[:, None]) & inside[None, :]
    found = tl.sum(tl.where(here, z, 0.0), 1)
    logit = tl.where((target >= start) & (target < tl.minimum(start + z.shape[1], vocabulary)), found, logit)
    if SMOOTH:
        c = _classes(class_weight_ptr, id, inside)
        costs += classes * down + tl.sum(tl.where(c[None, :] == 0.0, 0.0, c[None, :] * d), 1)
        classes += tl.sum(c, 0)
    return top, total, weighted, costs, classes, logit, argmax


@triton.jit
def store_stats(out, stats, vocab_start, kept, mask, SMOOTH: tl.constexpr):
    """Where a token is not kept, what marks it."""
    peak, total, weighted, costs, classes, logit, argmax = stats
    tl.store(out, tl.where(kept, peak, -INFINITY), mask=mask)
    tl.store(out + 1, tl.where(kept, total, 0.0), mask=mask)
    tl.store(out + 2, tl.where(kept, weighted, 0.0), mask=mask)
    tl.store(out + 3, tl.where(kept, logit, float("nan")), mask=mask)
    tl.store(out + 4, tl.where(kept, argmax + vocab_start, -1).to(tl.float32), mask=mask)
    if SMOOTH:
        tl.store(out + 5, tl.where(kept, costs, 0.0), mask=mask)
        tl.store(out + 6, tl.where(kept, classes, 0.0), mask=mask)


@triton.jit
def _classes(class_weight_ptr, id, inside):
    if class_weight_ptr is not None:
        return tl.load(class_weight_ptr + id, mask=inside, other=0.0).to(tl.float32)
    else:
        return inside.to(tl.float32)


@triton.jit
def logit_gradients(
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
    CAPPED: tl.constexpr,
):
    """dz [BLOCK_M, BLOCK_N] of logits before the temperature; ``token`` is int64."""
    wide = tokens.to(tl.int64)
    peak = tl.load(norm_ptr + token, mask=kept, other=0.0)
    log_total = tl.load(norm_ptr + wide + token, mask=kept, other=0.0)
    entropy = tl.load(entropy_ptr + token, mask=kept, other=0.0)
    of_p = tl.load(coefficients_ptr + token, mask=kept, other=0.0)
    of_entropy = tl.load(coefficients_ptr + wide + token, mask=kept, other=0.0)
    of_target = tl.load(coefficients_ptr + 2 * wide + token, mask=kept, other=0.0)
    of_class = tl.load(coefficients_ptr + 3 * wide + token, mask=kept, other=0.0)
    logp = (capped / temperature - peak[:, None]) - log_total[:, None]
    p = tl.exp(logp)
    centred = tl.where(p == 0.0, 0.0, p * (logp + entropy[:, None]))
    dz = p * of_p[:, None] - centred * of_entropy[:, None]
    dz += tl.where(id[None, :] == target[:, None], of_target[:, None], 0.0)
    dz -= of_class[:, None] * _classes(class_weight_ptr, id, inside)[None, :]
    if CAPPED:
        t = capped / softcap
        dz *= 1.0 - t * t
    return dz
