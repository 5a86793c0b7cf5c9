"""Inputs of ``int_quantize`` and ``int_dequantize``: every width, ragged groups, ranks, views."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...sample import Sample
from ..fp8.quantize import magnitudes

# options of calls: group sizes beside each other, both rules
RULES = tuple(
    {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    for bits, group_size in ((8, 0), (6, 32), (4, 64))
    for symmetric in (True, False)
)


def _quantize(device: torch.device) -> Iterator[Sample]:
    yield Sample((magnitudes((5, 300), torch.bfloat16).to(device),), {"bits": 4, "group_size": 128}, name="ragged")
    yield Sample((magnitudes((3, 64), torch.float32).to(device),), name="tokens")
    asymmetric = {"bits": 6, "group_size": 32, "symmetric": False}
    yield Sample((magnitudes((2, 3, 77), torch.float16).to(device),), asymmetric, name="leading")
    wide = {"symmetric": False, "group_size": 32, "eps": 1e-4}
    yield Sample((magnitudes((4, 2, 96), torch.bfloat16).to(device)[:, 1, 1:70],), wide, name="views")
    yield Sample((magnitudes((33,), torch.float32).to(device),), {"bits": 4, "group_size": 32}, name="vector")
    yield Sample((torch.zeros(0, 256, device=device),), {"bits": 4}, name="empty")


def _dequantize(device: torch.device) -> Iterator[Sample]:
    from ....ops.lowbit.quantize import int_quantize

    for i, options in enumerate(RULES):
        x = magnitudes((3 + i, 100), torch.float32, seed=i)
        rest = {"bits": options["bits"], "group_size": options["group_size"]}
        q, scale, zero = (t.to(device) for t in int_quantize(x, **options))
        yield Sample((q, scale, zero), rest, name=f"{options}")
        if options["symmetric"]:
            yield Sample((q, scale), rest | {"out_dtype": torch.float32}, name=f"{options}, no zero")
            yield Sample((q, scale.half(), zero.float() - 0.25), rest, name=f"{options}, float zero")


SAMPLES = {"int_quantize": _quantize, "int_dequantize": _dequantize}
