"""Inputs of ``window_attention``: every option, odd lengths and head dims, views, packed and empty input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample


def normal(
    *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def qkv(
    batch: int,
    sq: int,
    sk: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, D] tensors; a batch of 0 gives packed ones [S, H, D]."""
    lead = (batch,) if batch else ()
    shapes = (*lead, sq, heads, dim), (*lead, sk, kv_heads, dim), (*lead, sk, kv_heads, dim_v or dim)
    q, k, v = (normal(*s, device=device, dtype=dtype, seed=seed + i) for i, s in enumerate(shapes))
    return q, k, v


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Tensor], dict[str, Any]]]:
    """name, (q, k, v), the other tensors by name, the options of one call."""

    def make(*sizes: int) -> tuple[Tensor, Tensor, Tensor]:
        return qkv(*sizes, device=device, dtype=dtype)

    def heads(count: int, seed: int = 7) -> Tensor:
        return normal(count, device=device, seed=seed)

    def offsets(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    yield "causal", make(2, 37, 37, 2, 2, 16), {}, {"window": (-1, 0)}
    yield "full", make(1, 33, 65, 2, 1, 16), {}, {}
    yield "window", make(2, 130, 130, 4, 2, 32), {}, {"window": (40, 0)}
    yield "two_sided", make(1, 131, 131, 2, 1, 24, 40), {}, {"window": (20, 11)}
    yield "future_only", make(1, 70, 70, 2, 2, 16), {}, {"window": (0, -1)}
    yield "self_only", make(1, 35, 35, 2, 1, 16), {}, {"window": (0, 0)}
    yield "fewer_keys", make(2, 90, 41, 2, 1, 16), {}, {"window": (7, 3)}
    yield "more_keys", make(2, 41, 150, 2, 1, 16), {}, {"window": (30, 0)}
    yield "one_query", make(2, 1, 150, 6, 2, 16), {}, {"window": (63, 0)}
    yield "sinks", make(2, 50, 50, 4, 2, 16), {"sinks": heads(4)}, {"window": (15, 0)}
    yield "sinks_no_keys", make(1, 50, 20, 4, 1, 16), {"sinks": heads(4)}, {"window": (5, 0)}
    yield "sink_tokens", make(1, 120, 120, 2, 1, 16), {}, {"window": (20, 0), "sink_tokens": 5}
    yield "alibi", make(1, 70, 90, 4, 2, 16), {"alibi_slopes": slopes}, {"window": (40, 20)}
    yield "bias", make(2, 40, 55, 2, 1, 16), {"distance_bias": normal(2, 21, device=device)}, {"window": (20, 11)}
    yield "bias_longer", make(1, 20, 45, 2, 2, 16), {"distance_bias": normal(2, 201, device=device)}, {"scale": 1.0}
    yield "bias_one", make(1, 30, 30, 2, 1, 16), {"distance_bias": normal(2, 1, device=device)}, {"window": (9, 0)}
    yield "bias_no_keys", make(1, 40, 20, 2, 1, 16), {"distance_bias": normal(2, 7, device=device)}, {"window": (5, 0)}
    yield "softcap", make(1, 70, 70, 2, 1, 16), {}, {"window": (30, 2), "softcap": 3.0, "scale": 0.7}
    yield "dilated", make(1, 101, 101, 2, 1, 16), {}, {"window": (5, 3), "dilation": 3}
    yield "dilated_long", make(1, 30, 43, 2, 1, 16), {}, {"window": (50, 0), "dilation": 4}
    yield (
        "everything",
        make(1, 75, 90, 4, 2, 40, 24),
        {"sinks": heads(4), "alibi_slopes": slopes},
        {"window": (6, 2), "dilation": 2, "softcap": 5.0, "sink_tokens": 3, "scale": 0.3},
    )
    yield (
        "bias_everything",
        make(1, 40, 50, 2, 1, 40, 24),
        {"sinks": heads(2), "alibi_slopes": slopes[:2], "distance_bias": normal(2, 35, device=device)},
        {"window": (6, 2), "dilation": 2, "softcap": 5.0, "sink_tokens": 3, "scale": 0.3},
    )
    yield (
        "bias_packed",
        make(0, 40, 36, 2, 1, 16),
        {
            "cu_seqlens_q": offsets(2, 7, 7, 36),
            "cu_seqlens_k": offsets(0, 9, 12, 30),
            "distance_bias": normal(2, 17, device=device),
        },
        {"window": (-1, 3), "sink_tokens": 2},
    )
    yield "packed", make(0, 60, 60, 2, 1, 16), {"cu_seqlens_q": offsets(0, 7, 7, 40, 60)}, {"window": (9, 4)}
    yield (
        "packed_all",
        make(0, 70, 64, 4, 2, 16),
        {
            "sinks": heads(4),
            "alibi_slopes": slopes,
            "cu_seqlens_q": offsets(2, 7, 7, 45, 66, dtype=torch.int64),
            "cu_seqlens_k": offsets(0, 9, 12, 30, 60, dtype=torch.int64),
        },
        {"window": (4, 1), "dilation": 2, "sink_tokens": 2},
    )
    yield "empty_batch", tuple(x[:0] for x in make(1, 5, 5, 2, 1, 16)), {}, {"window": (3, 0)}
    q, k, v = make(1, 9, 9, 2, 1, 16)
    yield "no_queries", (q[:, :0], k, v), {"sinks": heads(2)}, {"window": (3, 0)}
    yield "no_keys", (q, k[:, :0], v[:, :0]), {}, {"window": (3, 0)}
    fused = normal(1, 45, 8, 16, device=device, dtype=dtype)
    yield "fused_qkv", (fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]), {}, {"window": (12, 0)}
    yield (
        "sequence_major",
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in make(3, 40, 40, 2, 1, 16)),
        {},
        {"window": (12, 0)},
    )
    q, k, v = make(2, 33, 33, 2, 1, 16)
    yield "expanded", (q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)), {}, {"window": (10, 0)}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, (q, k, v), tensors, options in cases(device, torch.float32):
        order = ("sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "distance_bias")
        yield Sample((q, k, v, *(tensors.get(n) for n in order)), options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"window_attention": _samples}
