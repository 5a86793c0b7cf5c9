"""distillation: rows of logits in blocks, twice in the forward and once in the backward.

The forward has a program for each token: the sums of both softmaxes, then the divergence. Every term of it is computed
from the larger of the two probabilities, p, and the logarithm q <= 0 of their quotient, in a form that is not negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import on_device
from ..common.rows import Matrix

INFINITY = tl.constexpr(float("inf"))
# whose divergence it is: KL(t || s) for beta = 0, from the mixture, KL(s || t) for beta = 1
OF_TEACHER, OF_MIXTURE, OF_STUDENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# ids at a time: 16 bytes of bfloat16 for each thread of four warps
BLOCK = 1024


class Rows(NamedTuple):
    """Logits of both, before the temperature."""

    student: Any
    teacher: Any


@triton.jit
def _excess_series(q):
    """(expm1(q) - q) / q^2 for -1/2 <= q <= 0."""
    p = q * (1.0 / 362880.0) + 1.0 / 40320.0
    p = p * q + 1.0 / 5040.0
    p = p * q + 1.0 / 720.0
    p = p * q + 1.0 / 120.0
    p = p * q + 1.0 / 24.0
    p = p * q + 1.0 / 6.0
    return p * q + 0.5


@triton.jit
def _shortfall_series(u):
    """(u - log1p(u)) / u^2 for |u| <= 1/8."""
    p = u * (-1.0 / 9.0) + 1.0 / 8.0
    p = p * u - 1.0 / 7.0
    p = p * u + 1.0 / 6.0
    p = p * u - 0.2
    p = p * u + 0.25
    p = p * u - 1.0 / 3.0
    return p * u + 0.5


@triton.jit
def _pair(student, teacher, peak, log_total, teacher_peak, teacher_log_total, temperature):
    """Which id is more of the teacher's, p, q, and q, e^q, e^q - 1 and that less q where e^q is not 0."""
    below, teacher_below = student - peak, teacher - teacher_peak
    apart, gap = teacher - student, teacher_peak - peak
    # log t - log s, from the differences that lose less: those of neighbours are exact
    near_both = tl.abs(apart) + tl.abs(gap) < tl.abs(below) + tl.abs(teacher_below)
    difference = tl.where(near_both, apart - gap, teacher_below - below)
    d = difference / temperature - (teacher_log_total - log_total)
    log_s, log_t = below / temperature - log_total, teacher_below / temperature - teacher_log_total
    of_teacher = d >= 0.0
    p = tl.exp(tl.where(of_teacher, log_t, log_s))
    q = tl.where(of_teacher, -d, d)
    near = tl.where(q < -200.0, -200.0, q)
    e = tl.exp(near)
    series = near * near * _excess_series(near)
    m = tl.where(near > -0.5, near + series, e - 1.0)
    return of_teacher, p, q, near, e, m, tl.where(near > -0.5, series, m - near)


@triton.jit
def _mixture(of_teacher, near, e, m, beta, rest_of_beta):
    """By the larger probability: its share in M and the rest, log(M / p), log(M / (p e^q)), and what KL(p || M) and
    KL(p e^q || M) add, of p."""
    share = tl.where(of_teacher, beta, rest_of_beta)
    rest = tl.where(of_teacher, rest_of_beta, beta)
    u = rest * m
    # e is 0 far away, where v is not read
    v = -share * m / tl.where(e == 0.0, 1e-38, e)
    direct = tl.log(share + rest * e)
    small_u, small_v = u * u * _shortfall_series(u), v * v * _shortfall_series(v)
    of_larger = tl.where(u > -0.125, small_u, u - direct)
    log_larger = tl.where(u > -0.125, u - small_u, direct)
    log_smaller = tl.where(v < 0.125, v - small_v, log_larger - near)
    of_smaller = tl.where(v < 0.125, e * small_v, -share * m - e * (log_larger - near))
    return share, rest, log_larger, log_smaller, of_larger, of_smaller


