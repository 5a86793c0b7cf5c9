"""Logits that are not made until someone looks at one: what a head gives where its loss is fused with it.

They are tensors of the shape, dtype and gradient that Hugging Face's head gives, and stay without memory through what
models do to logits: casts to float32, factors and the tanh of a soft cap. A loss reads off what to call instead.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lazy import LazyTensor

_aten = torch.ops.aten


class Head(NamedTuple):
    """Logits ``cap(scale * (x weight^T + bias))``, where ``cap(z) = softcap * tanh(z / softcap)``, or z if it is 0."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float = 0.0
    # between a tanh and the factor behind it, which has to be the cap
    open: bool = False

    def times(self, factor: float) -> Head | None:
        if self.open:
            # tanh(s z) c = c tanh((s c) z / c)
            return self._replace(scale=self.scale * factor, softcap=factor, open=False) if factor > 0 else None
        return self._replace(scale=self.scale * factor) if self.softcap == 0 else None

    def tanh(self) -> Head | None:
        return None if self.open or self.softcap else self._replace(open=True)


class LazyLogits(LazyTensor):
    """``[..., V]``; they say their ``Head``."""

    _what = "the logits"

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.dense())

    def __setitem__(self, index: Any, value: Any) -> None:
        # through the dispatcher, so that the gradient knows
        Tensor.__setitem__(self, index, value)

    def register_hook(self, hook: Any) -> Any:
        self._refuse("a hook")
        return super().register_hook(hook)

    def retain_grad(self) -> None:
        self._refuse("retain_grad()")
        super().retain_grad()

    def _refuse(self, what: str) -> None:
        """Raises where a loss may have gone around the logits: their gradient would lack its part."""
        if self.says is not None:
            raise NotImplementedError(
                f"tilefuse: {what} of logits would not see the loss, which patch(loss=True) makes without them: leave "
                "out the labels, or patch without loss=True"
            )

    def derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        head: Head | None = self.says
        if head is None:
            return None
        dtype, found = self.dtype, None
        if func is _aten._to_copy.default:
            dtype = kwargs.get("dtype", dtype)
            if dtype in (self.dtype, torch.float32) and not {*kwargs} - {"dtype"}:
                found = head
        elif func in (_aten.mul.Tensor, _aten.div.Tensor) and not kwargs and isinstance(args[1], int | float):
            factor = float(args[1])
            found = head.times(factor if func is _aten.mul.Tensor else 1 / factor if factor else math.inf)
        elif func is _aten.tanh.default:
            found = head.tanh()
        if found is None:
            return None
        make = functools.partial(_made, self._entries, func, args[1:], kwargs)
        return LazyLogits.of(found, make, tuple(self.shape), dtype, self.device)


def _made(entries: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # entries that someone may have written to since are not those that the op was given
    before = entries.make() if entries.says is None or entries.made is None else entries.made
    return func(before, *args, **kwargs)


def _version(x: Tensor | None) -> int | None:
    return None if x is None or x.is_inference() else x._version


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, versions: tuple[int | None, ...]) -> Tensor:
    if versions != tuple(map(_version, (x, weight, bias))):
        raise RuntimeError(
            "tilefuse: the head or its input changed since the forward: read logits before the optimizer's step, or "
            "pass no labels"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


class _Logits(torch.autograd.Function):
    """``F.linear`` whose result has no entries yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
        ctx.save_for_backward(x, weight)
        operands = tuple(None if t is None else t.detach() for t in (x, weight, bias))
        make = functools.partial(_linear, *operands, tuple(map(_version, operands)))
        return LazyLogits.of(head, make, (*x.shape[:-1], weight.shape[0]), x.dtype, x.device)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        rows = dout.flatten(0, -2)
        return (
            dout @ weight if need_x else None,
            rows.t() @ x.flatten(0, -2) if need_weight else None,
            rows.sum(0) if need_bias else None,
            None,
        )


def lazy_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``F.linear`` gives, autocast included, without entries."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Logits.apply(x, weight, bias, Head(x, weight, bias))


def head_of(logits: Any) -> Head | None:
    """What logits are of, or None if their entries have to be looked at."""
    head = logits.says if type(logits) is LazyLogits else None
    return None if head is None or head.open else head
