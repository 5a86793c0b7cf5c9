"""Losses over pairs of answers, and the log-probability of a whole answer: a few PyTorch operations each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import errors
from ...library import op
from .checks import check_cu_seqlens, check_like, places

__all__ = ["preference_loss", "sequence_logp"]

_MODULE = "loss/preference_loss"
KINDS = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "simpo", "orpo")


def _check_preference(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    kind: str,
    beta: float,
    label_smoothing: float,
) -> None:
    name = "preference_loss"
    errors.check_dtype(name, "chosen", chosen, errors.FLOATS)
    check_like(name, "rejected", rejected, chosen, "chosen")
    for arg, value, other_arg, other in (
        ("ref_chosen", ref_chosen, "ref_rejected", ref_rejected),
        ("ref_rejected", ref_rejected, "ref_chosen", ref_chosen),
    ):
        if value is not None:
            check_like(name, arg, value, chosen, "chosen")
        elif other is not None:
            errors.value_error(name, arg, f"given with {other_arg}", value)
    if kind not in KINDS:
        errors.value_error(name, "kind", f"one of {', '.join(KINDS)}", kind)
    if kind == "ipo" and not beta > 0:
        errors.value_error(name, "beta", "above 0 for 'ipo'", beta)
    if not 0 <= label_smoothing < 0.5:
        errors.value_error(name, "label_smoothing", "in [0, 0.5)", label_smoothing)
    errors.check_not_differentiated(name, "references are data", ref_chosen=ref_chosen, ref_rejected=ref_rejected)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)), also of a logp that rounds to 0, where p / (1 - p) has no gradient."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(logp))


@op(module=_MODULE, kernels=(), differentiable=("chosen", "rejected"))
def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair of a chosen and a rejected answer: DPO and its relatives.

    With ``c = chosen - ref_chosen``, ``r = rejected - ref_rejected`` (without references 0 is subtracted),
    ``z = beta * (c - r) - margin``, ``s`` the logistic function and ``e = label_smoothing``:

    * ``"sigmoid"`` (DPO): ``-(1 - e) log s(z) - e log s(-z)``
    * ``"robust"``: ``(-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e)``
    * ``"hinge"`` (SLiC): ``max(0, 1 - z)``
    * ``"ipo"``: ``(c - r - 1 / (2 beta))^2``, of averages per token
    * ``"apo_zero"``: ``1 - s(beta c) + s(beta r)``
    * ``"apo_down"``: ``s(beta c) + 1 - s(beta (c - r))``
    * ``"simpo"``: that of ``sigmoid`` without references, of averages per token
    * ``"orpo"``: ``-beta log s(log odds(chosen) - log odds(rejected))`` of averages per token, with
      ``odds(x) = e^x / (1 - e^x)``; the loss of the chosen answer's tokens is the caller's to add

    ``sequence_logp`` makes the arguments from log-probabilities of tokens. ``ipo`` does not use label_smoothing and
    margin, nor do ``apo_zero``, ``apo_down`` and ``orpo``; ``hinge`` does not use label_smoothing; ``simpo`` and
    ``orpo`` do not use references.

    Args:
        chosen: ``[B]`` (or any shape) float32, bfloat16, float16 or float64: log-probability of the preferred answers.
        rejected: of the other answers, the same shape, any float dtype.
        ref_chosen, ref_rejected: the same under the reference model, both or neither; data, without gradient.
        kind: the formula.
        beta: strength of the tie to the reference.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round, in ``[0, 0.5)``.
        margin: by how much the chosen reward is to lead; of SimPO it is gamma.

    Returns:
        (losses, chosen_reward, rejected_reward), each of chosen's shape, float32 (float64 for float64): the loss of
        each pair, and ``beta * c`` and ``beta * r``, which get no gradient.

    Gradients: for ``chosen`` and ``rejected``, of any order. Deterministic. PyTorch operations on every backend.

    Raises:
        ValueError: different shapes, one reference without the other, an unknown kind, label_smoothing out of range,
            ``ipo`` with a beta that is not above 0.
        TypeError: a wrong dtype. RuntimeError: a reference requires grad in grad mode.

    Example::

        losses, better, worse = tilefuse.preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)

    Sources: DPO (2305.18290), SLiC (2305.10425), IPO (2310.12036), robust DPO (2403.00409), APO (2408.06266), SimPO
    (2405.14734), ORPO (2403.07691); the formulas are those of TRL.
    """
    _check_preference(chosen, rejected, ref_chosen, ref_rejected, kind, beta, label_smoothing)
    dtype = torch.float64 if chosen.dtype == torch.float64 else torch.float32
    c, r = chosen.to(dtype), rejected.to(dtype)
    if ref_chosen is not None and ref_rejected is not None and kind not in ("simpo", "orpo"):
        c, r = c - ref_chosen.to(dtype), r - ref_rejected.to(dtype)
    z = beta * (c - r) - margin
    if kind == "hinge":
        losses = torch.relu(1 - z)
    elif kind == "ipo":
        losses = (c - r - 1 / (2 * beta)).square()
    elif kind == "apo_zero":
        losses = torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)
    elif kind == "apo_down":
        losses = torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r))
    elif kind == "orpo":
        losses = -beta * F.logsigmoid(_log_odds(c) - _log_odds(r))
    elif kind == "robust":
        flipped = label_smoothing * F.logsigmoid(-z)
        losses = (flipped - (1 - label_smoothing) * F.logsigmoid(z)) / (1 - 2 * label_smoothing)
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    # unlike detach() it leaves forward mode its tangents
    with torch.no_grad():
        return losses, beta * c, beta * r


