"""Inputs of the router's losses and of the bias update."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...sample import Sample
from .moe_plan import ids_of


def _logits(tokens: int, experts: int, device: torch.device):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)).to(device)


def _balance(device: torch.device) -> Iterator[Sample]:
    valid = torch.arange(12, device=device) % 5 != 4
    for kind in ("switch", "gshard", "sequence", "device", "communication"):
        args = (_logits(12, 8, device), ids_of(12, 2, 8, device, dropped=0.2), valid)
        options = {"kind": kind, "n_devices": 4, "sequence_length": 6, "normalization": "topk"}
        yield Sample(args, options, kind)
    yield Sample((_logits(4, 6, device).bfloat16(), ids_of(4, 2, 6, device)), {"score": "sigmoid"}, "bf16_sigmoid")
    yield Sample((_logits(0, 6, device), ids_of(0, 2, 6, device)), name="no_tokens")


def _z(device: torch.device) -> Iterator[Sample]:
    yield Sample((_logits(12, 8, device), torch.arange(12, device=device) < 9), name="padded")
    yield Sample((_logits(5, 7, device).half(),), name="half")


def _bias(device: torch.device) -> Iterator[Sample]:
    counts = torch.tensor([3, 5, 4, 4], device=device)
    yield Sample((torch.zeros(4, device=device), counts), name="counts")
    yield Sample((_logits(4, 1, device).flatten(), counts.float()), {"rate": 0.1}, "float_counts")


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {
    "moe_balance_loss": _balance,
    "moe_z_loss": _z,
    "moe_update_bias": _bias,
}
