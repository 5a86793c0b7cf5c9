"""FP8 checkpoints in the DeepSeek-V3 format: ``FP8Linear`` and ``FP8Experts`` of Hugging Face's finegrained FP8.

Weights stay as they were loaded: e4m3 codes with one float32 dequantisation scale per 128 x 128 block
(``weight_scale_inv``; UE8M0 scales are read as what they are, powers of two). Activations are quantised 1 x 128 by the
exact rule of ``fp8_quantize``. This runs on every device tilefuse runs on, also where the stock modules have no kernel.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ... import packs
from ...ops.fp8.grouped_matmul import fp8_grouped_matmul
from ...ops.fp8.matmul import fp8_matmul
from ...ops.fp8.quantize import blocks_of, fp8_dequantize, fp8_quantize
from ...ops.moe.grouped_matmul import grouped_matmul
from ...ops.moe.moe_combine import moe_combine
from ...ops.moe.moe_experts_fp8 import moe_experts_fp8
from ...ops.moe.moe_plan import moe_plan
from ...packing import Weight
from .experts import activation_of
from .swap import Left, Swap, original

CODES = torch.float8_e4m3fn
TILE = (128, 128)
_STOCK = "transformers.integrations.finegrained_fp8"
# of weights dequantised at a time in a backward
_DEQUANTISED_BYTES = 2**30


def register() -> None:
    """``experts_implementation="tilefuse"`` for FP8 models, whose registry is another than the usual experts'."""
    from transformers.integrations import finegrained_fp8

    finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS.register("tilefuse", experts_forward)


def swap(module: nn.Module, config: Any) -> Swap | Left | None:
    stock = next((c for c in type(module).__mro__ if c.__module__ == _STOCK), None)
    if stock is None or stock.__name__ not in _PARTS:
        return None
    if type(module).forward is not stock.forward or not original(stock):
        return Left(f"{type(module).__name__} has a forward of its own")
    unfit, forward, what = _PARTS[stock.__name__]
    if why := unfit(module):
        return Left(why)
    names = ("weight",) if stock.__name__ == "FP8Linear" else ("gate_up_proj", "down_proj")
    return Swap(forward, what, sources=tuple(packs.Source(name) for name in names))


def _unfit(module: Any, weight: Tensor, scale: Tensor) -> str:
    """What the ops cannot do exactly for a module of FP8 weights."""
    if weight.dtype != CODES:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}, not float8_e4m3fn"
    if module.block_size is None:
        return "it has one scale for the whole weight, tilefuse one per 128 x 128 block"
    if tuple(module.block_size) != TILE:
        return f"its blocks are {' x '.join(map(str, module.block_size))}, tilefuse's 128 x 128"
    if module.activation_scheme != "dynamic":
        return f"its activation scales are {module.activation_scheme}, tilefuse computes them for each 1 x 128 block"
    *lead, n, k = weight.shape
    if tuple(scale.shape) != (*lead, blocks_of(n), blocks_of(k)):
        return f"its scales have the shape {[*scale.shape]}, not one per 128 x 128 block of {[*weight.shape]}"
    return ""


def _unfit_linear(module: Any) -> str:
    return _unfit(module, module.weight, module.weight_scale_inv)


def _scale(scale: Tensor) -> Tensor:
    """Float32 also where the model was moved to another dtype or holds UE8M0; parameters of FP8 modules are frozen."""
    return scale.detach().float()


