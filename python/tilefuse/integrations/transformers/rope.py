"""Rotary embedding: ``apply_rotary_pos_emb`` is a global of each model's file, so a module gets a copy of its forward
that sees another one. No other model changes, and torch.compile traces the copy as it does the original."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.rope.rope import rope_qk

# an implementation of Hugging Face's function in tilefuse, given the original one for what it does not take
Apply = Callable[..., tuple[Tensor, Tensor]]


def by_token(
    op: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *more: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Calls an op with tables that hold one row per token: q, k ``[B, S, H, D]``, tables ``[B or 1, S, R / 2]``."""
    batch, length = q.shape[:2]
    half = cos.shape[-1]
    # positions None counts the rows
    tables = cos.reshape(-1, half).float(), sin.reshape(-1, half).float()
    if cos.shape[0] == 1:
        return op(q, k, *more, *tables, **options)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k))
    out = op(*flat, *more, *tables, **options)
    return out[0].view(batch, length, *out[0].shape[1:]), out[1].view(batch, length, *out[1].shape[1:])


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q, k ``[B, H, S, D]`` and tables ``[B or 1, S, R / 2]`` to the rotated pair, ``[B, S, H, D]`` in memory."""
    q, k = by_token(rope_qk, q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=interleaved)
    return q.transpose(1, 2), k.transpose(1, 2)


def _refuses(q: Tensor, k: Tensor, table: Tensor) -> bool:
    return (
        q.dtype != k.dtype
        or q.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or table.dim() != 3
        or table.shape[0] not in (1, q.shape[0])
        or table.shape[1] != q.shape[2]
        or table.requires_grad
        or q.device.type not in ("cpu", "cuda")
    )


def _halves(stock: Apply, full: bool) -> Apply:
    """Pairs ``(i, i + R / 2)``; ``full`` tables hold every angle twice."""

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim != 1 or _refuses(q, k, cos):
            return stock(q, k, cos, sin, unsqueeze_dim)
        half = cos.shape[-1] // 2 if full else cos.shape[-1]
        return _rotate(q, k, cos[..., :half], sin[..., :half], False)

    return apply_rotary_pos_emb


def _pairs_to_halves(stock: Apply) -> Apply:
    """DeepSeek-V3: pairs ``(2i, 2i + 1)`` come out as ``(i, i + R / 2)``, and the cache holds them so."""

    def apply_rotary_pos_emb_interleave(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        if unsqueeze_dim != 1 or _refuses(q, k, cos) or q.shape[-1] != cos.shape[-1]:
            return stock(q, k, cos, sin, position_ids, unsqueeze_dim)
        half = cos.shape[-1] // 2
        rotated = _rotate(q, k, cos[..., :half], sin[..., :half], True)
        return tuple(x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2) for x in rotated)

    return apply_rotary_pos_emb_interleave


def _complex_pairs(stock: Apply) -> Apply:
    """DeepSeek-V2: pairs ``(2i, 2i + 1)`` times complex numbers."""

    def apply_rotary_emb(xq, xk, freqs_cis):
        if _refuses(xq, xk, freqs_cis):
            return stock(xq, xk, freqs_cis)
        return _rotate(xq, xk, freqs_cis.real, freqs_cis.imag, True)

    return apply_rotary_emb


_CANDIDATES: dict[str, tuple[Callable[[Apply], Apply], ...]] = {
    "apply_rotary_pos_emb": (functools.partial(_halves, full=True), functools.partial(_halves, full=False)),
    "apply_rotary_pos_emb_interleave": (_pairs_to_halves,),
    "apply_rotary_emb": (_complex_pairs,),
}


@functools.cache
def counterpart(stock: Apply, name: str) -> Apply | None:
    """The tilefuse form of a model's rotary function, found by running both on a few random numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    angle = torch.randn(2, 3, 4, generator=generator)
    tables = {
        "apply_rotary_emb": (torch.polar(torch.ones_like(angle), angle),),
    }
    for make in _CANDIDATES[name]:
        ours = make(stock)
        full = not (isinstance(make, functools.partial) and not make.keywords["full"])
        wide = torch.cat((angle, angle), -1) if full else angle
        arguments = tables.get(name, (wide.cos(), wide.sin()))
        try:
            with torch.no_grad():
                expected = stock(q, k, *arguments)
                got = ours(q, k, *arguments)
            if all(torch.allclose(a, b, atol=1e-5) and a.shape == b.shape for a, b in zip(got, expected)):
                return ours
        except (RuntimeError, TypeError, ValueError, IndexError):
            # not a function of these arguments, or not of these tables
            continue
    return None


def rebuild(module: nn.Module) -> tuple[Callable[..., Any] | None, str]:
    """``(forward with tilefuse's rotary embedding or None, why not)`` for an attention module."""
    forward = type(module).forward
    names = [name for name in _CANDIDATES if name in forward.__code__.co_names]
    changed = {}
    for name in names:
        stock = forward.__globals__.get(name)
        ours = counterpart(stock, name) if isinstance(stock, types.FunctionType) else None
        if ours is None:
            return None, "its rotary embedding is of another form"
        changed[name] = ours
    if not changed:
        rotary = [name for name in forward.__code__.co_names if "rotary" in name or "rope" in name]
        return None, f"its rotary embedding ({rotary[0]}) has no tilefuse form" if rotary else ""
    scope = {**forward.__globals__, **changed}
    # torch.compile would look names up in the module that __name__ says, and find the original functions
    del scope["__name__"]
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copy, forward, updated=()), ""
