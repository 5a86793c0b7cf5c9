"""The table of sinusoidal position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors

__all__ = ["sinusoidal_table"]

_NAME = "sinusoidal_table"
_LAYOUTS = ("concat", "interleaved")


def sinusoidal_table(
    dim: int,
    max_positions: int,
    *,
    base: float = 10000.0,
    layout: str = "concat",
    angle_dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sinusoidal position embeddings ``[max_positions, dim]`` in float32, to be added to token embeddings.

    Pair i of position p is ``sin(p * f_i), cos(p * f_i)`` with ``f_i = base ** (-2i / dim)``. (tensor2tensor's own code
    divides by ``dim / 2 - 1`` in the exponent: other frequencies.)

    Args:
        dim: of the model, even.
        max_positions: number of rows.
        base: positive.
        layout: ``"concat"``, all sines and then all cosines (tensor2tensor, Marian), or ``"interleaved"``, the pairs of
            the paper.
        angle_dtype: float64 angles are right to the last bit of the float32 table at any position; float32 ones are off
            by up to 6e-3 at 128k positions.
        device: where the table goes; it is always computed on the CPU.

    Not differentiable; the result does not require grad.

    Raises:
        ValueError: an odd dim or one below 2, max_positions below 0, a base that is not positive, another layout.
        TypeError: an ``angle_dtype`` other than float32 and float64.

    Example::

        positions = tilefuse.sinusoidal_table(512, 4096)

    Source: Vaswani et al. (arXiv 1706.03762), section 3.5.
    """
    if dim < 2 or dim % 2:
        errors.value_error(_NAME, "dim", "even and at least 2", dim)
    if max_positions < 0:
        errors.value_error(_NAME, "max_positions", "at least 0", max_positions)
    if not 0.0 < base < float("inf"):
        errors.value_error(_NAME, "base", "positive and finite", base)
    if layout not in _LAYOUTS:
        errors.value_error(_NAME, "layout", "'concat' or 'interleaved'", layout)
    if angle_dtype not in (torch.float32, torch.float64):
        errors.type_error(_NAME, "angle_dtype", "torch.float32 or torch.float64", angle_dtype)
    with torch.device("cpu"), torch.no_grad():
        exponent = torch.arange(0, dim, 2).to(angle_dtype) / dim
        angle = torch.arange(max_positions).to(angle_dtype)[:, None] * torch.pow(base, -exponent)
        waves = angle.sin().float(), angle.cos().float()
        table = torch.cat(waves, -1) if layout == "concat" else torch.stack(waves, -1).flatten(-2)
    return table.to(torch.get_default_device() if device is None else device)
