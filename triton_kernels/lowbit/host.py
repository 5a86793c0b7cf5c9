"""Layouts that the launchers of this family share with the ops."""

from ...ops.lowbit.fake_quantize import EPS, mask_bytes
from ...ops.lowbit.quantize import bytes_of, code_dtype, columns_of, groups_of

__all__ = ["EPS", "bytes_of", "code_dtype", "columns_of", "groups_of", "mask_bytes"]
