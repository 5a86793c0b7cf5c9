"""Pure PyTorch implementations, any device, any dtype up to float64, at ``<family>/<op>.py``.

They define what every op means: the other backends are compared with them, in float64, on the same operands.
"""
