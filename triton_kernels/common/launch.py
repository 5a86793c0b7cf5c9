"""What every launcher shares."""

from __future__ import annotations

from contextlib import nullcontext
from math import gcd

import torch
from torch import Tensor


def on_device(tensor: Tensor):
    """Launches go to the device of the arguments, also when another GPU is current."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def vector_width(itemsize: int, *strides: int) -> int:
    """Elements per access, at most 16 bytes, that every one of these strides is a multiple of."""
    return gcd(16 // itemsize, *strides)
