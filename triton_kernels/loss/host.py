"""What launchers of this family share with the references."""

from ...reference.loss.linear_cross_entropy import losses_and_coefficients

__all__ = ["losses_and_coefficients"]