@triton.jit
def gradient_of(
    student,
    teacher,
    peak,
    log_total,
    teacher_peak,
    teacher_log_total,
    shift,
    temperature,
    beta,
    rest_of_beta,
    OF: tl.constexpr,
):
    """Of the student's logits, but for the coefficient; statistics have the logits' shape or broadcast to it."""
    of_teacher, p, q, near, e, m, _ = _pair(
        student, teacher, peak, log_total, teacher_peak, teacher_log_total, temperature
    )
    if OF == OF_TEACHER:
        return tl.where(p == 0.0, 0.0, p * tl.where(of_teacher, m, -m))
    else:
        s = tl.where(of_teacher, p * e, p)
        if OF == OF_STUDENT:
            log_ratio = tl.where(of_teacher, near, -q)
        else:
            _, _, log_larger, log_smaller, _, _ = _mixture(of_teacher, near, e, m, beta, rest_of_beta)
            log_ratio = -tl.where(of_teacher, log_smaller, log_larger)
        return tl.where(s == 0.0, 0.0, s * (log_ratio - shift))


@triton.jit
def _merged(peak, total, z, temperature):
    """The largest logit so far and the sum relative to it, with those of a block."""
    top = tl.maximum(peak, tl.max(z, 0))
    # a row of -inf alone has a sum of 0
    base = tl.where(top == -INFINITY, 0.0, top)
    down = tl.where(peak == -INFINITY, 0.0, tl.exp((peak - base) / temperature))
    return top, total * down + tl.sum(tl.exp((z - base) / temperature), 0)


