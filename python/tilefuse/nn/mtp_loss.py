"""The loss of a language model that predicts more than the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import errors
from ..ops.loss.mtp_targets import mtp_targets
from .linear_cross_entropy import LinearCrossEntropy

__all__ = ["MTPLoss"]

_NAME = "nn.MTPLoss"


class MTPLoss(LinearCrossEntropy):
    """The head of a language model with multi-token prediction, and the losses of all of its predictions in one.

    With D extra predictions, ``target_k`` the targets k further on (``tilefuse.mtp_targets``) and CE the mean of
    ``tilefuse.linear_cross_entropy`` over the tokens that have a target::

        loss = CE(x_0, target) + mtp_weight / D * sum_k CE(x_k, target_k)        k = 1 .. D

    All of it is one call over the stacked states: the head is read once per pass, and its gradient is summed in float32
    and rounded once. In evaluation pass ``x_0`` alone.

    Parameters are those of ``tilefuse.nn.LinearCrossEntropy``: those of ``lm_head``, and ``loss.weight =
    embedding.weight`` ties them.

    Args:
        hidden_size: H. vocab_size: V.
        mtp_weight: of the extra predictions together, lambda, at least 0. It may be changed as training goes on:
            DeepSeek-V3 begins with 0.3 and ends with 0.1.
        bias, scale, softcap, ignore_index, label_smoothing, z_loss, recompute, device, dtype: as in
            ``tilefuse.nn.LinearCrossEntropy``.

    Shapes: ``forward(x, target, token_weight, num_items, cu_seqlens)``, the last three optional, gives a float32 scalar
    (float64 for float64).

    * ``x``: ``[1 + D, ..., H]``, or a sequence of 1 + D tensors ``[..., H]``: the states of the main prediction, then
      of each further one. D may be 0.
    * ``target``: ``[T]`` or ``[B, S]`` int32 or int64, of the main prediction: already shifted.
    * ``token_weight``: of target's shape, the weight of a target wherever it is predicted.
    * ``num_items``: what the main loss is divided by instead of its number of targets N, say that of all
      micro-batches. The extra means then count by the same share, ``N / num_items``.
    * ``cu_seqlens``: ``[B + 1]`` int32 or int64, bounds of documents in ``[T]``, across whose ends nothing is
      predicted; otherwise ``[T]``, or each row of ``[B, S]``, is one.

    A prediction without any target adds 0.

    Raises:
        ValueError, TypeError: as ``tilefuse.linear_cross_entropy`` and ``tilefuse.mtp_targets``; a negative mtp_weight;
            an x without states, or of another shape than target.

    Example::

        loss = tilefuse.nn.MTPLoss(256, 1000, mtp_weight=0.3)
        main, further = torch.randn(2, 16, 256), torch.randn(2, 16, 256)
        loss([main, further], torch.randint(1000, (2, 16))).backward()

    Source: DeepSeek-V3 (2412.19437) section 2.2.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        mtp_weight: float = 0.3,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not mtp_weight >= 0:
            errors.value_error(_NAME, "mtp_weight", "at least 0", mtp_weight)
        super().__init__(
            hidden_size,
            vocab_size,
            bias=bias,
            scale=scale,
            softcap=softcap,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
        self.mtp_weight = mtp_weight

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        target: Tensor,
        token_weight: Tensor | None = None,
        num_items: Tensor | float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        if len(x) == 0:
            errors.value_error(_NAME, "x", "the states of one prediction at least", x)
        for state in x:
            if state.shape[:-1] != target.shape or state.shape[-1:] != x[0].shape[-1:]:
                shape = ", ".join(map(str, (*target.shape, "H")))
                errors.value_error(_NAME, "x", f"[1 + D, {shape}], or 1 + D of [{shape}], for this target", x)
        states = x if isinstance(x, Tensor) else torch.stack([*x])
        depth = states.shape[0] - 1
        further = mtp_targets(target, depth, cu_seqlens, ignore_index=self.ignore_index)
        targets = torch.cat([target[None], further])  # [1 + D, ...]
        kept = (targets != self.ignore_index).flatten(1).sum(1).to(torch.promote_types(states.dtype, torch.float32))
        share = self.mtp_weight / max(1, depth) * kept[0] / kept.clamp(min=1)
        share[0] = 1.0
        weights = share.view(-1, *[1] * target.dim()).expand(targets.shape)
        if token_weight is not None:
            place = torch.arange(target.numel(), device=target.device).view(target.shape)
            place = torch.cat([place[None], mtp_targets(place, depth, cu_seqlens, ignore_index=0)])
            weights = weights * token_weight.flatten()[place]
        return super().forward(states, targets, weights, kept[0] if num_items is None else num_items)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mtp_weight={self.mtp_weight}"
