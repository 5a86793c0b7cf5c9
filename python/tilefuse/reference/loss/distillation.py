"""Reference of distillation: blocks of the vocabulary, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 4096
# logits of the student and of the teacher of ids from `start` on, before the temperature
Blocks = Callable[[int], tuple[Tensor, Tensor]]


def _excess(q: Tensor) -> Tensor:
    """expm1(q) - q, by its series where that cancels."""
    series = torch.ones_like(q)
    for n in range(20, 2, -1):
        series = 1 + series * q / n
    return torch.where(q.abs() < 1, q * q / 2 * series, torch.expm1(q) - q)


def _shortfall(u: Tensor) -> Tensor:
    """u - log1p(u), by its series where that cancels."""
    series = torch.zeros_like(u)
    for n in range(22, 1, -1):
        series = 1 / n - series * u
    return torch.where(u.abs() < 0.125, u * u * series, u - torch.log1p(u))


def _nonzero(p: Tensor, x: Tensor) -> Tensor:
    """p x, 0 where p is 0 whatever x is."""
    return torch.where(p == 0, 0.0, p * x)


class _Terms:
    """Both probabilities of each id by the larger one, p, and the logarithm q <= 0 of their quotient."""

    def __init__(self, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float):
        peak, log_total, teacher_peak, teacher_log_total = (row[:, None] for row in statistics[:4])
        below, teacher_below = student - peak, teacher - teacher_peak
        apart, gap = teacher - student, teacher_peak - peak
        # log t - log s, from the differences that lose less: those of neighbours are exact
        near_both = apart.abs() + gap.abs() < below.abs() + teacher_below.abs()
        d = torch.where(near_both, apart - gap, teacher_below - below) / temperature
        d = d - (teacher_log_total - log_total)
        log_s, log_t = below / temperature - log_total, teacher_below / temperature - teacher_log_total
        self.of_teacher = d >= 0
        self.p = torch.where(self.of_teacher, log_t, log_s).exp()
        self.q = -d.abs()
        # e^q is 0 down there, and nothing is inf
        self.near = self.q.clamp(min=-1000.0)
        self.m = torch.expm1(self.near)

    def mixture(self, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Shares of the larger and the smaller in M, log(M / p), v = M / (p e^q) - 1 and its log1p."""
        share = torch.where(self.of_teacher, beta, 1 - beta)
        rest = torch.where(self.of_teacher, 1 - beta, beta)
        u = rest * self.m
        log_r = torch.where(u > -0.5, torch.log1p(u), (share + rest * self.near.exp()).log())
        v = share * torch.expm1(-self.near)
        return share, rest, log_r, v, torch.where(v < 0.125, torch.log1p(v), log_r - self.near)

    def losses(self, beta: float) -> tuple[Tensor, Tensor]:
        """Terms of the loss and of the fifth statistic."""
        if beta in (0, 1):
            larger = self.of_teacher if beta == 0 else ~self.of_teacher
            excess = _excess(self.near)
            # KL(p || p e^q) and KL(p e^q || p), of p
            terms = torch.where(larger, torch.where(self.q < -1000, -1 - self.q, excess), self.near * self.m - excess)
            terms = _nonzero(self.p, terms)
            return terms, terms if beta == 1 else torch.zeros_like(terms)
        share, rest, _, v, log_small = self.mixture(beta)
        of_larger = _shortfall(rest * self.m)
        e = self.near.exp()
        of_smaller = torch.where(v < 0.125, e * _shortfall(v), -share * self.m - e * log_small)
        terms = _nonzero(self.p, share * of_larger + rest * of_smaller)
        return terms, _nonzero(self.p, torch.where(self.of_teacher, of_smaller, of_larger))

    def gradients(self, beta: float, shift: Tensor) -> Tensor:
        """Of the student's logits, but for the coefficient."""
        if beta == 0:
            return _nonzero(self.p, torch.where(self.of_teacher, self.m, -self.m))
        s = self.p * torch.where(self.of_teacher, self.near.exp(), 1.0)
        if beta == 1:
            log_ratio = torch.where(self.of_teacher, self.near, -self.q)
        else:
            _, _, log_r, _, log_small = self.mixture(beta)
            log_ratio = -torch.where(self.of_teacher, log_small, log_r)
        return _nonzero(s, log_ratio - shift[:, None])


def forward(
    blocks: Blocks, vocabulary: int, like: Tensor, keep: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(losses [T], statistics [5, T]) in the dtype of ``like``; of tokens that are not kept, 0."""
    tokens = keep.shape[0]
    statistics = like.new_zeros(5, tokens)
    peaks, totals = like.new_full((2, tokens), -torch.inf), like.new_zeros(2, tokens)
    for start in range(0, vocabulary, BLOCK):
        for side, z in enumerate(blocks(start)):
            peak = torch.maximum(peaks[side], z.amax(1))
            # a row of -inf alone has a sum of 0
            base = torch.where(peak == -torch.inf, 0.0, peak)
            old = torch.where(peaks[side] == -torch.inf, 0.0, (peaks[side] - base) / temperature)
            totals[side] = totals[side] * old.exp() + ((z - base[:, None]) / temperature).exp().sum(1)
            peaks[side] = peak
    statistics[0], statistics[1], statistics[2], statistics[3] = peaks[0], totals[0].log(), peaks[1], totals[1].log()
    losses = like.new_zeros(tokens)
    for start in range(0, vocabulary, BLOCK):
        terms, of_student = _Terms(*blocks(start), statistics, temperature).losses(beta)
        losses += terms.sum(1)
        statistics[4] += of_student.sum(1)
    return torch.where(keep, losses, 0.0), torch.where(keep, statistics, 0.0)


def gradients(
    student: Tensor, teacher: Tensor, statistics: Tensor, coefficients: Tensor, beta: float, temperature: float
) -> Tensor:
    """Of a block of the student's logits."""
    dz = _Terms(student, teacher, statistics, temperature).gradients(beta, statistics[4])
    return torch.where(coefficients[:, None] == 0, 0.0, dz * coefficients[:, None])


def _of_logits(logits: Tensor, teacher_logits: Tensor, keep: Tensor) -> Blocks:
    """Those of tokens that are not kept are 0."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    last = min(logits.shape[1], teacher_logits.shape[1])

    def block(start: int) -> tuple[Tensor, Tensor]:
        ids = slice(start, min(start + BLOCK, last))
        student, teacher = (torch.where(keep[:, None], z[:, ids].to(dtype), 0) for z in (logits, teacher_logits))
        return student, teacher

    return block


def distillation_fwd(logits, teacher_logits, keep, beta, temperature):
    blocks = _of_logits(logits, teacher_logits, keep)
    like = logits.new_empty(0, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return forward(blocks, min(logits.shape[1], teacher_logits.shape[1]), like, keep, beta, temperature)


def distillation_bwd(logits, teacher_logits, statistics, coefficients, beta, temperature):
    blocks = _of_logits(logits, teacher_logits, coefficients != 0)
    dlogits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for start in range(0, min(logits.shape[1], teacher_logits.shape[1]), BLOCK):
        dz = gradients(*blocks(start), statistics, coefficients, beta, temperature)
        dlogits[:, start : start + dz.shape[1]] = dz.to(logits.dtype)
    return dlogits
