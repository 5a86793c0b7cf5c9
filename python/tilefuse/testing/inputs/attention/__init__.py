"""Inputs of the attention family, and plain dense attention to hold it against."""
