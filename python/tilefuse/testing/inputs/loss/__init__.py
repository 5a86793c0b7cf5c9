"""Inputs of the losses."""
