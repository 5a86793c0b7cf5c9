"""The loss of policy optimisation as a module that holds its options."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.loss import policy_loss as op

__all__ = ["PolicyLoss"]


class PolicyLoss(nn.Module):
    """``tilefuse.policy_loss`` with options that are checked once, where the module is made.

    Args:
        kind, level, clip_low, clip_high, dual_clip, kl, kl_beta, kl_weighted, log_ratio_limit, reduction: as
            ``tilefuse.policy_loss`` takes them. GRPO is ``reduction="sequence"``, DAPO the default with
            ``clip_high=0.28``, Dr. GRPO the default with ``num_items`` = B * L_max, GSPO ``level="sequence"`` with
            ``reduction="sequence"``.

    No parameters. ``forward`` takes the op's tensors and returns its (loss, stats).

    Raises:
        ValueError, TypeError: as ``tilefuse.policy_loss``.

    Example::

        criterion = tilefuse.nn.PolicyLoss(kl_beta=0.04, reduction="sequence")
        loss, stats = criterion(logp, advantages, old_logp, ref_logp, mask)
    """

    def __init__(
        self,
        *,
        kind: str = "clip",
        level: str = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float = 0.0,
        kl: str = "k3",
        kl_beta: float = 0.0,
        kl_weighted: bool = False,
        log_ratio_limit: float = 20.0,
        reduction: str = "token",
    ):
        super().__init__()
        op.check_options(kind, level, clip_low, clip_high, dual_clip, kl, log_ratio_limit, reduction)
        self.kind, self.level, self.reduction = kind, level, reduction
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl, self.kl_beta, self.kl_weighted = kl, kl_beta, kl_weighted
        self.log_ratio_limit = log_ratio_limit

    def forward(
        self,
        logp: Tensor,
        advantages: Tensor,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        return op.policy_loss(
            logp,
            advantages,
            old_logp,
            ref_logp,
            mask,
            token_weight,
            cu_seqlens,
            num_items,
            kind=self.kind,
            level=self.level,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            kl=self.kl,
            kl_beta=self.kl_beta,
            kl_weighted=self.kl_weighted,
            log_ratio_limit=self.log_ratio_limit,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"kind={self.kind!r}, level={self.level!r}, clip=({self.clip_low}, {self.clip_high}), kl={self.kl!r}, "
            f"kl_beta={self.kl_beta}, reduction={self.reduction!r}"
        )
