"""``silu_mul_quantize``: the activation of a gated MLP, quantised for the next matmul."""

from __future__ import annotations

from torch import Tensor

from ... import errors
from ...library import kernel, op
from .quantize import CODES, as_rows, blocks_of, check_input, check_scale_options, empty_row_scale, split_rows

__all__ = ["silu_mul_quantize"]

_MODULE = "fp8/silu_mul_quantize"


def _fake(gate_up: Tensor, _pow2: bool, _eps: float) -> tuple[Tensor, Tensor]:
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty((m, k), dtype=CODES), empty_row_scale(gate_up, m, blocks_of(k))


silu_mul_quantize_fwd = kernel(
    "silu_mul_quantize_fwd(Tensor gate_up, bool pow2, float eps) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake,
    backends=("reference", "cpu", "triton", "cuda"),
)


@op(
    module=_MODULE,
    kernels=("silu_mul_quantize_fwd",),
    not_repeated="views of its arguments and results",
)
def silu_mul_quantize(gate_up: Tensor, *, scale_format: str = "fp32", eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """``fp8_quantize(silu(gate) * up)`` with the product kept in float32: one read, one write, one rounding.

    ``silu(g) = g / (1 + exp(-g))`` in float32. The exponential is a fixed sequence of correctly rounded operations
    (relative error below 3e-7), so all backends give the same bits.

    Args:
        gate_up: ``[..., 2I]``: gate is the first half of the last dim, up the second (``gate_up_proj``'s output);
            float32, bfloat16 or float16 (float64 on the reference backend). Any strides; a copy is made if the
            last dim is not contiguous.
        scale_format, eps: as in ``fp8_quantize``.

    Returns:
        ``(q, scale)``: q float8_e4m3fn ``[..., I]``, scale float32 ``[..., ceil(I / 128)]`` in the layout of
        ``fp8_quantize``'s (1, 128) scales.

    Not differentiable: a gradient of codes would be e4m3 too. ``silu_mul_fp8_linear`` is, straight through the codes.
    Deterministic and batch-invariant. A gate of -inf gives NaN, as ``torch.nn.functional.silu``.

    Raises:
        ValueError: an odd last dim, or a wrong scale_format or eps.
        TypeError: gate_up is not a float tensor.
        RuntimeError: gate_up requires grad and grad mode is on.

    Source: the fused activation of SGLang and vLLM (``silu_and_mul`` with per-token-group quantisation).
    """
    check_scale_options("silu_mul_quantize", scale_format, eps)
    check_input("silu_mul_quantize", "gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        errors.value_error("silu_mul_quantize", "gate_up", "[..., 2I], an even last dim", gate_up)
    q, scale = silu_mul_quantize_fwd(as_rows(gate_up), scale_format == "pow2", eps)
    lead = gate_up.shape[:-1]
    return q.view(*lead, q.shape[1]), split_rows(scale, lead)
