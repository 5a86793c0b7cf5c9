"""``rms_norm_gated``: RMSNorm and a silu gate, of state-space and linear-attention layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from ..fp8.quantize import as_rows
from .rms_norm import as_weight, check_like, check_norm, check_rows, new_rstd, no_gradient

__all__ = ["rms_norm_gated"]

_MODULE = "norm/rms_norm_gated"


def _fake_fwd(x: Tensor, _gate: Tensor, _weight: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), new_rstd(x)


def _fake_bwd(
    _dout: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    _rstd: Tensor,
    _norm_first: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if with_dweight and weight is not None else no_gradient(weight, x)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


rms_norm_gated_fwd = kernel(
    "rms_norm_gated_fwd(Tensor x, Tensor gate, Tensor? weight, float eps, bool norm_first) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_fwd,
)
rms_norm_gated_bwd = kernel(
    "rms_norm_gated_bwd(Tensor dout, Tensor x, Tensor gate, Tensor? weight, Tensor rstd, bool norm_first, "
    "bool with_dweight) -> (Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_bwd,
)


@gradient_of(rms_norm_gated_fwd)
class _RMSNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, norm_first):
        y, rstd = rms_norm_gated_fwd(x, gate, weight, eps, norm_first)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.norm_first = norm_first
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        needed = ctx.needs_input_grad[2]
        dout = errors.check_last_dim_contiguous(dout)
        dx, dgate, dweight = rms_norm_gated_bwd(dout, *ctx.saved_tensors, ctx.norm_first, needed)
        return dx, dgate, dweight if needed else None, None, None


@op(
    module=_MODULE,
    kernels=("rms_norm_gated_fwd", "rms_norm_gated_bwd"),
    differentiable=("x", "gate", "weight"),
    not_repeated="views of its arguments and results",
)
def rms_norm_gated(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, norm_first: bool = True
) -> Tensor:
    """RMSNorm with a silu gate: ``norm(x) * weight * silu(gate)``, or ``norm(x * silu(gate)) * weight``.

    ``norm(v) = v / sqrt(mean(v^2) + eps)`` over the last dim; all in float32, with one rounding at the end.

    Args:
        x: ``[..., D]``, any rank and any D >= 1; float32, bfloat16 or float16 (float64 on the reference backend). Any
            strides; a copy is made if the last dim is not contiguous. Norms of groups (Mamba 2): ``[..., groups, D]``.
        gate: x's shape and dtype.
        weight: ``[D]`` of any float dtype, or None.
        eps: added to the mean square; positive, rounded to float32.
        norm_first: the gate comes after the norm (Gated DeltaNet, Qwen3-Next), or before it (False: Mamba 2).

    Returns:
        ``[..., D]``, contiguous, in x's dtype.

    A row whose squares overflow float32 is scaled first. NaN or infinity in a row makes NaN in that row only.

    Gradients: for x, gate and weight, once. Saved are the arguments and a float32 per row. The weight's gradient, in
    its dtype, is summed as that of ``rms_norm``. Deterministic; batch-invariant but for that sum.

    Raises:
        ValueError: no dim or an empty last one, a gate of another shape, a weight that is not ``[D]``, an eps that is
            not positive.
        TypeError: wrong dtypes.

    Example::

        y = tilefuse.rms_norm_gated(torch.randn(4, 128), torch.randn(4, 128), torch.ones(128))

    Source: Dao and Gu, Mamba 2 (arXiv 2405.21060); Yang et al., Gated DeltaNet (arXiv 2412.06464).
    """
    name = "rms_norm_gated"
    check_rows(name, "x", x)
    check_like(name, "gate", gate, x, "x")
    check_norm(name, x, weight, eps)
    args = as_rows(x), as_rows(gate), as_weight(weight, x), eps, norm_first
    y, _ = _RMSNormGated.apply(*args) if errors.needs_grad(x, gate, weight) else rms_norm_gated_fwd(*args)
    return y.view(x.shape)
