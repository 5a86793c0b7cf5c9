"""Experts: Hugging Face's expert layers with stacked weights, through its registry or instance by instance."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    use_experts_implementation,
)

from ... import packs
from ...ops.moe.grouped_matmul import grouped_matmul
from ...ops.moe.moe_combine import moe_combine
from ...ops.moe.moe_experts import moe_experts
from ...ops.moe.moe_plan import moe_plan
from ...packing import Weight
from .swap import Left, Swap, hooked, same_code

NAME = "tilefuse"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    GELUActivation: "gelu_erf",
    GELUTanh: "gelu",
}


class _Gate(NamedTuple):
    """What an ``_apply_gate`` computes: attributes that hold its clamp and alpha, and its activation if not act_fn."""

    limit: str = ""
    alpha: str = ""
    activation: str = ""


# model, class -> its gate. Other models' gates are known by having the very same code
_GATES = (
    # float32 in between, as the op
    ("beam", "BeamExperts", _Gate()),
    ("deepseek_v4", "DeepseekV4Experts", _Gate("limit")),
    ("glm5_next", "Glm5NextTextExperts", _Gate("swiglu_limit", activation="silu")),
    ("minimax_m3_vl", "MiniMaxM3VLExperts", _Gate("swiglu_limit", "swiglu_alpha", "swiglu_oai")),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", _Gate("limit", "alpha", "swiglu_oai")),
)
# gate and up interleaved, which the packs are not
_INTERLEAVED_GATES = (("gpt_oss", "GptOssExperts", _Gate("limit", "alpha", "swiglu_oai")),)


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


@use_experts_implementation
class _Experts(nn.Module):
    def forward(self) -> None: ...


# the forward of every class that Hugging Face's registry serves
_DISPATCH = _Experts.forward.__code__


def activation_of(act_fn: Any) -> str | None:
    """What the ops call an activation of Hugging Face's, or None if they have none such."""
    if isinstance(act_fn, nn.Module):
        exact = type(act_fn) is nn.GELU and act_fn.approximate == "none"
        return None if hooked(act_fn) else _ACTIVATIONS.get(type(act_fn), "gelu_erf" if exact else None)
    return {F.silu: "silu", F.gelu: "gelu_erf"}.get(act_fn)


def fused_activation(module: Any) -> dict[str, Any] | None:
    """The options of the op for the activation of this module, or None if the fused kernel has none such."""
    return _options(module, False) if module.is_concatenated else None


def packed_activation(module: Any) -> dict[str, Any] | None:
    """The same where the weights are packed, with gate rows first."""
    return _options(module, not module.is_concatenated)


# its look-up reads other models' files, which no graph can
@torch.compiler.assume_constant_result
def _gate_of(cls: type, interleaved: bool) -> _Gate | None:
    return same_code(cls, _INTERLEAVED_GATES if interleaved else _GATES, "_apply_gate")


def _options(module: Any, interleaved: bool) -> dict[str, Any] | None:
    if not module.has_gate or module.has_post_expert_norm:
        return None
    activation = activation_of(module.act_fn) if hasattr(module, "act_fn") else None
    options: dict[str, Any] = {}
    if type(module)._apply_gate is not _default_apply_gate:
        gate = _gate_of(type(module), interleaved)
        if gate is None:
            return None
        activation = gate.activation or activation
        for option, attribute in (("limit", gate.limit), ("alpha", gate.alpha)):
            if attribute:
                options[option] = getattr(module, attribute)
        # to the op, 0 is no clamp
        clamps = not gate.limit or ((options["limit"] or 0) > 0 and activation in ("silu", "swiglu_oai"))
        if not clamps:
            return None
    return None if activation is None else {"activation": activation, **options}


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function of the registry: ``[T, H]``, ids and weights ``[T, k]`` to ``[T, H]``.

    An id of ``num_experts`` (another rank's expert) is dropped. An activation that the fused kernel does not know
    runs as the module computes it, between two grouped products; so do interleaved gate and up rows (gpt-oss), whose
    weights are only ever read as views, unless they are packed.
    """
    packed = packs.packed_weights(self, hidden_states, top_k_weights)
    if packed is not None:
        return _packed_experts(self, packed, hidden_states, packs.checked(self, top_k_index), top_k_weights)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    down = self.down_proj
    up_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return _experts(
        self, up, down, up_bias, down_bias, hidden_states, top_k_index, top_k_weights, fused_activation(self)
    )


def _packed_experts(self: Any, packed: tuple[Any, ...], hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    up, down, *biases = packed
    up_bias = down_bias = None
    if self.has_bias:
        up_bias = biases[0] if biases else self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        down_bias = self.down_proj_bias
    return _experts(self, up, down, up_bias, down_bias, hidden_states, ids, weights, packed_activation(self))


def _experts(
    self: Any,
    up: Weight,
    down: Weight,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    options: dict[str, Any] | None,
) -> Tensor:
    x = hidden_states.to(up.dtype)
    if top_k_weights.dtype not in (torch.float32, x.dtype):
        top_k_weights = top_k_weights.float()
    if options is not None:
        out = moe_experts(x, up, down, top_k_weights, top_k_index, up_bias, down_bias, **options)
        return out.to(hidden_states.dtype)
    order, inverse, offsets = moe_plan(top_k_index, up.shape[0])
    rows = grouped_matmul(x, up, offsets, order // top_k_index.shape[1], up_bias)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = grouped_matmul(rows, down, offsets, None, down_bias)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return moe_combine(rows, inverse, top_k_weights).to(hidden_states.dtype)


def forward(self: Any, *args: Any, implementation: str | None, **kwargs: Any) -> Tensor:
    """``experts``, unless another implementation than the one from before ``patch`` was chosen since."""
    if self.config._experts_implementation != implementation:
        packs.unpack(self)
        return type(self).forward(self, *args, **kwargs)
    return experts(self, *args, **kwargs)


def swap(module: Any, config: Any) -> Swap | Left | None:
    """Modules of classes that Hugging Face marks with ``use_experts_implementation``."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj")):
        return None
    if getattr(type(module).forward, "__code__", None) is not _DISPATCH:
        return Left(f"{type(module).__name__} has a forward of its own")
    weights = [module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj]
    if not all(isinstance(w, Tensor) and w.dim() == 3 for w in weights):
        return Left("its weights are not stacked")
    if any(w.dtype not in _FLOATS for w in weights):
        return None
    if any(type(w) not in (Tensor, nn.Parameter) for w in weights):
        return Left("its weights are sharded tensors")
    fused = fused_activation(module)
    what = "experts" if fused else "experts (activation as in the model)"
    options = {"implementation": module.config._experts_implementation}
    return Swap(forward, what, options=options, sources=_sources(module))


def _sources(module: Any) -> tuple[packs.Source, ...]:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    interleaved = not module.is_concatenated and packed_activation(module) is not None
    weights = (
        packs.Source(name, module.is_transposed, interleaved),
        packs.Source("down_proj", module.is_transposed),
    )
    bias = packs.Source(f"{name}_bias", interleaved=True)
    return (*weights, bias) if interleaved and module.has_bias else weights
