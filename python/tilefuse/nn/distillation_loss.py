"""The losses of distillation as a module that holds their options."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import errors
from ..ops.loss.checks import check_beta, check_transform
from ..ops.loss.linear_distillation import linear_distillation
from ..ops.loss.linear_topk_distillation import check_tail, linear_topk_distillation
from ..ops.loss.token_loss import check_reduction_name

__all__ = ["DistillationLoss"]

_NAME = "nn.DistillationLoss"


class DistillationLoss(nn.Module):
    """Divergence of a student's head from its teacher, whose head is there or who left a list of log-probabilities.

    ``tilefuse.linear_distillation`` and ``tilefuse.linear_topk_distillation`` with options that are checked once, where
    the module is made. The student's head is an argument, so that it may be tied, frozen or wrapped; the module has no
    parameters.

    Args:
        beta: the divergence, in ``[0, 1]``: 0 is the KL of the student from the teacher, 1 the reverse. The default is
            that of ``tilefuse.linear_topk_distillation``.
        tail: ``"bucket"``, ``"renormalize"`` or ``"none"``: what becomes of the tokens that a list does not have.
        temperature: divides the logits; log-probabilities of a list come at the same one.
        ignore_index, reduction: as in the ops.

    Shapes: ``forward(x [..., H], weight [V, H], teacher, target, bias, token_weight, num_items)``, the last four
    optional, gives the loss. ``teacher`` is one of

    * ``(teacher_logp [..., k], teacher_ids [..., k])``, as ``topk`` returns them,
    * ``(teacher_x [..., H_teacher], teacher_weight [V_teacher, H_teacher])``, with the bias of its head as a third
      where it has one.

    Raises:
        ValueError, TypeError: as the ops; ValueError for a teacher that is neither.

    Example::

        criterion = tilefuse.nn.DistillationLoss(temperature=2.0)
        with torch.no_grad():
            listed = (teacher(tokens) / 2.0).log_softmax(-1).topk(64)
        loss = criterion(student.model(tokens), student.lm_head.weight, listed)
        both = (teacher.model(tokens), teacher.lm_head.weight)
        loss = criterion(student.model(tokens), student.lm_head.weight, both)
    """

    def __init__(
        self,
        *,
        beta: float = 0.0,
        tail: str = "bucket",
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ):
        super().__init__()
        check_beta(_NAME, beta)
        check_tail(_NAME, tail)
        check_transform(_NAME, 0.0, temperature)
        check_reduction_name(_NAME, reduction)
        self.beta, self.tail, self.temperature = beta, tail, temperature
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        teacher: Sequence[Tensor],
        target: Tensor | None = None,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        listed = not isinstance(teacher, Tensor) and len(teacher) == 2 and not teacher[1].is_floating_point()
        if not listed and (isinstance(teacher, Tensor) or len(teacher) not in (2, 3)):
            got = teacher if isinstance(teacher, Tensor) else len(teacher)
            errors.value_error(
                _NAME, "teacher", "(teacher_logp, teacher_ids) or (teacher_x, teacher_weight[, teacher_bias])", got
            )
        shared = {
            "target": target,
            "bias": bias,
            "token_weight": token_weight,
            "num_items": num_items,
            "beta": self.beta,
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }
        first, second, *teacher_bias = teacher
        if listed:
            return linear_topk_distillation(x, weight, first, second, tail=self.tail, **shared)
        shared["teacher_bias"] = teacher_bias[0] if teacher_bias else None
        return linear_distillation(x, weight, first, second, **shared)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, tail={self.tail!r}, temperature={self.temperature}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )
