"""What launchers of this family share with the references."""

from ...reference.loss.linear_cross_entropy import with_gradients

__all__ = ["with_gradients"]
