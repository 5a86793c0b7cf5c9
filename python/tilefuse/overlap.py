"""Whether elements of tensors share memory, which an op that writes to them must know.

Both questions are the same one: is a number the sum of given strides, each taken a bounded number of times.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from . import errors

__all__: list[str] = []

# a search of more steps than this is given up, and the tensors count as overlapping
_MOST_STEPS = 10_000


def check_in_place(op: str, **tensors: Tensor) -> None:
    """Refuses tensors to write to of which elements share memory, with each other or with another tensor's."""
    items = list(tensors.items())
    for i, (arg, tensor) in enumerate(items):
        if overlaps_itself(tensor):
            errors.value_error(op, arg, "a tensor without overlapping elements", f"strides {[*tensor.stride()]}")
        for other_arg, other in items[:i]:
            if overlap(tensor, other):
                errors.value_error(op, arg, f"a tensor that shares no memory with {other_arg}", tensor)


def _has_memory(tensor: Tensor) -> bool:
    """Not so for tensors that stand for others, while tracing."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not torch._C._are_functorch_transforms_active()
    )


def overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    strides = tensor.stride()
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape)):
        return tensor.numel() > 0
    if not _has_memory(tensor) or tensor.numel() == 0:
        return False
    dims = sorted(_dims(tensor))
    reach = 0
    for stride, steps in dims:
        if stride <= reach:
            break
        reach += stride * steps
    else:
        # every stride steps over all that the smaller ones reach
        return False
    # two elements are one if their indices differ, in dim i upwards, and their addresses do not
    for i, (stride, steps) in enumerate(dims):
        others = dims[:i] + dims[i + 1 :]
        middle = sum(s * n for s, n in others)
        if _is_sum(middle - stride, (stride, steps - 1), *((s, 2 * n) for s, n in others)):
            return True
    return False


def overlap(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return a.numel() > 0
    if not (_has_memory(a) and _has_memory(b)) or a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    dims_a, dims_b = _bytes(a), _bytes(b)
    reach_a, reach_b = (sum(s * n for s, n in dims) for dims in (dims_a, dims_b))
    distance = b.data_ptr() - a.data_ptr()
    if distance > reach_a or distance < -reach_b:
        return False
    # i = distance + j for a sum i of strides of a and one j of b; reach_b - j is a sum like j
    return _is_sum(distance + reach_b, *dims_a, *dims_b)


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and number of steps of every dim that has any."""
    return [(stride, size - 1) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def _bytes(tensor: Tensor) -> list[tuple[int, int]]:
    size = tensor.element_size()
    if tensor.is_contiguous():
        return [(1, tensor.numel() * size - 1)]
    return [(1, size - 1), *((stride * size, steps) for stride, steps in _dims(tensor))]


# a model asks for the same views in every layer and step
@lru_cache(1024)
def _is_sum(total: int, *terms: tuple[int, int]) -> bool:
    """Whether ``total = sum(n_i * stride_i)`` with ``0 <= n_i <= steps_i``."""
    most: dict[int, int] = {}
    for stride, steps in terms:
        if steps:
            most[stride] = most.get(stride, 0) + steps
    strides = sorted(most, reverse=True)
    # of strides[i:]
    reach, divisor = [0], [0]
    for stride in reversed(strides):
        reach.insert(0, reach[0] + stride * most[stride])
        divisor.insert(0, math.gcd(divisor[0], stride))
    steps_left = _MOST_STEPS
    open_ = [(0, total)]
    while open_:
        i, rest = open_.pop()
        if rest == 0:
            return True
        if rest < 0 or rest > reach[i] or rest % divisor[i]:
            continue
        stride = strides[i]
        low, high = max(0, -((reach[i + 1] - rest) // stride)), min(most[stride], rest // stride)
        steps_left -= high - low + 1
        if steps_left < 0:
            return True
        open_ += [(i + 1, rest - n * stride) for n in range(low, high + 1)]
    return False
