"""Inputs of ``mla_expand_kv``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...sample import Sample
from .common import normal


def cases(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """name, (latent, w_ukv) and options."""
    for name, tokens, heads, nope, v_dim, rank, rope in (
        ("deepseek", 7, 2, 128, 128, 512, 64),
        ("no_rope", 9, 2, 256, 256, 128, 0),
        ("odd_widths", 7, 3, 20, 36, 90, 6),
        ("one_head", 5, 1, 21, 37, 91, 6),
        ("many_tokens", 70, 3, 64, 128, 64, 64),
        ("no_tokens", 0, 2, 32, 32, 64, 16),
    ):
        latent = normal(tokens, rank + rope + 8, device=device, dtype=dtype)[:, : rank + rope]
        w_ukv = normal(heads * (nope + v_dim), rank, device=device, dtype=torch.float32, seed=3) * rank**-0.5
        yield name, (latent, w_ukv.to(dtype)), {"kv_lora_rank": rank, "nope_dim": nope, "v_dim": v_dim}


def _samples(device: torch.device) -> Iterator[Sample]:
    for name, args, options in cases(device, torch.bfloat16):
        yield Sample(args, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {"mla_expand_kv": _samples}
