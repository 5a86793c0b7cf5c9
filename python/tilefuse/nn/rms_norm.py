"""RMSNorm as a module, alone or of a sum with the residual stream."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.norm.rms_norm import ROUNDINGS, add_rms_norm, rms_norm
from .common import check_positive

__all__ = ["RMSNorm"]

_NAME = "nn.RMSNorm"


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`` over the last dim (``tilefuse.rms_norm``).

    Called with a residual it returns ``(y, h)`` of ``h = x + residual`` in one pass (``tilefuse.add_rms_norm``).

    Args:
        hidden_size: D.
        eps: added to the mean square.
        weight_offset: what the weight is stored less of: 1.0 for Gemma.
        rounding: ``"once"``, or ``"llama"`` for the two roundings of Hugging Face's Llama, Qwen and Mistral.
        device, dtype: of the weight.

    State dict: ``weight [D]``, as Hugging Face's ``LlamaRMSNorm``, ``Qwen3RMSNorm``, ``GemmaRMSNorm`` and
    ``torch.nn.RMSNorm``.

    Raises:
        ValueError: a hidden_size below 1, an unknown rounding; in the call, what ``tilefuse.rms_norm`` raises.

    Example::

        norm = tilefuse.nn.RMSNorm(64)
        x, residual = torch.randn(4, 64), torch.randn(4, 64)
        y, residual = norm(x, residual)

    Source: Zhang and Sennrich (arXiv 1910.07467).
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        rounding: str = "once",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_positive(_NAME, hidden_size=hidden_size)
        if rounding not in ROUNDINGS:
            errors.value_error(_NAME, "rounding", "'once' or 'llama'", rounding)
        self.hidden_size, self.eps = hidden_size, eps
        self.weight_offset, self.rounding = weight_offset, rounding
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A weight that changes nothing; ``generator`` is not drawn from."""
        self.weight.fill_(1.0 - self.weight_offset)

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x [..., D]``, or ``(y, h)`` of its sum with ``residual``."""
        if residual is None:
            return rms_norm(x, self.weight, eps=self.eps, weight_offset=self.weight_offset, rounding=self.rounding)
        return add_rms_norm(
            x, residual, self.weight, eps=self.eps, weight_offset=self.weight_offset, rounding=self.rounding
        )

    def extra_repr(self) -> str:
        extra = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.hidden_size}, eps={self.eps}{extra}, rounding={self.rounding!r}"
