"""What the modules share: layers without a wasted initialisation, reproducible draws, tensors of fixed dtype, and when
a submodule's parameters may be read instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors

__all__: list[str] = []


def linear(in_features: int, out_features: int, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Linear:
    """A Linear whose values the owner's ``reset_parameters`` draws."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype)
    return layer.to_empty(device=torch.get_default_device() if device is None else device)


@torch.no_grad()
def draw_(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal values; with a generator they are drawn on its device, in float32, so that every device gets the same."""
    if parameter.is_meta:
        return
    if generator is None:
        parameter.normal_(0.0, std)
    else:
        values = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
        parameter.copy_(values.normal_(0.0, std, generator=generator))


@torch.no_grad()
def reset_linear(layer: nn.Linear, std: float, generator: torch.Generator | None) -> None:
    draw_(layer.weight, std, generator)
    if layer.bias is not None:
        layer.bias.zero_()


def readable(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling ``module`` is nothing but the formula of one of these classes on its own parameters.

    Only then may a fused kernel read them. A subclass (an adapter, a quantised or sharded layer, a parametrisation), a
    replaced forward (offloading), a hook or a tensor subclass says that the call does more.
    """
    hooks = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks,
        nn.modules.module._has_any_global_hook(),
    )  # fmt: skip
    return (
        type(module) in classes
        and "forward" not in module.__dict__
        and not any(hooks)
        and all(p is None or type(p) in (Tensor, nn.Parameter) for p in module._parameters.values())
    )


class OffsetRMSNorm(nn.RMSNorm):
    """An RMSNorm whose weights are stored less ``offset`` (Gemma)."""

    def __init__(self, dim: int, offset: float, *, eps: float, **factory: Any):
        super().__init__(dim, eps=eps, **factory)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + self.offset, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}"


def readable_norm(module: Any, *classes: type[nn.RMSNorm]) -> tuple[Tensor, float, float] | None:
    """Weight, eps and what the weight is stored less of an RMSNorm that may be read, else None.

    They are the module's own: another norm may have taken the place of the one that was made here.
    """
    if not readable(module, *classes) or module.weight is None or module.eps is None:
        return None
    return module.weight, module.eps, getattr(module, "offset", 0.0)


def keep_dtype(tensors: dict[str, Tensor], fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Where ``fn`` of ``nn.Module._apply`` would move these tensors, but in their own dtype.

    ``fn`` sees an empty float32 tensor only. A tensor that leaves the meta device comes out uninitialised.
    """
    moved = {}
    for name, tensor in tensors.items():
        target = fn(torch.empty(0, dtype=torch.float32, device=tensor.device)).device
        if tensor.is_meta and target.type != "meta":
            moved[name] = torch.empty_like(tensor, device=target)
        else:
            moved[name] = tensor.to(target)
    return moved


def check_positive(name: str, **values: int) -> None:
    for arg, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            errors.value_error(name, arg, "an int >= 1", value)


def check_hidden(name: str, x: Tensor, hidden_size: int, cu_seqlens: Tensor | None, cache: Any) -> None:
    """``[B, S, hidden]``, or packed ``[T, hidden]`` with ``cu_seqlens`` and without a cache."""
    packed = cu_seqlens is not None
    expected = f"[T, {hidden_size}] with cu_seqlens" if packed else f"[B, S, {hidden_size}]"
    if x.dim() != (2 if packed else 3) or x.shape[-1] != hidden_size:
        errors.value_error(name, "x", expected, x)
    errors.check_dtype(name, "x", x, errors.FLOATS)
    if packed and cache is not None:
        errors.value_error(name, "cu_seqlens", "None with a cache (pad, and tell cache.extend the lengths)", cu_seqlens)


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """``[total]`` int32: the place of each packed token in its sequence, without a host synchronisation."""
    token = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    return (token - bounds[sequence.clamp(min=0)]).to(torch.int32)
