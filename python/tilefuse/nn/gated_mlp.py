"""The gated MLP of dense layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import errors
from ..ops.norm.gated_activation import ACTIVATIONS, gated_activation
from .common import check_positive, linear, reset_linear

__all__ = ["GatedMLP"]

_NAME = "nn.GatedMLP"


class GatedMLP(nn.Module):
    """``y = down_proj(act(gate_proj(x)) * up_proj(x))``, with the activation in one pass (``gated_activation``).

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: ``"silu"`` (Llama, Qwen, DeepSeek), ``"gelu"``, ``"gelu_tanh"`` (Gemma: Hugging Face's
            ``gelu_pytorch_tanh``), ``"relu2"`` or ``"swiglu_oai"``.
        alpha, limit: of the activation, as in ``tilefuse.gated_activation``.
        bias: whether the three layers have one.
        initializer_range: standard deviation of ``reset_parameters``.
        device, dtype: of the parameters.

    The three layers are submodules that the call goes through: adapters, hooks and quantised layers in their places
    have their effect.

    State dict: ``gate_proj.weight [I, H]``, ``up_proj.weight [I, H]``, ``down_proj.weight [H, I]`` and biases, as
    Hugging Face's ``LlamaMLP``, ``Qwen3MLP``, ``GemmaMLP`` and ``DeepseekV3MLP``.

    Raises:
        ValueError: sizes below 1, an unknown activation; in the call, what ``tilefuse.gated_activation`` raises.

    Example::

        mlp = tilefuse.nn.GatedMLP(64, 172)
        y = mlp(torch.randn(2, 5, 64))

    Source: Shazeer, GLU variants (arXiv 2002.05202).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 0.0,
        bias: bool = False,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_positive(_NAME, hidden_size=hidden_size, intermediate_size=intermediate_size)
        if activation not in ACTIVATIONS:
            errors.value_error(_NAME, "activation", " or ".join(map(repr, ACTIVATIONS)), activation)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.alpha, self.limit = activation, alpha, limit
        self.initializer_range = initializer_range
        self.gate_proj = linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = linear(intermediate_size, hidden_size, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of ``initializer_range``, zero biases; a seed gives the same weights on every device."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            reset_linear(layer, self.initializer_range, generator)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., H]`` to ``[..., H]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = gated_activation(gate, up, activation=self.activation, alpha=self.alpha, limit=self.limit)
        return self.down_proj(hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + (f", limit={self.limit}" if self.limit else "")
