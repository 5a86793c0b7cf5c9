"""AMD's ZenDNN kernels for PyTorch: the package ``zentorch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import Peer
from . import load_library

PACKAGE = "zentorch"


def op(name: str) -> Any:
    """One of the library's ops, as the dispatcher's own callable."""
    load_library(PACKAGE, "zentorch/libzentorch.so", "2.13")
    return getattr(torch.ops.zentorch, name).default


def peer(load: Callable[[], Callable[..., Any]], **options: Any) -> Peer:
    return Peer(load=load, devices=("cpu",), package=PACKAGE, **options)


def zentorch_fused_moe() -> Peer:
    """x, w_gate_up, w_down, weights, ids -> the experts' output.

    It reorders the weights in place and keeps a second copy for small batches, which flushing its cache does not free.
    """

    def prepare(x, w_gate_up, w_down, weights, ids):
        # the first call reorders the weights in place and remembers their address: others may have lain there before
        op("zentorch_flush_moe_weight_cache")()
        return x, w_gate_up.clone(), w_down.clone(), weights, ids

    def load():
        experts = op("zentorch_fused_moe")

        def run(x, w13, w2, weights, ids):
            # it adds to what is there
            out = torch.zeros_like(x)
            experts(out, x, w13, w2, None, None, weights, ids, False, "silu")
            return out

        return run

    return peer(load, prepare=prepare, keeps_memory=True)


def zentorch_linear_unary(weight_of: Callable[..., Tensor], **options: Any) -> Peer:
    """x and what ``weight_of`` makes a bf16 [N, K] of -> x @ weight.T, the weight packed."""

    def prepare(x, *weight):
        return x, op("zentorch_weight_prepack_for_linear")(weight_of(*weight).clone())

    def load():
        linear = op("zentorch_linear_unary")
        return lambda x, w: linear(x, w, None, is_weight_prepacked=True, post_op="none")

    return peer(load, prepare=prepare, **options)


def zentorch_sdpa(*, scale: float | None = None) -> Peer:
    """q, k, v [B, S, H, D] -> causal attention; v is padded to the width of k."""

    def prepare(q, k, v):
        width = v.shape[-1]
        v = F.pad(v, (0, q.shape[-1] - width))
        return *(t.transpose(1, 2).contiguous() for t in (q, k, v)), width

    def load():
        attention = op("zentorch_sdpa")
        return lambda q, k, v, width: attention(q, k, v, 0.0, True, scale=scale)[0].transpose(1, 2)[..., :width]

    return peer(load, prepare=prepare)
