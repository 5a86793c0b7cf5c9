"""What the launchers of this family share with the reference."""

from ...reference.attention.block_lists import transpose_lists, unexpanded
from ...reference.attention.global_attention import global_positions

__all__ = ["global_positions", "transpose_lists", "unexpanded"]
