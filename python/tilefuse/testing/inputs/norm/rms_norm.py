"""Inputs of ``rms_norm`` and ``add_rms_norm``: ranks, dims around vectors and blocks, dtypes of weights, views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...sample import Sample


def normal(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def run(function, tensors, options, dtype=None):
    """The output and the gradients of the tensors that are there, for a fixed upstream gradient."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    upstream = normal(*out.shape, seed=7).to(tensors[0].device, tensors[0].dtype).to(out.dtype)
    return out, *torch.autograd.grad(out, [t for t in leaves if t is not None], upstream)


def cases(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]]:
    """name, (x, residual, weight) and options."""

    def make(*shape, weight_dtype=dtype, offset=0.0):
        weight_dtype = torch.float64 if dtype == torch.float64 else weight_dtype
        x, residual = (normal(*shape, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
        weight = normal(shape[-1], device=device, seed=2).mul(0.3).add(1.0 - offset).to(weight_dtype)
        return x, residual, weight

    yield "rows", make(7, 96), {}
    yield "batched_wide_weight", make(2, 3, 257, weight_dtype=torch.float32), {"eps": 1e-5}
    yield "offset", make(5, 64, offset=1.0), {"weight_offset": 1.0}
    yield "llama", make(9, 130), {"rounding": "llama"}
    yield (
        "llama_offset",
        make(3, 48, offset=1.0, weight_dtype=torch.float32),
        {"rounding": "llama", "weight_offset": 1.0},
    )
    x, residual, _ = make(4, 40)
    yield "no_weight", (x, residual, None), {}
    yield "vector", make(33), {}
    # with a small eps the gradient cancels: no two float32 evaluations of it agree
    yield "dim1", make(6, 1), {"eps": 4.0}
    # more rows than one sum of the weight's gradient holds, at a number that no block divides
    yield "spans", make(71, 20), {}
    x, residual, weight = make(6, 3, 96)
    yield "views", (x[:, 1, 16:80], residual[:, 2, :64], weight[8:72]), {}
    yield "transposed", (x[:, 0].T, residual[:, 1].T, weight[:6]), {}
    yield "empty", make(0, 32), {}


def _rms_norm(device: torch.device) -> Iterator[Sample]:
    for name, (x, _, weight), options in cases(device, torch.bfloat16):
        yield Sample((x, weight), options, name)


def _add_rms_norm(device: torch.device) -> Iterator[Sample]:
    for name, tensors, options in cases(device, torch.bfloat16):
        yield Sample(tensors, options, name)


SAMPLES: dict[str, Callable[[torch.device], Iterator[Sample]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
}