@op(module=_MODULE, kernels=(), differentiable=("logp",))
def sequence_logp(
    logp: Tensor,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    ignore_index: int = -100,
    average: bool = False,
) -> Tensor:
    """Log-probability of each sequence: the sum of that of its tokens whose target is not ``ignore_index``.

    Args:
        logp: ``[B, S]``, or packed ``[T]`` with ``cu_seqlens``: log-probability of each token, as ``linear_logprobs``
            gives it; float32, bfloat16, float16 or float64. An ignored token never matters, even if it holds NaN.
        target: of logp's shape, int32 or int64; says which tokens count and nothing else.
        cu_seqlens: ``[B + 1]`` int32 or int64, bounds of the sequences. Tokens outside of them count nowhere.
        ignore_index: marks tokens that do not count: prompt and padding.
        average: divide by the number of tokens (IPO, SimPO, ORPO); a sequence without one is 0.

    Returns:
        ``[B]`` float32 (float64 for float64).

    Gradients: for ``logp``, of any order. Deterministic in eager mode: packed tokens are added in float64, in order.
    PyTorch operations on every backend.

    Raises:
        ValueError: a wrong shape, ``[B, S]`` with or ``[T]`` without ``cu_seqlens``. TypeError: a wrong dtype.

    Example::

        chosen = tilefuse.sequence_logp(logp, target, cu_seqlens)

    Source: DPO (2305.18290); SimPO (2405.14734) for the average.
    """
    name = "sequence_logp"
    if logp.dim() not in (1, 2):
        errors.value_error(name, "logp", "[B, S], or [T] with cu_seqlens", logp)
    errors.check_dtype(name, "logp", logp, errors.FLOATS)
    if target.shape != logp.shape:
        errors.value_error(name, "target", f"of logp's shape {[*logp.shape]}", target)
    errors.check_dtype(name, "target", target, errors.INDEX_DTYPES)
    errors.check_device(name, "target", target, logp, "logp")
    keep = target != ignore_index
    x = logp if logp.dtype == torch.float64 else logp.float()
    if cu_seqlens is None:
        if logp.dim() == 1:
            errors.value_error(name, "cu_seqlens", "given for packed [T]", cu_seqlens)
        total = torch.where(keep, x, 0.0).sum(-1)
        count = keep.sum(-1)
    else:
        check_cu_seqlens(name, cu_seqlens, logp, "logp")
        sequence, inside = places(cu_seqlens, logp.shape[0])
        keep = keep & inside
        sequences = cu_seqlens.shape[0] - 1
        # one spare place, for tokens of no sequence
        at = torch.where(keep, sequence, sequences)
        zeros = torch.zeros(sequences + 1, dtype=torch.float64, device=x.device)
        total = zeros.index_put((at,), torch.where(keep, x, 0.0).double(), accumulate=True)[:sequences].to(x.dtype)
        count = torch.zeros_like(zeros, dtype=torch.int64).index_put((at,), keep.long(), accumulate=True)[:sequences]
    return total / count.clamp(min=1) if average else total
