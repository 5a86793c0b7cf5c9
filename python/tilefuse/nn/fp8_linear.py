"""A linear layer whose matrix products run in FP8 with 128 x 128 weight blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors, library, packs
from ..ops.fp8.linear import fp8_linear
from ..ops.fp8.matmul import fp8_matmul
from ..ops.fp8.quantize import check_scale_options, fp8_dequantize, fp8_quantize
from ..packing import Weight
from .common import check_positive, draw_, keep_dtype

__all__ = ["FP8Linear"]

_NAME = "nn.FP8Linear"
_CODES = torch.float8_e4m3fn
_BLOCK = (128, 128)


class _FrozenLinear(torch.autograd.Function):
    """Forward in FP8; only x gets a gradient, through the dequantised weight (adapters on frozen FP8 weights)."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, scale_format, eps):
        ctx.save_for_backward(weight, scale)
        return _product(x, weight, scale, bias, scale_format, eps)

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dout):
        weight, scale = ctx.saved_tensors
        return dout @ fp8_dequantize(weight, scale, block=_BLOCK, out_dtype=dout.dtype), *[None] * 5


def _product(x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, scale_format: str, eps: float) -> Tensor:
    codes, x_scale = fp8_quantize(x, scale_format=scale_format, eps=eps)
    return fp8_matmul(codes, x_scale, weight, scale, bias, out_dtype=x.dtype)


