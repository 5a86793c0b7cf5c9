"""Auxiliary losses of the router, and the bias update that replaces them."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors, library
from ...library import gradient_of, kernel, once_differentiable, op
from ...reference.moe import moe_losses as reference
from .moe_route import SCORES

__all__ = ["moe_balance_loss", "moe_update_bias", "moe_z_loss"]

_MODULE = "moe/moe_losses"
KINDS = ("switch", "gshard", "sequence", "device", "communication")
NORMALIZATIONS = ("none", "topk")


def _check_logits(name: str, logits: Tensor, valid: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        errors.value_error(name, "logits", "[T, E] with E >= 1", logits)
    errors.check_dtype(name, "logits", logits, errors.FLOATS)
    if valid is not None:
        if valid.shape != logits.shape[:1]:
            errors.value_error(name, "valid", f"[{logits.shape[0]}] bool", valid)
        if valid.dtype != torch.bool:
            errors.type_error(name, "valid", f"[{logits.shape[0]}] bool", valid)
        errors.check_device(name, "valid", valid, logits, "logits")


def _check_balance(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    kind: str,
    score: str,
    normalization: str,
    n_devices: int,
    sequence_length: int,
) -> None:
    name = "moe_balance_loss"
    _check_logits(name, logits, valid)
    tokens, experts = logits.shape
    if ids.dim() != 2 or ids.shape[0] != tokens or ids.shape[1] == 0:
        errors.value_error(name, "ids", f"[{tokens}, k] int32 or int64 with k >= 1", ids)
    errors.check_dtype(name, "ids", ids, errors.INDEX_DTYPES)
    errors.check_device(name, "ids", ids, logits, "logits")
    if kind not in KINDS:
        errors.value_error(name, "kind", f"one of {', '.join(KINDS)}", kind)
    if score not in SCORES:
        errors.value_error(name, "score", f"one of {', '.join(SCORES)}", score)
    if normalization not in NORMALIZATIONS:
        errors.value_error(name, "normalization", f"one of {', '.join(NORMALIZATIONS)}", normalization)
    if n_devices < 1 or experts % n_devices:
        errors.value_error(name, "n_devices", f"a divisor of E = {experts}", n_devices)
    if sequence_length < 0 or (sequence_length and tokens % sequence_length):
        errors.value_error(name, "sequence_length", f"0 or a divisor of T = {tokens}", sequence_length)


def _contiguous(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous()


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _balance_fake(logits, ids, valid, kind, score, n_devices, sequences, scale):
    dtype = _loss_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty((sequences, logits.shape[1]), dtype=dtype)


def _z_fake(logits, valid):
    dtype = _loss_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0],), dtype=dtype)


def _like_logits(dout, logits, *_):
    return logits.new_empty(logits.shape)


moe_balance_loss_fwd = kernel(
    "moe_balance_loss_fwd(Tensor logits, Tensor ids, Tensor? valid, str kind, str score, int n_devices, int sequences,"
    " float scale) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_balance_fake,
    backends=("reference", "cpu"),
)
moe_balance_loss_bwd = kernel(
    "moe_balance_loss_bwd(Tensor dout, Tensor logits, Tensor shares, Tensor? valid, str score, bool normalized)"
    " -> Tensor",
    module=_MODULE,
    fake=_like_logits,
    backends=("reference", "cpu"),
    dtype_arg=1,
)
moe_z_loss_fwd = kernel(
    "moe_z_loss_fwd(Tensor logits, Tensor? valid) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_z_fake,
    backends=("reference", "cpu"),
)
moe_z_loss_bwd = kernel(
    "moe_z_loss_bwd(Tensor dout, Tensor logits, Tensor lse, Tensor? valid) -> Tensor",
    module=_MODULE,
    fake=_like_logits,
    backends=("reference", "cpu"),
    dtype_arg=1,
)


@gradient_of(moe_balance_loss_fwd)
class _BalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, valid, kind, score, n_devices, sequences, scale):
        loss, shares = moe_balance_loss_fwd(logits, ids, valid, kind, score, n_devices, sequences, scale)
        ctx.save_for_backward(logits, shares, valid)
        ctx.score, ctx.normalized = score, kind == "sequence"
        ctx.mark_non_differentiable(shares)
        return loss, shares

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        logits, shares, valid = ctx.saved_tensors
        return moe_balance_loss_bwd(dout, logits, shares, valid, ctx.score, ctx.normalized), *[None] * 7


@gradient_of(moe_z_loss_fwd)
class _ZLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, valid):
        loss, lse = moe_z_loss_fwd(logits, valid)
        ctx.save_for_backward(logits, lse, valid)
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        logits, lse, valid = ctx.saved_tensors
        return moe_z_loss_bwd(dout, logits, lse, valid), None


@op(
    module=_MODULE,
    kernels=("moe_balance_loss_fwd", "moe_balance_loss_bwd"),
    differentiable=("logits",),
)
def moe_balance_loss(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None = None,
    *,
    kind: str = "switch",
    score: str = "softmax",
    normalization: str = "none",
    n_devices: int = 1,
    sequence_length: int = 0,
) -> Tensor:
    """Load-balancing loss, without its coefficient.

    With ``f_i = E / (k T) * (slots that chose expert i)`` and ``P_i`` = mean score of expert i over the T valid tokens:

    * ``"switch"``: ``sum_i f_i P_i``, 1 at perfect balance with softmax scores.
    * ``"gshard"``: the same with first choices only, ``f_i = E / T * (tokens whose first choice is i)``.
    * ``"sequence"``: the switch loss of each run of ``sequence_length`` tokens (0: all of them are one), with scores
      divided by their sum per token, averaged over the sequences that have a valid token (DeepSeek-V3). A token whose
      scores sum to 0 counts as a token, with scores and gradients of 0.
    * ``"device"``: experts form ``n_devices`` equal, consecutive groups;
      ``sum_d mean_{i in d}(f_i) sum_{i in d} P_i``.
    * ``"communication"``: ``sum_d f''_d sum_{i in d} P_i`` with
      ``f''_d = D / (M T) * (tokens with a choice on device d)`` and ``M = min(k, D)``, the most devices that a token
      reaches.

    Args:
        logits: ``[T, E]`` float32, bfloat16, float16 or float64.
        ids: ``[T, k]`` int32 or int64; dropped ids count nowhere.
        valid: ``[T]`` bool, False = padding: such a row never matters, even if it holds NaN.
        score: how logits become scores, as in ``moe_route`` (over all E).
        normalization: ``"none"``, or ``"topk"``, which multiplies by k (the value Hugging Face reports).

    Returns:
        A float32 scalar (float64 for float64 logits); 0 without valid tokens.

    Gradients: for ``logits``, through P; 0 where a score of sqrtsoftplus underflows to 0. Deterministic, whatever the
    number of threads. Under ``torch.func`` and forward mode the loss is PyTorch operations and has every derivative;
    otherwise it is differentiable once.

    Raises:
        ValueError: a wrong shape, an unknown option, a number that does not divide. TypeError: a wrong dtype.

    Sources: Switch (2101.03961) eq. 4; GShard (2006.16668); DeepSeek-V2 (2405.04434) section 2.1.4; DeepSeek-V3
    (2412.19437) eq. 17-20.
    """
    _check_balance(logits, ids, valid, kind, score, normalization, n_devices, sequence_length)
    tokens = logits.shape[0]
    if not tokens:
        return logits.to(_loss_dtype(logits)).sum()
    sequences = tokens // sequence_length if kind == "sequence" and sequence_length else 1
    scale = float(ids.shape[1]) if normalization == "topk" else 1.0
    options = (kind, score, n_devices, sequences, scale)
    if library.takes_operations(logits):
        return reference.moe_balance_loss_fwd(logits, ids, valid, *options)[0]
    args = (errors.check_last_dim_contiguous(logits), ids.contiguous(), _contiguous(valid), *options)
    return (_BalanceLoss.apply(*args) if errors.needs_grad(logits) else moe_balance_loss_fwd(*args))[0]


@op(
    module=_MODULE,
    kernels=("moe_z_loss_fwd", "moe_z_loss_bwd"),
    differentiable=("logits",),
)
def moe_z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Keeps router logits small: ``mean_t logsumexp(logits[t])^2`` over the valid tokens, without its coefficient.

    Args:
        logits: ``[T, E]``, any float dtype; computed in float32.
        valid: ``[T]`` bool, False = padding that never matters.

    Returns:
        A float32 scalar (float64 for float64 logits); 0 without valid tokens.

    Gradients: for ``logits``, of the orders that ``moe_balance_loss`` has. Deterministic, for any number of threads.

    Raises:
        ValueError: a wrong shape. TypeError: a wrong dtype.

    Source: ST-MoE (2202.08906) eq. 5.
    """
    _check_logits("moe_z_loss", logits, valid)
    if library.takes_operations(logits):
        return reference.moe_z_loss_fwd(logits, valid)[0]
    args = (errors.check_last_dim_contiguous(logits), _contiguous(valid))
    return (_ZLoss.apply(*args) if errors.needs_grad(logits) else moe_z_loss_fwd(*args))[0]


