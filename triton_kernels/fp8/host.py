"""Layouts that the launchers of this family share with the ops."""

from ...ops.fp8.quantize import CODES, blocks_of, empty_row_scale

__all__ = ["CODES", "blocks_of", "empty_row_scale"]