class FP8Linear(packs.PackableModule):
    """``y = x W^T + bias`` with W in e4m3 for inference, or a master weight and FP8 products for training.

    * ``master_weight=False``: W is ``weight * weight_scale_inv`` (one scale per 128 x 128 block), frozen; x is
      quantised 1 x 128 on the way in. x still gets a gradient, so adapters can train on top; weight, scale and bias
      get none.
    * ``master_weight=True``: ``weight`` is an ordinary parameter of ``dtype``; forward, input gradient and weight
      gradient run in FP8 (``tilefuse.fp8_linear``).

    Args:
        in_features, out_features: K and N, any sizes.
        bias: whether there is one, of ``dtype``.
        master_weight: see above.
        scale_format: ``"fp32"``, or ``"pow2"`` for scales that are powers of two.
        eps: of every quantisation, as in ``tilefuse.fp8_linear``, which says when gradients want a smaller one.
        initializer_range: standard deviation of ``reset_parameters``; None is ``K ** -0.5``.
        device, dtype: of the parameters; e4m3 codes and scales keep their own dtypes, also through ``.to(dtype)``.

    State dict: ``weight [N, K]``, ``bias [N]``; without a master weight, ``weight`` is float8_e4m3fn and
    ``weight_scale_inv [ceil(N / 128), ceil(K / 128)]`` float32 is there too: the names of Hugging Face's ``FP8Linear``
    and of DeepSeek-V3's checkpoints. (Multiply by it: the name means the inverse of the quantisation scale.)

    Raises:
        ValueError: sizes below 1, an unknown scale_format, an eps that is not positive or too small.

    Example::

        layer = tilefuse.nn.FP8Linear.from_linear(torch.nn.Linear(256, 512))
        y = layer(torch.randn(4, 256))

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        master_weight: bool = False,
        scale_format: str = "fp32",
        eps: float = 1e-12,
        initializer_range: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_positive(_NAME, in_features=in_features, out_features=out_features)
        if scale_format not in ("fp32", "pow2"):
            errors.value_error(_NAME, "scale_format", "fp32 or pow2", scale_format)
        check_scale_options(_NAME, scale_format, eps)
        self.in_features, self.out_features = in_features, out_features
        self.master_weight, self.scale_format, self.eps = master_weight, scale_format, eps
        self.initializer_range = in_features**-0.5 if initializer_range is None else initializer_range
        shape = (out_features, in_features)
        if master_weight:
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter("weight_scale_inv", None)
        else:
            self._set_codes(
                torch.empty(shape, device=device, dtype=_CODES),
                torch.empty([-(-n // 128) for n in shape], device=device, dtype=torch.float32),
            )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=master_weight)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def _scales(self) -> dict[str, Any]:
        return {"scale_format": self.scale_format, "eps": self.eps}

    def _set_codes(self, weight: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, master_weight: bool = False, scale_format: str = "fp32", eps: float = 1e-12
    ) -> FP8Linear:
        """The FP8 form of a Linear: quantises its weight, or takes it over as the master weight (the same Parameter).

        Raises:
            ValueError: not a ``torch.nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            errors.value_error(f"{_NAME}.from_linear", "linear", "a torch.nn.Linear", type(linear).__name__)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, master_weight=master_weight,
            scale_format=scale_format, eps=eps, device="meta", dtype=linear.weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = linear.weight, linear.bias
        if not master_weight:
            layer._quantize(linear.weight)
        return layer.train(linear.training)

    @torch.no_grad()
    def _quantize(self, weight: Tensor) -> None:
        self._set_codes(*fp8_quantize(weight.detach(), block=_BLOCK, **self._scales))
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)

    def quantize_(self) -> FP8Linear:
        """Turns a master weight into codes and scales, in place, for inference. Returns self."""
        if self.master_weight:
            self.master_weight = False
            self._quantize(self.weight)
        return self

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A ``torch.nn.Linear`` with the dequantised (or master) weight, in ``dtype`` (bias's or bfloat16 if None)."""
        if dtype is None:
            dtype = self.weight.dtype if self.master_weight else torch.bfloat16
            dtype = self.bias.dtype if self.bias is not None else dtype
        weight = self.weight.detach().to(dtype, copy=True) if self.master_weight else self.dequantize(dtype)
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return layer.train(self.training)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """``[N, K]`` in ``dtype``: the weight that the products see."""
        weight, scale = packs.read(self, "weight"), self.weight_scale_inv
        if self.master_weight:
            weight, scale = fp8_quantize(weight.detach(), block=_BLOCK, **self._scales)
        return fp8_dequantize(weight, scale, block=_BLOCK, out_dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation ``initializer_range`` (then quantised), bias 0. Same seed, same bits."""
        with packs.unpacked(self):
            self._reset(generator)

    def _reset(self, generator: torch.Generator | None) -> None:
        if self.weight.is_meta:
            return
        if self.master_weight:
            draw_(self.weight, self.initializer_range, generator)
        else:
            values = torch.empty(self.weight.shape, device=self.weight.device, dtype=torch.float32)
            draw_(values, self.initializer_range, generator)
            codes, scale = fp8_quantize(values, block=_BLOCK, **self._scales)
            self.weight.copy_(codes)
            self.weight_scale_inv.copy_(scale)
        if self.bias is not None:
            self.bias.zero_()

    def pack(self, mode: str = "keep") -> packs.PackedMemory:
        """Packs the codes for inference on a CPU (``tilefuse.pack_weight``): the same bits, sooner.

        As ``MoE.pack``, which says when the pack is used and how a weight that changed is noticed. The scales and the
        bias stay parameters.

        Args:
            mode: ``"keep"`` or ``"only"``, which frees ``weight``; ``dequantize`` and ``to_linear`` then unpack it.

        Returns:
            ``(before, after)``: bytes of the codes, the pack included.

        Raises:
            ValueError: mode; a master weight (``quantize_`` makes codes of it); a weight that is not on the CPU or no
            parameter of its own.
        """
        if self.master_weight:
            errors.value_error(f"{_NAME}.pack", "master_weight", "False (quantize_() makes codes)", True)
        return packs.pack(f"{_NAME}.pack", self, (packs.Source("weight"),), mode)

    def unpack(self) -> FP8Linear:
        """Takes ``pack`` back: the pack goes, a freed weight is there again. Returns self."""
        packs.unpack(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        with packs.unpacked(self):
            return self._move(fn, recurse)

    def _move(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> FP8Linear:
        if self.master_weight:
            return super()._apply(fn, recurse)
        kept: dict[str, Any] = {name: self._parameters.pop(name) for name in ("weight", "weight_scale_inv")}
        try:
            moved = keep_dtype({name: p.detach() for name, p in kept.items()}, fn)
            super()._apply(fn, recurse)
        finally:
            bias = self._parameters.pop("bias")
            # in the order in which they were registered
            self._parameters |= kept | {"bias": bias}
        for name, tensor in moved.items():
            if kept[name].device != tensor.device:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``x [.., K]`` float32, bfloat16 or float16 to ``[.., N]`` of the same dtype.

        Raises:
            ValueError: x of another width. TypeError: dtypes.
        """
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            errors.value_error(_NAME, "x", f"[.., {self.in_features}]", x)
        errors.check_dtype(_NAME, "x", x, errors.FLOATS)
        (x,) = library.autocast(x)
        if self.master_weight:
            return fp8_linear(x, self.weight, self.bias, **self._scales)
        bias, scale = None if self.bias is None else self.bias.detach(), self.weight_scale_inv.detach()
        packed = packs.packed_weights(self, x)
        if packed is None:
            weight: Weight = self.weight
        else:
            (weight,), scale = packed, packs.checked(self, scale)
        args = (x.reshape(-1, self.in_features), weight, scale, bias, self.scale_format, self.eps)
        out = _FrozenLinear.apply(*args) if errors.needs_grad(x) else _product(*args)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        weight: Any = errors.dtype_name(self.weight.dtype)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={weight}, scale_format={self.scale_format}"
        )
