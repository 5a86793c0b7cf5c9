"""Inputs of ``rope`` and ``rope_qk``: every option, odd head counts and dims, views, empty input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample


def tables(rotary_dim: int, rows: int, device: torch.device | str = "cpu", factor: float = 1.0):
    """cos and sin ``[rows, rotary_dim / 2]`` float32, times an attention factor."""
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim
    angle = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * 10000.0**-exponent
    return (angle.cos() * factor).float(), (angle.sin() * factor).float()


def normal(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def packed_qkv(tokens: int, heads_q: int, heads_k: int, dim: int, device, dtype) -> tuple[Tensor, Tensor]:
    """q and k as views into one projection [T, (Hq + 2 Hk) * D], the way a model holds them."""
    qkv = normal(tokens, (heads_q + 2 * heads_k), dim, device=device, dtype=dtype)
    return qkv[:, :heads_q], qkv[:, heads_q : heads_q + heads_k]


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor, tuple, dict[str, Any]]]:
    """name, q, k, the other tensors (cos, sin, positions?, cu_seqlens?) and the options of one call."""

    def x(*shape: int) -> Tensor:
        return normal(*shape, device=device, dtype=dtype)

    def index(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    t64 = tables(64, 64, device)
    yield "batched", x(2, 7, 4, 64), x(2, 7, 2, 64), t64, {}
    yield "packed", x(13, 4, 64), x(13, 2, 64), t64, {"interleaved": True}
    yield "one_head", x(5, 1, 64), x(5, 1, 64), t64, {}  # known bug 1
    yield "conjugate", x(5, 2, 64), x(5, 2, 64), t64, {"conjugate": True}
    yield "more_k_heads", x(5, 3, 64), x(5, 11, 64), t64, {}  # known bug 6
    yield "dim72_interleaved", x(2, 19, 3, 72), x(2, 19, 1, 72), tables(72, 32, device), {"interleaved": True}  # 2
    yield "factor", x(5, 2, 64), x(5, 2, 64), tables(64, 8, device, factor=1.2772588722239782), {}
    # rotary dims that are no power of two, partial and not at the start (known bug 3)
    for dim, rotary, offset in ((80, 20, 0), (96, 30, 66), (112, 64, 24), (192, 64, 128), (160, 96, 0), (256, 256, 0)):
        for interleaved in (False, True):
            options = {"interleaved": interleaved, "rotary_offset": offset}
            yield (
                f"dim{dim}_{rotary}_{offset}{'_interleaved' * interleaved}",
                x(6, 3, dim),
                x(6, 1, dim),
                tables(rotary, 8, device),
                options,
            )
    # an odd head dim: no row but the first starts at an even element
    for interleaved in (False, True):
        yield (
            f"dim41_20_13{'_interleaved' * interleaved}",
            x(5, 3, 41),
            x(5, 2, 41),
            tables(20, 8, device),
            {"interleaved": interleaved, "rotary_offset": 13},
        )
    yield "dim2", x(6, 3, 2), x(6, 1, 2), tables(2, 8, device), {}
    yield "dim512", x(2, 3, 512), x(2, 1, 512), tables(512, 8, device), {}
    # positions: both widths, not monotonic, repeated, strided (known bug 8)
    order = index([63, 0, 5, 5, 31, 1, 2], torch.int64)
    yield "positions_packed", x(7, 4, 64), x(7, 2, 64), (*t64, order), {}
    yield "positions_batched", x(2, 7, 4, 64), x(2, 7, 2, 64), (*t64, torch.stack((order, order.flip(0))).int()), {}
    yield "positions_expanded", x(2, 7, 4, 64), x(2, 7, 2, 64), (*t64, order.expand(2, 7)), {}
    yield "positions_strided", x(7, 4, 64), x(7, 2, 64), (*t64, order.repeat_interleave(2)[::2]), {}
    # boundaries: an empty sequence, padding after the last one, before the first one (known bugs 8, 12)
    yield "cu_seqlens", x(12, 4, 64), x(12, 2, 64), (*t64, None, index([0, 3, 3, 11, 12])), {}
    yield "cu_seqlens_padded", x(12, 4, 64), x(12, 2, 64), (*t64, None, index([0, 5, 9], torch.int64)), {}
    yield "cu_seqlens_one", x(12, 4, 64), x(12, 2, 64), (*t64, None, index([0])), {}
    # mRoPE, contiguous and interleaved sections (known bug 13)
    three = torch.stack((order, order.flip(0), order.roll(2)))
    section = {"mrope_section": (8, 12, 12)}
    yield "mrope", x(7, 4, 64), x(7, 2, 64), (*t64, three), section
    yield (
        "mrope_interleaved",
        x(7, 4, 64),
        x(7, 2, 64),
        (*t64, three.int()),
        {
            "mrope_section": (12, 10, 10),
            "mrope_interleaved": True,
            "interleaved": True,
        },
    )
    yield "mrope_batched", x(2, 7, 4, 64), x(2, 7, 2, 64), (*t64, torch.stack((three, three.flip(1)), 1)), section
    # views (known bug 7)
    yield "packed_qkv", *packed_qkv(9, 4, 2, 64, device, dtype), t64, {}
    unaligned = x(9 * 2 * 64 + 1)[1:].view(9, 2, 64)
    yield "unaligned", unaligned, unaligned, t64, {}
    heads_first = x(2, 4, 7, 64).transpose(1, 2)
    yield "heads_first", heads_first, heads_first[:, :, :2], t64, {"interleaved": True}
    strided = x(5, 2, 128)[..., ::2]
    yield "last_dim_strided", strided, strided, t64, {}
    wide = tables(128, 16, device)
    yield "table_views", x(5, 2, 64), x(5, 2, 64), (wide[0][:, :32], wide[1][:, 32:]), {}
    # nothing to do
    yield "no_tokens", x(0, 4, 64), x(0, 2, 64), t64, {}
    yield "no_batch", x(0, 5, 4, 64), x(0, 5, 2, 64), t64, {}
    yield "no_k_heads", x(5, 4, 64), x(5, 0, 64), t64, {}


def _samples_x(device: torch.device) -> Iterator[Sample]:
    for name, q, _, rest, options in cases(device, torch.float32):
        yield Sample((q, *rest), options, name)


def _samples_qk(device: torch.device) -> Iterator[Sample]:
    for name, q, k, rest, options in cases(device, torch.bfloat16):
        yield Sample((q, k, *rest), options, name)


def in_place(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which an in-place op may change."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _samples_in_place(device: torch.device) -> Iterator[Sample]:
    for sample in _samples_x(device):
        yield Sample((in_place(sample.args[0]), *sample.args[1:]), sample.kwargs, sample.name)


def _samples_qk_in_place(device: torch.device) -> Iterator[Sample]:
    for sample in _samples_qk(device):
        yield Sample((*map(in_place, sample.args[:2]), *sample.args[2:]), sample.kwargs, sample.name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {
    "rope": _samples_x,
    "rope_qk": _samples_qk,
    "rope_": _samples_in_place,
    "rope_qk_": _samples_qk_in_place,
}
