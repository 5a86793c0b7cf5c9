"""Inputs of ``linear_logprobs``: ignored tokens, a bias, leading dims, a vocabulary of more than one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample

IGNORED = -100


def case(
    tokens: int,
    vocabulary: int,
    hidden: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.2,
    spread: float = 1.0,
    seed: int = 0,
):
    """(x, weight, target, bias); logits have a standard deviation of about ``spread``."""
    generator = torch.Generator().manual_seed(seed + tokens + vocabulary + hidden)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) * spread / max(hidden, 1) ** 0.5
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    bias = torch.randn(vocabulary, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype), target.to(device), bias.to(device)


class _Rounded(torch.autograd.Function):
    """The identity, whose gradient is rounded to a dtype, as that of a matrix product's operand is."""

    @staticmethod
    def forward(ctx, z, dtype):
        ctx.dtype = dtype
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz):
        return dz.to(ctx.dtype).to(dz.dtype), None


def transformed(z, scale=1.0, softcap=0.0, temperature=1.0):
    z = z * scale
    return (softcap * torch.tanh(z / softcap) if softcap > 0 else z) / temperature


def logits(x, weight, bias=None, *, scale=1.0, softcap=0.0, temperature=1.0):
    """All of them, in float32 (float64 for float64), and their gradients in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = _Rounded.apply(x.to(wide) @ weight.to(wide).t(), x.dtype)
    return transformed(z if bias is None else z + bias.to(wide), scale, softcap, temperature)


def statistics(z, target, ignore_index=IGNORED):
    """(logp, lse, entropy, argmax) of logits, as PyTorch computes them."""
    kept = target != ignore_index
    z = torch.where(kept[..., None], z, 0.0)
    logp, lse = z.log_softmax(-1), z.logsumexp(-1)
    p = logp.exp()
    entropy = -torch.where(p == 0, 0.0, p * logp).sum(-1)
    at = torch.where(kept, target, 0).long()
    found = (logp.gather(-1, at[..., None])[..., 0], lse, entropy)
    argmax = torch.where(kept, z.argmax(-1), -1).to(torch.int32)
    return *(torch.where(kept, value, 0.0) for value in found), argmax


def naive(x, weight, target, bias=None, *, scale=1.0, softcap=0.0, temperature=1.0, ignore_index=IGNORED):
    # NaN in the row of an ignored token reaches nothing
    x = torch.where((target != ignore_index)[..., None], x, 0)
    z = logits(x, weight, bias, scale=scale, softcap=softcap, temperature=temperature)
    return statistics(z, target, ignore_index)


def _samples(device: torch.device) -> Iterator[Sample]:
    yield Sample(case(9, 37, 12, device), dict(scale=0.5, softcap=3.0, temperature=1.5), name="bias_softcap")
    yield Sample(case(6, 130, 16, device, torch.bfloat16)[:3], name="bf16")
    x, weight, target, bias = case(6, 40, 24, device, torch.float16, ignored=0.0)
    target[::3] = 3
    yield Sample(
        (x.view(2, 3, 24), weight, target.view(2, 3).int(), bias.half()), dict(ignore_index=3), name="half_int32"
    )
    x, weight, target, _ = case(5, 4100, 9, device, ignored=0.0)
    yield Sample((x.t().contiguous().t(), weight.t().contiguous().t(), target), name="two_blocks_strided")
    x, weight, target, _ = case(4, 20, 8, device, ignored=1.0)
    yield Sample((x, weight, target), name="all_ignored")
    yield Sample(case(0, 20, 8, device), name="no_tokens")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"linear_logprobs": _samples}
NAIVE = {"linear_logprobs": naive}
