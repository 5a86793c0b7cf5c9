"""A tensor as one argument of a kernel: its pointer together with its strides.

Only pointers, strides and constants go into such tuples. Counts stay plain arguments: whatever ``do_not_specialize``
says, Triton (3.6 to 3.9) compiles a kernel anew where an integer in a tuple is 1 or begins to be a multiple of 16.
So do the strides of what has a token as its last dim, lse or a mask: it is made contiguous and addressed by counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A matrix whose last dim is contiguous."""

    ptr: Any
    row: Any

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        return cls(x, x.stride(0))


class Experts(NamedTuple):
    """A matrix for each expert, [E, N, K]."""

    ptr: Any
    expert: Any
    row: Any
    column: Any

    @classmethod
    def of(cls, x: Tensor) -> Experts:
        return cls(x, *x.stride())


class Rows(NamedTuple):
    """Rows of the heads of a tensor, whose last dim is contiguous. A packed tensor has no batch: its stride is 0."""

    ptr: Any
    batch: Any
    token: Any
    head: Any

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Of [B, S, H, D] or packed [T, H, D]."""
        return cls(x, *x.stride()[:3]) if x.dim() == 4 else cls(x, 0, *x.stride()[:2])
