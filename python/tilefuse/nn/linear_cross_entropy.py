"""The head of a language model together with its loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.loss.linear_cross_entropy import linear_cross_entropy

__all__ = ["LinearCrossEntropy"]


class LinearCrossEntropy(nn.Module):
    """A linear head and the cross-entropy of its logits, which are never all there (``tilefuse.linear_cross_entropy``).

    Parameters have the names of ``nn.Linear``, that is of ``lm_head``, so its state dict loads. To tie the head to an
    embedding, ``loss.weight = embedding.weight``: the two gradients add up.

    Args:
        hidden_size: H. vocab_size: V.
        bias: whether the head has one.
        scale, softcap, ignore_index, label_smoothing, z_loss, reduction, recompute: as in
            ``tilefuse.linear_cross_entropy``.
        device, dtype: of the parameters.

    Shapes: ``forward(x [..., H], target [...], token_weight [...], num_items)``, the last two optional, gives the loss.
    ``logits(x)`` gives what the loss is of, ``[..., V]`` in x's dtype, for generation.

    Raises:
        ValueError, TypeError: as ``tilefuse.linear_cross_entropy``.

    Example::

        loss = tilefuse.nn.LinearCrossEntropy(256, 1000)
        loss(torch.randn(2, 16, 256), torch.randint(1000, (2, 16))).backward()
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.scale, self.softcap, self.ignore_index = scale, softcap, ignore_index
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.reduction, self.recompute = reduction, recompute
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As ``nn.Linear``."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        return linear_cross_entropy(
            x,
            self.weight,
            target,
            self.bias,
            token_weight,
            None,
            num_items,
            scale=self.scale,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
            recompute=self.recompute,
        )

    def logits(self, x: Tensor) -> Tensor:
        """``cap(scale * (x w^T + bias))`` of all tokens."""
        z = nn.functional.linear(x, self.weight, self.bias) * self.scale
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap > 0 else z

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={getattr(self, name)}"
            for name, default in (("scale", 1.0), ("softcap", 0.0), ("label_smoothing", 0.0), ("z_loss", 0.0))
            if getattr(self, name) != default
        )
        return f"{self.hidden_size}, {self.vocab_size}, bias={self.bias is not None}{options}"
