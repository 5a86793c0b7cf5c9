"""Layouts and checks that the launchers of this family share with the reference."""

from ...ops.mla import layout
from ...reference.mla.mla_append_kv import check_slots
from ...reference.rope.rope import token_positions

__all__ = ["check_slots", "layout", "token_positions"]