@op(module=_MODULE, kernels=())
def moe_update_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """The step of auxiliary-loss-free balancing: ``bias + rate * sign(mean(counts) - counts)``, with sign(0) = 0.

    Once per optimiser step, with ``counts`` summed over everything that shares the router (all ranks).

    Args:
        bias: ``[E]`` float32, the selection bias of ``moe_route``.
        counts: ``[E]`` slots per expert, integer or float. Leave padding out of them.
        rate: step size; DeepSeek-V3 takes 1e-3.

    Returns:
        The new bias ``[E]`` float32. Not differentiable. Deterministic.

    Raises:
        ValueError: a wrong shape. TypeError: a wrong dtype. RuntimeError: bias requires grad in grad mode.

    Source: Wang et al., Auxiliary-Loss-Free Load Balancing (2408.15664); DeepSeek-V3 (2412.19437) section 2.1.2.
    """
    if bias.dim() != 1 or bias.dtype != torch.float32 or counts.shape != bias.shape or counts.device != bias.device:
        _check_update(bias, counts)
    dtype = counts.dtype
    if dtype.is_floating_point:
        counts = counts.double()
    elif dtype == torch.bool or dtype.is_complex:
        _check_update(bias, counts)
    if torch.is_grad_enabled() and (bias.requires_grad or counts.requires_grad):
        errors.check_not_differentiated("moe_update_bias", "it has no gradient", bias=bias, counts=counts)
    # in float64, and without a division, so that an expert exactly at the mean stays
    below = torch.sub(counts.sum(dtype=torch.float64), counts, alpha=bias.shape[0])
    return torch.add(bias, below.sign_().float(), alpha=rate)


def _check_update(bias: Tensor, counts: Tensor) -> None:
    name = "moe_update_bias"
    if bias.dim() != 1:
        errors.value_error(name, "bias", "[E] float32", bias)
    if bias.dtype != torch.float32:
        errors.type_error(name, "bias", "[E] float32", bias)
    if counts.shape != bias.shape:
        errors.value_error(name, "counts", f"{[*bias.shape]}", counts)
    if counts.dtype == torch.bool or counts.dtype.is_complex:
        errors.type_error(name, "counts", "integer or float", counts)
    errors.check_device(name, "counts", counts, bias, "bias")
