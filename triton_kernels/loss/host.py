"""What launchers of this family share with the references."""

from ...reference.loss.linear_cross_entropy import with_gradients
from ...reference.loss.linear_distillation import padded

__all__ = ["padded", "with_gradients"]
