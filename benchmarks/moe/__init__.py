"""Benchmarks of the mixture-of-experts ops."""