def _activation(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales; a checkpoint with UE8M0 weight scales asks for the same format in activations."""
    return fp8_quantize(x, scale_format="pow2" if scale.dtype == torch.float8_e8m0fnu else "fp32")


class _Linear(torch.autograd.Function):
    """The input's gradient goes through the dequantised weight, as in the stock module, which adapters train over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return _linear(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return dout @ fp8_dequantize(weight, _scale(scale), block=TILE, out_dtype=dout.dtype), None, None, None


def _linear(x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None) -> Tensor:
    return fp8_matmul(*_activation(x, scale), weight, _scale(scale), bias, out_dtype=x.dtype)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """``FP8Linear.forward``."""
    if self.weight.dtype != CODES:
        # dequantised since it was patched
        return type(self).forward(self, input)
    rows = input.reshape(input.shape[:-1].numel(), input.shape[-1])
    bias = None if self.bias is None else self.bias.detach()
    scale = self.weight_scale_inv.detach()
    packed = packs.packed_weights(self, input)
    if packed is not None:
        out = _linear(rows, packed[0], packs.checked(self, scale), bias)
    else:
        linear = _Linear.apply if torch.is_grad_enabled() and input.requires_grad else _linear
        out = linear(rows, self.weight.detach(), scale, bias)
    return out.view(*input.shape[:-1], out.shape[-1])


def _unfit_experts(module: Any) -> str:
    if not module.has_gate or module.has_bias:
        return "experts without a gate or with biases"
    for weight, scale in (
        (module.gate_up_proj, module.gate_up_proj_scale_inv),
        (module.down_proj, module.down_proj_scale_inv),
    ):
        if why := _unfit(module, weight, scale):
            return why
        if scale.dtype == torch.float8_e8m0fnu:
            return "its scales are UE8M0, moe_experts_fp8 computes float32 ones for activations"
    if inspect.unwrap(type(module)._apply_gate).__module__ != _STOCK:
        return f"{type(module).__name__} has a gate of its own"
    if module.gate_softcap is not None or module.swiglu_alpha is not None:
        return "its gate is capped, or scaled by alpha"
    activation = activation_of(module.act_fn)
    if activation is None:
        return f"its activation is {type(module.act_fn).__name__}, moe_experts_fp8 has silu and gelu"
    if module.limit is not None and (activation != "silu" or not module.limit > 0):
        return f"its gate is clamped at {module.limit}, moe_experts_fp8 clamps silu, above 0"
    return ""


class _Grouped(torch.autograd.Function):
    """``_Linear`` for the rows of each expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, offsets)
        return fp8_grouped_matmul(*fp8_quantize(x), weight, scale, offsets, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, offsets = ctx.saved_tensors
        experts = max(1, _DEQUANTISED_BYTES // (weight[0].numel() * dout.element_size()))
        dx = dout.new_zeros(dout.shape[0], weight.shape[2])
        for start in range(0, weight.shape[0], experts):
            some = slice(start, start + experts)
            wide = fp8_dequantize(weight[some], scale[some], block=TILE, out_dtype=dout.dtype)
            # rows of other experts are zero
            dx += grouped_matmul(dout, wide.transpose(1, 2), offsets[start : start + experts + 1])
        return dx, None, None, None


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``FP8Experts.forward``, also as the registered experts function."""
    if _unfit_experts(self):
        # the loop over experts under the class's dispatch
        return inspect.unwrap(type(self).forward)(self, hidden_states, top_k_index, top_k_weights)
    options = {"activation": activation_of(self.act_fn), "limit": self.limit or 0.0}
    packed = packs.packed_weights(self, hidden_states, top_k_weights)
    if packed is None:
        up, down = self.gate_up_proj.detach(), self.down_proj.detach()
    else:
        (up, down), top_k_index = packed, packs.checked(self, top_k_index)
    up_scale, down_scale = _scale(self.gate_up_proj_scale_inv), _scale(self.down_proj_scale_inv)
    if not (torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)):
        return moe_experts_fp8(
            hidden_states,
            up,
            up_scale,
            down,
            down_scale,
            top_k_weights,
            top_k_index,
            **options,
        )
    order, inverse, offsets = moe_plan(top_k_index, up.shape[0])
    rows = hidden_states[order // top_k_index.shape[1]]
    rows = self._apply_gate(_Grouped.apply(rows, up, up_scale, offsets))
    return moe_combine(_Grouped.apply(rows, down, down_scale, offsets), inverse, top_k_weights)


_PARTS = {
    "FP8Linear": (_unfit_linear, linear_forward, "linear: fp8_quantize + fp8_matmul"),
    "FP8GroupedLinear": (lambda module: "block-diagonal FP8 linears stay on Hugging Face's kernel", None, ""),
    "FP8Experts": (_unfit_experts, experts_forward, "experts: moe_experts_fp8"),
}
