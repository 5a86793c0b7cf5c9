"""RMSNorm and the activation of gated MLPs: a pass over memory each, where Hugging Face's take several."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import backend
from ...ops.norm.gated_activation import ACTIVATIONS, gated_activation
from ...ops.norm.rms_norm import rms_norm
from .swap import Left, Swap, hooked, same_code

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Norm(NamedTuple):
    """How a class of Hugging Face's norms: ``eps`` is the attribute that holds it."""

    rounding: str = "once"
    weight_offset: float = 0.0
    eps: str = "variance_epsilon"


# model, class -> its norm. Other models' norms are known by having the very same code
_NORMS = (
    ("llama", "LlamaRMSNorm", _Norm("llama")),
    ("mamba", "MambaRMSNorm", _Norm("llama")),
    ("llama4", "Llama4TextRMSNorm", _Norm("llama", eps="eps")),
    ("gpt_oss", "GptOssRMSNorm", _Norm()),
    ("deepseek_v4", "DeepseekV4RMSNorm", _Norm()),
    ("nemotron_h", "NemotronHRMSNorm", _Norm()),
    ("helium", "HeliumRMSNorm", _Norm()),
    ("gemma", "GemmaRMSNorm", _Norm(weight_offset=1.0, eps="eps")),
    ("gemma4", "Gemma4RMSNorm", _Norm(eps="eps")),
    ("moshi", "MoshiRMSNorm", _Norm(eps="eps")),
    ("nanochat", "NanoChatRMSNorm", _Norm(eps="eps")),
)
# of those that norm in a method of their own
_METHODS = tuple(
    (model, name, True)
    for model, name in (
        ("gemma", "GemmaRMSNorm"),
        ("gemma4", "Gemma4RMSNorm"),
        ("llama4", "Llama4TextRMSNorm"),
        ("moshi", "MoshiRMSNorm"),
        ("nanochat", "NanoChatRMSNorm"),
    )
)


def norm_forward(self: Any, x: Tensor, *, rounding: str, weight_offset: float, eps: str) -> Tensor:
    """A norm's forward."""
    weight = getattr(self, "weight", None) if getattr(self, "with_scale", True) else None
    if (
        x.dtype not in _DTYPES
        or x.device.type not in ("cpu", "cuda")
        # their product has the wider dtype
        or (rounding == "llama" and weight is not None and weight.dtype != x.dtype)
    ):
        return type(self).forward(self, x)
    return rms_norm(x, weight, eps=getattr(self, eps), weight_offset=weight_offset, rounding=rounding)


# model, class -> attribute of its activation, and whether one layer gives gate and up
_MLPS = (
    ("llama", "LlamaMLP", ("act_fn", False)),
    ("qwen2_5_vl", "Qwen2_5_VLMLP", ("act_fn", False)),
    ("idefics2", "Idefics2MLP", ("act_fn", False)),
    ("llama4", "Llama4TextMLP", ("activation_fn", False)),
    ("phi3", "Phi3MLP", ("activation_fn", True)),
)


def mlp_forward(self: Any, x: Tensor, *, activation: str, act: str, joined: bool) -> Tensor:
    """A gated MLP's forward. Its layers are called, whatever they have become."""
    gate, up = (self.gate_up_proj(x), None) if joined else (self.gate_proj(x), self.up_proj(x))
    if (
        gate.dtype in _DTYPES
        and gate.device.type in ("cpu", "cuda")
        and (up is None or (up.dtype == gate.dtype and up.shape == gate.shape))
        and not hooked(getattr(self, act))
    ):
        return self.down_proj(gated_activation(gate, up, activation=activation))
    if up is None:
        gate, up = gate.chunk(2, -1)
    return self.down_proj(getattr(self, act)(gate) * up)


def activation_of(act: Any) -> str | None:
    """What the op calls an activation, found by running both on a few numbers, or None if it has none such."""
    if not isinstance(act, nn.Module) or hooked(act) or next(act.parameters(), None) is not None:
        return None
    x = torch.linspace(-12, 12, 481, dtype=torch.float32, device="cpu")[None]
    with torch.no_grad(), torch.device("cpu"), backend("reference"):
        try:
            expected = act(x)
            return next(
                name
                for name in ACTIVATIONS[:4]
                if _close(gated_activation(x, torch.ones_like(x), activation=name), expected)
            )
        except Exception:
            # of no such form, or not of these arguments
            return None


def _close(out: Tensor, expected: Tensor) -> bool:
    return out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-6, atol=1e-6)


def swap(module: Any, config: Any) -> Swap | Left | None:
    name = type(module).__name__
    if "RMSNorm" in name:
        norm = same_code(module, _NORMS)
        if norm is None or (hasattr(module, "_norm") and same_code(module, _METHODS, "_norm") is None):
            return Left("its norm is of another form")
        return Swap(norm_forward, "norm", options=norm._asdict())
    if not name.lower().endswith("mlp") or not hasattr(module, "down_proj"):
        return None
    form = same_code(module, _MLPS)
    if form is None:
        return Left("its MLP is of another form")
    act, joined = form
    activation = activation_of(getattr(module, act))
    if activation is None:
        return Left(f"its activation is {type(getattr(module, act)).__name__}")
    return Swap(mlp_forward, "gated MLP", options={"activation": activation, "act": act, "joined": joined})
