"""Benchmarks of the attention family."""
