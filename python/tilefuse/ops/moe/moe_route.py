"""Routing: which experts a token goes to, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, once_differentiable, op

__all__ = ["moe_route"]

_MODULE = "moe/moe_route"
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
GROUP_SCORES = ("max", "top2")
NAN_POLICIES = ("propagate", "zero")


def _check(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    nan_policy: str,
) -> None:
    name = "moe_route"
    if logits.dim() != 2 or logits.shape[1] == 0:
        errors.value_error(name, "logits", "[T, E] with E >= 1", logits)
    errors.check_dtype(name, "logits", logits, errors.FLOATS)
    experts = logits.shape[1]
    if bias is not None:
        if bias.shape != (experts,):
            errors.value_error(name, "bias", f"[{experts}] float32", bias)
        if bias.dtype != torch.float32 and not (bias.dtype == logits.dtype == torch.float64):
            errors.type_error(name, "bias", f"[{experts}] float32", bias)
        errors.check_device(name, "bias", bias, logits, "logits")
    if score not in SCORES:
        errors.value_error(name, "score", f"one of {', '.join(SCORES)}", score)
    if group_score not in GROUP_SCORES:
        errors.value_error(name, "group_score", f"one of {', '.join(GROUP_SCORES)}", group_score)
    if nan_policy not in NAN_POLICIES:
        errors.value_error(name, "nan_policy", f"one of {', '.join(NAN_POLICIES)}", nan_policy)
    if n_group < 1 or experts % n_group:
        errors.value_error(name, "n_group", f"a divisor of E = {experts}", n_group)
    if not 1 <= topk_group <= n_group:
        errors.value_error(name, "topk_group", f"between 1 and n_group = {n_group}", topk_group)
    eligible = topk_group * (experts // n_group)
    if not 1 <= top_k <= eligible:
        errors.value_error(name, "top_k", f"between 1 and the {eligible} experts of topk_group groups", top_k)


def _fwd_fake(logits, bias, top_k, score, renormalize, n_group, topk_group, group_score, scale, nan_policy):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int32)


def _bwd_fake(dweights, logits, ids, score, renormalize, scale, nan_policy):
    return logits.new_empty(logits.shape)


def _few_experts(most, position=0):
    def refuse(*args):
        return f"takes at most {most} experts" if args[position].shape[1] > most else None

    return refuse


moe_route_fwd = kernel(
    "moe_route_fwd(Tensor logits, Tensor? bias, int top_k, str score, bool renormalize, int n_group, int topk_group,"
    " str group_score, float scale, str nan_policy) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fwd_fake,
    backends=("reference", "cpu", "triton", "cuda"),
    when={"cuda": _few_experts(1024), "triton": _few_experts(4096)},
)
moe_route_bwd = kernel(
    "moe_route_bwd(Tensor dweights, Tensor logits, Tensor ids, str score, bool renormalize, float scale,"
    " str nan_policy) -> Tensor",
    module=_MODULE,
    fake=_bwd_fake,
    backends=("reference", "cpu", "triton", "cuda"),
    when={"cuda": _few_experts(1024, position=1)},
    dtype_arg=1,
)


@gradient_of(moe_route_fwd)
class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, top_k, score, renormalize, n_group, topk_group, group_score, scale, nan_policy):
        weights, ids = moe_route_fwd(
            logits, bias, top_k, score, renormalize, n_group, topk_group, group_score, scale, nan_policy
        )
        ctx.save_for_backward(logits, ids)
        ctx.options = (score, renormalize, scale, nan_policy)
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _):
        logits, ids = ctx.saved_tensors
        return moe_route_bwd(dweights.contiguous(), logits, ids, *ctx.options), *[None] * 9


@op(
    module=_MODULE,
    kernels=("moe_route_fwd", "moe_route_bwd"),
    differentiable=("logits",),
)
def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2",
    scale: float = 1.0,
    nan_policy: str = "propagate",
) -> tuple[Tensor, Tensor]:
    """Chooses ``top_k`` experts per token and their weights.

    Formula: ``s = score(logits)``; ``ids`` = the ``top_k`` largest of ``s + bias`` inside the best ``topk_group``
    groups; ``weights = s[ids]``, divided by ``sum(s[ids]) + 1e-20`` if ``renormalize``, times ``scale``.

    Args:
        logits: ``[T, E]`` float32, bfloat16, float16 (float64 on the reference backend), any ``E >= 1``.
            All arithmetic is float32.
        bias: ``[E]`` float32 or None. Steers the selection only, never the weights, and gets no gradient
            (the correction bias of auxiliary-loss-free balancing; see ``moe_update_bias``).
        top_k: experts per token, at most ``topk_group * E / n_group``.
        score: ``"softmax"`` over all E, ``"sigmoid"``, ``"sqrtsoftplus"`` (sqrt(log(1 + exp(x)))) or ``"none"``.
        renormalize: divide by the sum of the chosen scores. With softmax this equals a softmax over the chosen
            logits.
        n_group, topk_group: experts form ``n_group`` equal, consecutive groups, of which the ``topk_group`` best
            compete; the others are masked with -inf, never with 0.
        group_score: a group counts its ``"max"`` biased score or the sum of its ``"top2"``; a one-expert group
            counts its score.
        scale: multiplies the weights (DeepSeek's ``routed_scaling_factor``).
        nan_policy: ``"propagate"`` lets weights be NaN where their scores are; ``"zero"`` zeroes the weights and
            the gradient of such a row, for serving, where padding rows may hold anything.

    Returns:
        ``(weights, ids)``: ``[T, top_k]`` float32 and ``[T, top_k]`` int32, by biased score descending, ties (also
        of groups) by lower index. Ids are distinct and in range whatever the logits hold: NaN logits are set aside
        before the softmax reduction, and the order is finite > -inf > NaN. Without a bias, softmax scores that
        underflow to ties rank by logit.

    Gradients: for ``logits``, through the weights. Bitwise deterministic; a row does not depend on other rows.

    Covers Switch (top_k=1, renormalize=False), GShard, Mixtral and Qwen3 (softmax), gpt-oss (softmax, renormalize:
    a softmax over the chosen logits), DeepSeek-V2 (softmax, group_score="max"), DeepSeek-V3, Kimi K2 and GLM-4.5
    (sigmoid, bias, group_score="top2").

    Raises:
        ValueError: a wrong shape, an unknown option, ``n_group`` does not divide E, ``topk_group`` or ``top_k``
            out of range.
        TypeError: ``logits`` not floating point, ``bias`` not float32.

    Example::

        weights, ids = tilefuse.moe_route(logits, bias, top_k=8, score="sigmoid", n_group=8, topk_group=4, scale=2.5)

    Sources: Switch (Fedus et al. 2021), DeepSeek-V2 (2405.04434), DeepSeek-V3 (2412.19437), section 2.1.2.
    """
    _check(logits, bias, top_k, score, n_group, topk_group, group_score, nan_policy)
    logits = errors.check_last_dim_contiguous(logits)
    args = (top_k, score, renormalize, n_group, topk_group, group_score, float(scale), nan_policy)
    if bias is not None:
        bias = bias.detach().contiguous()
    if errors.needs_grad(logits):
        return _Route.apply(logits, bias, *args)
    return moe_route_fwd(logits, bias, *args)
