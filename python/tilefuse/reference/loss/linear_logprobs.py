"""Reference of linear_logprobs: blocks of the vocabulary, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK = 4096


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def capped(z: Tensor, scale: float, softcap: float) -> Tensor:
    """Scaled and capped logits, before the temperature."""
    z = z * scale
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def capped_logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """``scale * (x w^T + bias)``, capped; before the temperature."""
    z = x @ weight.to(x.dtype).t()
    return capped(z if bias is None else z + bias.to(x.dtype), scale, softcap)


def kept_rows(x: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Rows in the dtype of the computation, those of ignored tokens 0, and which are kept."""
    kept = target != ignore_index
    return torch.where(kept[:, None], x, 0).to(_compute(x)), kept


def blocks_of(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    for start in range(0, weight.shape[0], BLOCK):
        yield start, weight[start : start + BLOCK], None if bias is None else bias[start : start + BLOCK]


def at_ids(ids: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Which of these ids lie among ``count`` ids from ``first`` on, and where (0 for others)."""
    at = ids.long() - first
    inside = (at >= 0) & (at < count)
    return inside, torch.where(inside, at, 0)


def block_stats(z: Tensor, target: Tensor, class_weight: Tensor | None, first: int, smooth: bool) -> Tensor:
    """Statistics ``[T, columns]`` of the logits of ids from ``first`` on; ``class_weight`` is that of these."""
    largest, argmax = z.max(1)
    # a row of -inf alone has a sum of 0
    d = z - torch.where(largest == -torch.inf, 0.0, largest)[:, None]
    e = d.exp()
    inside, at = at_ids(target, first, z.shape[1])
    logit = torch.where(inside, z.gather(1, at[:, None])[:, 0], torch.nan)
    columns = [largest, e.sum(1), torch.where(e == 0, 0.0, e * d).sum(1), logit, argmax + first]
    if smooth:
        c = z.new_ones(z.shape[1]) if class_weight is None else class_weight.to(z.dtype)
        columns += [torch.where(c == 0, 0.0, c * d).sum(1), c.sum().expand(z.shape[0])]
    return torch.stack([column.to(z.dtype) for column in columns], 1)


def mark_ignored(stats: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    ignored = stats.new_tensor([-torch.inf, 0, 0, torch.nan, -1, 0, 0])[: stats.shape[2]]
    return torch.where((target != ignore_index)[:, None, None], stats, ignored)


def linear_logprob_stats_fwd(
    x, weight, target, bias, class_weight, vocab_start, scale, softcap, temperature, ignore_index, smooth
):
    rows, _ = kept_rows(x, target, ignore_index)
    parts = []
    for start, w, b in blocks_of(weight, bias):
        c = None if class_weight is None else class_weight[start : start + BLOCK]
        z = capped_logits(rows, w, b, scale, softcap) / temperature
        parts.append(block_stats(z, target, c, vocab_start + start, smooth))
    return mark_ignored(torch.stack(parts, 1), target, ignore_index)


def merge_logprobs_fwd(stats: Tensor) -> tuple[Tensor, ...]:
    smooth = stats.shape[2] == 7
    tokens = stats.shape[0]
    largest = stats.new_full((tokens,), -torch.inf)
    total, weighted, costs, classes = (stats.new_zeros(tokens) for _ in range(4))
    logit, argmax = stats.new_full((tokens,), torch.nan), stats.new_full((tokens,), -1.0)
    for block in stats.unbind(1):
        peak = torch.maximum(largest, block[:, 0])
        # distances of the two maxima from the common one, 0 where there is none
        old = torch.where(largest == -torch.inf, 0.0, largest - peak)
        new = torch.where(block[:, 0] == -torch.inf, 0.0, block[:, 0] - peak)
        weighted = (weighted + total * old) * old.exp() + (block[:, 2] + block[:, 1] * new) * new.exp()
        total = total * old.exp() + block[:, 1] * new.exp()
        logit = torch.where(block[:, 3].isnan(), logit, block[:, 3])
        argmax = torch.where((argmax < 0) | (block[:, 0] > largest), block[:, 4], argmax)
        if smooth:
            costs = costs + classes * old + block[:, 5] + block[:, 6] * new
            classes = classes + block[:, 6]
        largest = peak
    log_total = total.log()
    results = [(logit - largest) - log_total, largest + log_total, log_total - weighted / total]
    if smooth:
        results.append(classes * log_total - costs)
    kept = argmax >= 0
    results = [torch.where(kept, result, 0.0) for result in results]
    # without the target's logit the token's gradient is NaN too
    norm = torch.stack((largest, torch.where(logit.isnan(), torch.nan, log_total)))
    smoothed = results[3] if smooth else stats.new_empty(0)
    return *results[:3], argmax.to(torch.int32), smoothed, torch.where(kept, norm, 0.0)


def check_targets(name: str, target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """An error where the host sees them; elsewhere they become NaN."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    if not target.is_cuda and wrong.any():
        raise ValueError(
            f"tilefuse.{name}: target must be in [0, {vocabulary}) or ignore_index = {ignore_index}, "
            f"got {target[wrong][0].item()}"
        )


def linear_logprobs_fwd(
    x, weight, target, bias, class_weight, scale, softcap, temperature, ignore_index, smooth
) -> tuple[Tensor, ...]:
    check_targets("linear_logprobs", target, weight.shape[0], ignore_index)
    stats = linear_logprob_stats_fwd(
        x, weight, target, bias, class_weight, 0, scale, softcap, temperature, ignore_index, smooth
    )
    return merge_logprobs_fwd(stats)


def logit_gradients(
    z: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    norm: Tensor,
    entropy: Tensor,
    coefficients: Tensor,
    first: int,
    softcap: float,
    temperature: float,
) -> Tensor:
    """Gradients of the logits of ids from ``first`` on, of ``z`` before the temperature."""
    logp = z / temperature - norm[0][:, None] - norm[1][:, None]
    p = logp.exp()
    centred = torch.where(p == 0, 0.0, p * (logp + entropy[:, None]))
    dz = p * coefficients[0][:, None] - centred * coefficients[1][:, None]
    inside, at = at_ids(target, first, z.shape[1])
    dz = dz.scatter_add(1, at[:, None], torch.where(inside, coefficients[2], 0.0)[:, None])
    c = 1.0 if class_weight is None else class_weight.to(z.dtype)
    dz = dz - coefficients[3][:, None] * c
    return dz * (1 - (z / softcap).square()) if softcap > 0 else dz


def head_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    kept: Tensor,
    gradients: Iterable[tuple[Tensor, Tensor]],
    factor: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from blocks of the weight and the gradients of their logits."""
    dx = torch.zeros_like(rows)
    dweight, dbias = [], []
    for w, dz in gradients:
        dz = torch.where(kept[:, None], dz, 0.0)
        if need_x:
            dx += dz @ w.to(rows.dtype)
        if need_weight:
            dweight.append((factor * (dz.t() @ rows)).to(weight.dtype))
        if need_bias:
            dbias.append(factor * dz.sum(0))
    bias_dtype = x.dtype if bias is None else bias.dtype
    return (
        (factor * dx).to(x.dtype) if need_x else x.new_empty(0),
        torch.cat(dweight) if need_weight else weight.new_empty(0),
        torch.cat(dbias).to(bias_dtype) if need_bias else weight.new_empty(0, dtype=bias_dtype),
    )


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
    need_x,
    need_weight,
    need_bias,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, kept = kept_rows(x, target, ignore_index)

    def gradients():
        for start, w, b in blocks_of(weight, bias):
            c = None if class_weight is None else class_weight[start : start + BLOCK]
            z = capped_logits(rows, w, b, scale, softcap)
            first = vocab_start + start
            yield w, logit_gradients(z, target, c, norm, entropy, coefficients, first, softcap, temperature)

    return head_gradients(x, weight, bias, rows, kept, gradients(), factor, need_x, need_weight, need_bias)