@triton.jit(do_not_specialize=["tokens", "first"])
def distillation_fwd_kernel(
    rows,
    keep_ptr,
    order_ptr,
    losses_ptr,
    statistics_ptr,
    tokens,
    first,
    vocabulary,
    temperature,
    beta,
    rest_of_beta,
    OF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of one row. With an ``order`` rows are those of the tokens from its entry ``first`` on."""
    row = tl.program_id(0).to(tl.int64)
    token = row
    if order_ptr is not None:
        token = tl.load(order_ptr + first + row).to(tl.int64)
    wide = tokens.to(tl.int64)
    kept = tl.load(keep_ptr + token) != 0
    student_row = rows.student.ptr + row * rows.student.row
    teacher_row = rows.teacher.ptr + row * rows.teacher.row
    last = tl.where(kept, vocabulary, 0)
    peak = tl.full([], -INFINITY, tl.float32)
    total = tl.zeros([], tl.float32)
    teacher_peak, teacher_total = peak, total
    for start in range(0, last, BLOCK_N):
        id = start + tl.arange(0, BLOCK_N)
        student = tl.load(student_row + id, mask=id < vocabulary, other=-INFINITY).to(tl.float32)
        teacher = tl.load(teacher_row + id, mask=id < vocabulary, other=-INFINITY).to(tl.float32)
        peak, total = _merged(peak, total, student, temperature)
        teacher_peak, teacher_total = _merged(teacher_peak, teacher_total, teacher, temperature)
    log_total, teacher_log_total = tl.log(total), tl.log(teacher_total)
    loss = tl.zeros([], tl.float32)
    shift = loss
    for start in range(0, last, BLOCK_N):
        id = start + tl.arange(0, BLOCK_N)
        student = tl.load(student_row + id, mask=id < vocabulary, other=-INFINITY).to(tl.float32)
        teacher = tl.load(teacher_row + id, mask=id < vocabulary, other=-INFINITY).to(tl.float32)
        of_teacher, p, q, near, e, m, excess = _pair(
            student, teacher, peak, log_total, teacher_peak, teacher_log_total, temperature
        )
        if OF == OF_MIXTURE:
            share, rest, _, _, of_larger, of_smaller = _mixture(of_teacher, near, e, m, beta, rest_of_beta)
            term = p * (share * of_larger + rest * of_smaller)
            shift += tl.sum(tl.where(p == 0.0, 0.0, p * tl.where(of_teacher, of_smaller, of_larger)), 0)
        else:
            of_larger = tl.where(q < -200.0, -1.0 - q, excess)
            of_smaller = near * m - excess
            if OF == OF_TEACHER:
                term = p * tl.where(of_teacher, of_larger, of_smaller)
            else:
                term = p * tl.where(of_teacher, of_smaller, of_larger)
        loss += tl.sum(tl.where(p == 0.0, 0.0, term), 0)
    if OF == OF_STUDENT:
        shift = loss
    tl.store(losses_ptr + token, tl.where(kept, loss, 0.0))
    out = statistics_ptr + token
    tl.store(out, tl.where(kept, peak, 0.0))
    tl.store(out + wide, tl.where(kept, log_total, 0.0))
    tl.store(out + 2 * wide, tl.where(kept, teacher_peak, 0.0))
    tl.store(out + 3 * wide, tl.where(kept, teacher_log_total, 0.0))
    tl.store(out + 4 * wide, tl.where(kept, shift, 0.0))


@triton.jit(do_not_specialize=["tokens"])
def distillation_bwd_kernel(
    rows,
    statistics_ptr,
    coefficients_ptr,
    dlogits_ptr,
    tokens,
    width,
    vocabulary,
    temperature,
    beta,
    rest_of_beta,
    OF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of one token's ids, of which those past the ``vocabulary`` pad it."""
    token = tl.program_id(0).to(tl.int64)
    wide = tokens.to(tl.int64)
    id = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    coefficient = tl.load(coefficients_ptr + token)
    inside = (id < vocabulary) & (coefficient != 0.0)
    student = tl.load(rows.student.ptr + token * rows.student.row + id, mask=inside, other=0.0).to(tl.float32)
    teacher = tl.load(rows.teacher.ptr + token * rows.teacher.row + id, mask=inside, other=0.0).to(tl.float32)
    statistics = statistics_ptr + token
    dz = gradient_of(
        student,
        teacher,
        tl.load(statistics),
        tl.load(statistics + wide),
        tl.load(statistics + 2 * wide),
        tl.load(statistics + 3 * wide),
        tl.load(statistics + 4 * wide),
        temperature,
        beta,
        rest_of_beta,
        OF,
    )
    dz = tl.where(inside, dz * coefficient, 0.0)
    out = dlogits_ptr + token * width + id
    tl.store(out, dz.to(dlogits_ptr.dtype.element_ty), mask=id < width)


def divergence(beta: float, temperature: float) -> dict[str, Any]:
    """What kernels take of a divergence, by name."""
    of = OF_TEACHER if beta == 0 else OF_STUDENT if beta == 1 else OF_MIXTURE
    return {"temperature": float(temperature), "beta": float(beta), "rest_of_beta": float(1 - beta), "OF": of}


def launch_losses(
    rows: Rows,
    count: int,
    vocabulary: int,
    keep: Tensor,
    order: Tensor | None,
    first: int,
    losses: Tensor,
    statistics: Tensor,
    beta: float,
    temperature: float,
) -> None:
    """Losses and statistics of ``count`` rows."""
    with on_device(losses):
        distillation_fwd_kernel[(count,)](
            rows,
            keep,
            order,
            losses,
            statistics,
            keep.shape[0],
            first,
            vocabulary,
            **divergence(beta, temperature),
            BLOCK_N=BLOCK,
            num_warps=4,
        )


def distillation_fwd(logits, teacher_logits, keep, beta, temperature):
    tokens = logits.shape[0]
    losses = logits.new_empty(tokens, dtype=torch.float32)
    statistics = logits.new_empty((5, tokens), dtype=torch.float32)
    if tokens:
        rows = Rows(Matrix.of(logits), Matrix.of(teacher_logits))
        vocabulary = min(logits.shape[1], teacher_logits.shape[1])
        launch_losses(rows, tokens, vocabulary, keep, None, 0, losses, statistics, beta, temperature)
    return losses, statistics


def distillation_bwd(logits, teacher_logits, statistics, coefficients, beta, temperature):
    tokens, width = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if tokens:
        with on_device(logits):
            distillation_bwd_kernel[(tokens, triton.cdiv(width, BLOCK))](
                Rows(Matrix.of(logits), Matrix.of(teacher_logits)),
                statistics,
                coefficients,
                dlogits,
                tokens,
                width,
                min(width, teacher_logits.shape[1]),
                **divergence(beta, temperature),
                BLOCK_N=BLOCK,
                num_warps=4,
            )
    return dlogits


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    for dtype in ("bf16", "fp32"):
        logits = tensor(dtype, 4096, 128256)
        yield AotCase(
            dtype,
            train("distillation", logits, tensor(dtype, 4096, 128256), tensor("i64", 4096)),
            expect={f"distillation_{way}_kernel": ("LDG.128",) for way in ("fwd", "bwd")},
        )
