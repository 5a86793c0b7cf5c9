"""Routers: the scores of the experts, in one kernel. They keep returning ``(logits, weights, ids)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...ops.moe.moe_route import moe_route
from .swap import Left, Swap, same_code

Routed = tuple[Tensor, Tensor, Tensor]


def _softmax(self: Any, hidden_states: Tensor) -> Routed:
    """Mixtral: float32 weights that sum to one."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, ids = moe_route(logits, top_k=self.top_k)
    return logits, weights, ids.long()


def _softmax_in_dtype(self: Any, hidden_states: Tensor) -> Routed:
    """Qwen3-MoE: weights in the model's dtype."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, ids = moe_route(logits, top_k=self.top_k, renormalize=self.norm_topk_prob)
    return logits, weights.to(logits.dtype), ids.long()


def _softmax_of_chosen(self: Any, hidden_states: Tensor) -> Routed:
    """gpt-oss: a softmax over the chosen logits, which is what renormalising means."""
    logits = F.linear(hidden_states, self.weight, self.bias)
    weights, ids = moe_route(logits, top_k=self.top_k)
    return logits, weights.to(logits.dtype), ids.long()


def _deepseek_v2(self: Any, hidden_states: Tensor) -> Routed:
    logits = F.linear(hidden_states.view(-1, self.hidden_dim).float(), self.weight.float())
    groups = {}
    if self.topk_method == "group_limited_greedy":
        groups = {"n_group": self.num_group, "topk_group": self.topk_group, "group_score": "max"}
    weights, ids = moe_route(logits, top_k=self.top_k, renormalize=False, scale=self.routed_scaling_factor, **groups)
    return logits, weights, ids.long()


def _deepseek_v3(self: Any, hidden_states: Tensor) -> Routed:
    logits = F.linear(hidden_states.view(-1, self.hidden_dim).float(), self.weight.float())
    weights, ids = moe_route(
        logits,
        self.e_score_correction_bias.float(),
        top_k=self.top_k,
        score="sigmoid",
        renormalize=self.norm_topk_prob,
        n_group=self.num_group,
        topk_group=self.topk_group,
        scale=self.routed_scaling_factor,
    )
    return logits, weights, ids.long()


# model, class -> our forward. Other models' routers are known by having the very same code
_KNOWN: tuple[tuple[str, str, Callable[..., Routed]], ...] = (
    ("mixtral", "MixtralTopKRouter", _softmax),
    ("qwen3_moe", "Qwen3MoeTopKRouter", _softmax_in_dtype),
    ("gpt_oss", "GptOssTopKRouter", _softmax_of_chosen),
    ("deepseek_v2", "DeepseekV2TopkRouter", _deepseek_v2),
    ("deepseek_v3", "DeepseekV3TopkRouter", _deepseek_v3),
)


def swap(module: Any, config: Any) -> Swap | Left | None:
    """Routers whose class computes exactly what one of the known models' does."""
    if not type(module).__name__.lower().endswith("topkrouter"):
        return None
    forward = same_code(module, _KNOWN)
    if forward is None:
        return Left("its routing rule is of another form")
    experts, top_k = module.num_experts, module.top_k
    groups = getattr(module, "num_group", None) or 1
    if forward is _deepseek_v2:
        if module.topk_method not in ("greedy", "group_limited_greedy"):
            return Left(f"its routing method {module.topk_method!r} is unknown")
        if module.topk_method == "greedy":
            groups = 1
    chosen = (module.topk_group or 1) if groups > 1 else 1
    if experts % groups or not 1 <= top_k <= chosen * (experts // groups):
        return Left(f"it takes {top_k} experts of groups that do not hold as many")
    if forward is _deepseek_v3 and experts == groups:
        return Left("its groups hold one expert each")
    return Swap(forward, "router")
