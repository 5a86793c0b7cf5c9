"""A linear layer that trains what its low-bit form will compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors
from ..ops.lowbit.fake_quantize import fake_quantize
from ..ops.lowbit.quantize import check_format, int_quantize
from .common import check_positive, draw_

__all__ = ["QATLinear"]

_NAME = "nn.QATLinear"


class QATLinear(nn.Linear):
    """``y = x W^T + bias`` with W, and on request x, quantised and dequantised on the way (``tilefuse.fake_quantize``).

    The gradients are straight through; ``weight`` stays a parameter of full precision. What ``convert`` returns is, bit
    for bit, what the forward multiplied with, in every dtype.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        bits, group_size, symmetric, scale_gradient: of the weight, as in ``tilefuse.fake_quantize``.
        activation_bits: 8, 6 or 4 for symmetric codes of x with one scale per token; None leaves x alone.
        device, dtype: of the parameters.

    State dict: that of ``torch.nn.Linear``.

    Raises:
        ValueError: sizes below 1, bits, group_size; in the call, an x of another width.

    Example::

        layer = tilefuse.nn.QATLinear.from_linear(torch.nn.Linear(256, 64), bits=4, group_size=32)
        layer(torch.randn(8, 256)).square().mean().backward()
        q, scale, zero = layer.convert()

    Source: Jacob et al. (arXiv 1712.05877), section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        scale_gradient: bool = False,
        activation_bits: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_positive(_NAME, in_features=in_features, out_features=out_features)
        check_format(_NAME, bits, group_size)
        if activation_bits not in (None, 8, 6, 4):
            errors.value_error(_NAME, "activation_bits", "8, 6, 4 or None", activation_bits)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.scale_gradient, self.activation_bits = scale_gradient, activation_bits

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        scale_gradient: bool = False,
        activation_bits: int | None = None,
    ) -> QATLinear:
        """Takes over a Linear's parameters, the same objects.

        Raises:
            ValueError: not a ``torch.nn.Linear``, options as in the constructor.
        """
        if not isinstance(linear, nn.Linear):
            errors.value_error(f"{_NAME}.from_linear", "linear", "a torch.nn.Linear", type(linear).__name__)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_gradient=scale_gradient,
            activation_bits=activation_bits,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation ``K ** -0.5``, bias 0. Same seed, same bits."""
        draw_(self.weight, self.in_features**-0.5, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def quantized_weight(self) -> Tensor:
        """``[N, K]`` in the weight's dtype: what the forward multiplies with, with its gradient."""
        return fake_quantize(
            self.weight,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_gradient=self.scale_gradient,
        )

    @torch.no_grad()
    def convert(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(q, scale, zero)`` of the weight, as ``tilefuse.int_quantize`` stores them.

        ``tilefuse.int_dequantize`` makes ``quantized_weight`` of them, bit for bit.
        """
        return int_quantize(self.weight, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def forward(self, x: Tensor) -> Tensor:
        """``x [.., K]`` to ``[.., N]``."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            errors.value_error(_NAME, "x", f"[.., {self.in_features}]", x)
        if self.activation_bits is not None:
            x = fake_quantize(x, bits=self.activation_bits, group_size=0, scale_gradient=self.scale_gradient)
        return F.linear(x, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        activations = "" if self.activation_bits is None else f", activation_bits={self.activation_bits}"
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, {kind}{activations}"
