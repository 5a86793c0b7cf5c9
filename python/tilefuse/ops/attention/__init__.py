"""Sliding-window, global, block-sparse and paged attention."""
