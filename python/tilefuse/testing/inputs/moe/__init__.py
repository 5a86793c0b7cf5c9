"""Inputs of the mixture-of-experts ops."""
