"""The expert layer with FP8 weights, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import op
from ...packing import PackedWeight, Weight, check_weight_scale, operand
from ..fp8.grouped_matmul import fp8_grouped_matmul_fwd
from ..fp8.quantize import CODES, fp8_quantize
from ..fp8.silu_mul_quantize import silu_mul_quantize
from .moe_combine import moe_combine_fwd
from .moe_experts import check_experts, forward
from .moe_plan import moe_plan_fwd

__all__ = ["moe_experts_fp8"]

_MODULE = "moe/moe_experts_fp8"
ACTIVATIONS = ("silu", "gelu", "gelu_erf")


def _check(x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, weights, ids, activation, limit) -> None:
    name = "moe_experts_fp8"
    if activation not in ACTIVATIONS:
        errors.value_error(name, "activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    check_experts(name, x, w_gate_up, w_down, weights, ids, activation, limit)
    if x.dtype == torch.float64:
        errors.type_error(name, "x", "float32 or bfloat16 or float16", x)
    for arg, weight, scale in (("w_gate_up", w_gate_up, w_gate_up_scale), ("w_down", w_down, w_down_scale)):
        if weight.dtype != CODES:
            errors.type_error(name, arg, "float8_e4m3fn", weight)
        check_weight_scale(name, f"{arg}_scale", scale, weight, x, "x")


@op(
    module=_MODULE,
    kernels=(
        "moe_plan_fwd",
        "fp8_quantize_rows",
        "fp8_grouped_matmul_fwd",
        "silu_mul_quantize_fwd",
        "moe_combine_fwd",
        "moe_experts_up",
        "grouped_matmul_fwd",
    ),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    not_repeated="calls several kernels",
)
def moe_experts_fp8(
    x: Tensor,
    w_gate_up: Weight,
    w_gate_up_scale: Tensor | None,
    w_down: Weight,
    w_down_scale: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "silu",
    limit: float = 0.0,
    quantize_activations: bool = True,
) -> Tensor:
    """``moe_experts`` with e4m3 weights and activations, block scaled.

    x is quantised once per token, 1 x 128, then its codes are gathered (a byte an element); the activation is computed
    in float32 and quantised 1 x 128; products accumulate as in ``fp8_grouped_matmul``.

    Args:
        x: ``[T, H]`` float32, bfloat16 or float16.
        w_gate_up: ``[E, 2 I, H]`` float8_e4m3fn, gate rows first, then up.
        w_gate_up_scale: ``[E, ceil(2 I / 128), ceil(H / 128)]`` float32, one grid over all 2 I rows (or
            ``[E, 2 I, ceil(H / 128)]``); dequantisation scales, as ``fp8_quantize`` makes them. None, here and below,
            takes a packed weight's own.
        w_down: ``[E, H, I]`` float8_e4m3fn, with ``w_down_scale [E, ceil(H / 128), ceil(I / 128)]``.
        weights: ``[T, k]`` float32 (or x's dtype).
        ids: ``[T, k]`` int32 or int64; an id outside ``[0, E)`` is dropped.
        activation: ``"silu"``, ``"gelu"`` (tanh form) or ``"gelu_erf"`` (exact).
        limit: of ``"silu"``, as in ``moe_experts``: clamps gate and up, 0 is off.
        quantize_activations: False leaves x and the activation in x's dtype (W8A16): the scaled weights then meet them
            as in ``moe_experts``, with 13 times less error. On a CPU that is the faster form too, for bfloat16; on a
            GPU and for other dtypes it is the reference's.

    Returns:
        ``[T, H]`` in x's dtype; pre-activation and expert rows have that dtype too.

    Inference only: raises if x, weights or a scale requires grad while grad mode is on. Deterministic and
    batch-invariant, on a GPU among calls of as many tokens (their number per expert chooses the tile). No host
    synchronisation.

    Raises:
        ValueError: a wrong shape or activation, a limit with gelu. TypeError: a wrong dtype. RuntimeError: see above.

    Example::

        w, w_scale = tilefuse.fp8_quantize(w_gate_up, block=(128, 128))
        out = tilefuse.moe_experts_fp8(x, w, w_scale, w_down, w_down_scale, weights, ids)

    Source: the block scales are those of DeepSeek-V3 (2412.19437), section 3.3.
    """
    if w_gate_up_scale is None and isinstance(w_gate_up, PackedWeight):
        w_gate_up_scale = w_gate_up.scale
    if w_down_scale is None and isinstance(w_down, PackedWeight):
        w_down_scale = w_down.scale
    _check(x, w_gate_up, w_gate_up_scale, w_down, w_down_scale, weights, ids, activation, limit)
    errors.check_not_differentiated("moe_experts_fp8", "it is for inference", x=x, weights=weights)
    top_k = ids.shape[1]
    w_gate_up, w_down, ids, weights = operand(w_gate_up), operand(w_down), ids.contiguous(), weights.contiguous()
    if not quantize_activations:
        x = errors.check_last_dim_contiguous(x)
        scales = (w_gate_up_scale, w_down_scale)
        return forward(x, w_gate_up, w_down, weights, ids, None, None, activation, 1.702, limit, False, scales)[0]
    order, inverse, offsets = moe_plan_fwd(ids, w_gate_up.shape[0])
    q, scale = fp8_quantize(x)
    token = order.long() // top_k
    # bytes: not every backend gathers FP8
    rows = q.view(torch.uint8)[token].view(CODES)
    z = fp8_grouped_matmul_fwd(rows, scale[token], w_gate_up, w_gate_up_scale, offsets, x.dtype)
    if limit > 0:
        gate, up = z.float().chunk(2, dim=-1)
        z = torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit)), dim=-1)
    if activation == "silu":
        h, h_scale = silu_mul_quantize(z)
    else:
        gate, up = z.float().chunk(2, dim=-1)
        form = "tanh" if activation == "gelu" else "none"
        h, h_scale = fp8_quantize(torch.nn.functional.gelu(gate, approximate=form) * up)
    y = fp8_grouped_matmul_fwd(h, h_scale, w_down, w_down_scale, offsets, x.dtype)
    return moe_combine_fwd(y, inverse, weights, top_k)
