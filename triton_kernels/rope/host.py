"""Checks that the launchers of this family share with the reference."""

from ...reference.rope.rope import token_positions
from ...reference.rope.rope_append_kv import check_slots

__all__ = ["check_slots", "token_positions"]
