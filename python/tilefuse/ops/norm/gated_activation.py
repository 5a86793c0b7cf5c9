"""``gated_activation``: what a gated MLP does between its two matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op
from ..fp8.quantize import as_rows
from .rms_norm import check_like, check_rows

__all__ = ["gated_activation"]

_MODULE = "norm/gated_activation"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")
_CLAMPED = ("silu", "swiglu_oai")
_LAYOUTS = ("split", "interleaved")


def _check(gate: Tensor, up: Tensor | None, activation: str, limit: float, layout: str) -> None:
    name = "gated_activation"
    check_rows(name, "gate", gate)
    if up is not None:
        check_like(name, "up", up, gate, "gate")
    elif gate.shape[-1] % 2:
        errors.value_error(name, "gate", "[..., 2I], an even last dim, without up", gate)
    if activation not in ACTIVATIONS:
        errors.value_error(name, "activation", " or ".join(map(repr, ACTIVATIONS)), activation)
    if not limit >= 0.0:
        errors.value_error(name, "limit", "at least 0", limit)
    if limit > 0.0 and activation not in _CLAMPED:
        errors.value_error(name, "limit", f"0 with {activation!r}", limit)
    if layout not in _LAYOUTS:
        errors.value_error(name, "layout", "'split' or 'interleaved'", layout)
    if up is not None and layout != "split":
        errors.value_error(name, "layout", "'split' where up is given", layout)


def width_of(gate: Tensor, up: Tensor | None) -> int:
    return gate.shape[1] if up is not None else gate.shape[1] // 2


def _fake_fwd(gate: Tensor, up: Tensor | None, *_: object) -> Tensor:
    return gate.new_empty((gate.shape[0], width_of(gate, up)))


def _fake_bwd(_dout: Tensor, gate: Tensor, up: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)


_OPTIONS = "str activation, float alpha, float limit, bool interleaved"
gated_activation_fwd = kernel(
    f"gated_activation_fwd(Tensor gate, Tensor? up, {_OPTIONS}) -> Tensor", module=_MODULE, fake=_fake_fwd
)
gated_activation_bwd = kernel(
    f"gated_activation_bwd(Tensor dout, Tensor gate, Tensor? up, {_OPTIONS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_bwd,
)


@gradient_of(gated_activation_fwd)
class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, *options):
        ctx.save_for_backward(gate, up)
        ctx.options = options
        return gated_activation_fwd(gate, up, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        dgate, dup = gated_activation_bwd(errors.check_last_dim_contiguous(dout), gate, up, *ctx.options)
        return dgate, None if up is None else dup, *(None,) * len(ctx.options)


@op(
    module=_MODULE,
    kernels=("gated_activation_fwd", "gated_activation_bwd"),
    differentiable=("gate", "up"),
    not_repeated="views of its arguments and results",
)
def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 0.0,
    layout: str = "split",
) -> Tensor:
    """The activation of a gated MLP: ``act(gate) * up`` in float32, rounded once.

    ======================  =======================================================================================
    ``"silu"``              ``gate * sigmoid(gate) * up`` (SwiGLU)
    ``"gelu"``              ``gate * 0.5 (1 + erf(gate / sqrt(2))) * up`` (GeGLU). ``moe_experts`` means
                            ``gelu_tanh`` by this name.
    ``"gelu_tanh"``         ``gate * 0.5 (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) * up`` (Gemma)
    ``"relu2"``             ``relu(gate)^2 * up``
    ``"swiglu_oai"``        ``gate * sigmoid(alpha * gate) * (up + 1)`` (gpt-oss)
    ======================  =======================================================================================

    Args:
        gate: ``[..., I]``, or ``[..., 2I]`` that holds both where ``up`` is None; float32, bfloat16 or float16
            (float64 on the reference backend). Any strides; a copy is made if the last dim is not contiguous.
        up: gate's shape and dtype, or None.
        activation: one of the above.
        alpha: of ``"swiglu_oai"`` alone.
        limit: above 0, gate is clamped from above and up on both sides at it first (``"silu"``, ``"swiglu_oai"``).
        layout: of a gate that holds both: ``"split"``, gate is the first half of the last dim; ``"interleaved"``, gate
            and up take turns (gpt-oss).

    Returns:
        ``[..., I]``, contiguous, in gate's dtype.

    Gradients: for gate and up, once; saved are these alone, and a joined gate gets one joined gradient. At a clamp's
    boundary the gradient passes, as with ``torch.clamp``. Deterministic and batch-invariant. NaN stays in its element;
    a gate of -inf gives NaN, as ``torch.nn.functional.silu``.

    Raises:
        ValueError: an odd last dim without up, an up of another shape, an unknown activation or layout, a limit below 0
            or with an activation that has none, ``layout="interleaved"`` with up.
        TypeError: wrong dtypes.

    Example::

        hidden = tilefuse.gated_activation(torch.randn(4, 2 * 96))

    Source: Shazeer, GLU variants (arXiv 2002.05202); So et al., Primer (arXiv 2109.08668); gpt-oss.
    """
    _check(gate, up, activation, limit, layout)
    args = (as_rows(gate), None if up is None else as_rows(up), activation, alpha, limit, layout == "interleaved")
    out = _GatedActivation.apply(*args) if errors.needs_grad(gate, up) else gated_activation_fwd(*args)
    return out.view(*gate.shape[:-1], out.shape[1])
