"""Rotary embedding: ``apply_rotary_pos_emb`` is a global of each model's file (see ``rebuild``)."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import backend
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


def _refuses(q: Tensor, k: Tensor | None, table: Tensor | None) -> bool:
    return (
        k is None
        or table is None
        or q.dtype != k.dtype
        or q.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or table.dim() != 3
        or table.shape[0] not in (1, q.shape[0])
        or table.shape[1] != q.shape[2]
        or table.requires_grad
        or q.device.type not in ("cpu", "cuda")
    )


def _says_more(more: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Models' functions differ in what may follow the tables: a call that says something there stays theirs."""
    return bool(more) or any((name, value) != ("unsqueeze_dim", 1) for name, value in options.items())


def _halves(stock: Apply, full: bool) -> Apply:
    """Pairs ``(i, i + R / 2)``; ``full`` tables hold every angle twice."""

    def apply_rotary_pos_emb(q: Any, k: Any = None, cos: Any = None, sin: Any = None, *more: Any, **options: Any):
        if _says_more(more, options) or _refuses(q, k, cos):
            return stock(q, k, cos, sin, *more, **options)
        half = cos.shape[-1] // 2 if full else cos.shape[-1]
        return _rotate(q, k, cos[..., :half], sin[..., :half], False)

    return apply_rotary_pos_emb


def _pairs_to_halves(stock: Apply) -> Apply:
    """DeepSeek-V3: pairs ``(2i, 2i + 1)`` come out as ``(i, i + R / 2)``, and the cache holds them so."""

    def apply_rotary_pos_emb_interleave(q: Any, k: Any, cos: Any, sin: Any, *more: Any, **options: Any):
        if _says_more(more, options) or _refuses(q, k, cos) or q.shape[-1] != cos.shape[-1]:
            return stock(q, k, cos, sin, *more, **options)
        half = cos.shape[-1] // 2
        rotated = _rotate(q, k, cos[..., :half], sin[..., :half], True)
        q, k = (x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2) for x in rotated)
        return q, k

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


# only successes: a failure may be due to where it was tried
_found: dict[tuple[Apply, str], Apply] = {}


def counterpart(stock: Any, name: str) -> Apply | None:
    """The tilefuse form of a model's rotary function, found by running both on a few random numbers."""
    if not isinstance(stock, types.FunctionType):
        return None
    if (stock, name) not in _found:
        with torch.no_grad(), torch.device("cpu"), backend("reference"):
            ours = next((made for make in _CANDIDATES[name] if _same(stock, made := make(stock), name, make)), None)
        if ours is None:
            return None
        _found[stock, name] = ours
    return _found[stock, name]


def _same(stock: Apply, ours: Apply, name: str, make: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator, dtype=torch.float32) for heads in (4, 2))
    angle = torch.randn(2, 3, 4, generator=generator, dtype=torch.float32)
    full = not (isinstance(make, functools.partial) and not make.keywords["full"])
    wide = torch.cat((angle, angle), -1) if full else angle
    tables = (wide.cos(), wide.sin())
    if name == "apply_rotary_emb":
        tables = (torch.polar(torch.ones_like(angle), angle),)
    try:
        expected, got = stock(q, k, *tables), ours(q, k, *tables)
        return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected))
    except Exception:
        # not a function of these arguments, or not of these tables
        return False


def replace(name: str, value: Any, scope: dict[str, Any]) -> Any:
    """What stands in for a global of a model's file."""
    return counterpart(value, name) if name in _CANDIDATES else None


def in_forward(cls: type[nn.Module]) -> tuple[bool, str]:
    """Whether the forward of an attention class rotates by functions with a tilefuse form, and why not if it does."""
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, types.FunctionType):
        return False, ""
    names = forward.__code__.co_names
    known = [name for name in _CANDIDATES if name in names]
    if known:
        if all(counterpart(forward.__globals__.get(name), name) for name in known):
            return True, ""
        return False, "its rotary embedding is of another form"
    rotary = [name for name in names if "rotary" in name or "rope" in name]
    return False, f"its rotary embedding ({rotary[0]}) has no tilefuse form" if rotary else ""


def files_of_other_tables(model: nn.Module) -> set[str]:
    """Files whose tables do not hold every angle twice once tokens have several positions, as those of images do.

    Their sections of dims are cut across both halves (HunYuan-VL), which no function of a model's file tells.
    """
    several = [module for module in model.modules() if getattr(module, "mrope_section", None)]
    return {type(module).__module__ for module in several if not _holds_twice(module)}


def _holds_twice(rotary: Any) -> bool:
    axes = len(rotary.mrope_section)
    try:
        with torch.no_grad():
            device = next(rotary.buffers()).device
            positions = torch.arange(5 * axes, device=device).view(axes, 1, 5)
            tables = rotary(torch.zeros(1, 5, 8, device=device, dtype=torch.float32), positions)
            return all(torch.equal(*table.chunk(2, -1)) for table in tables)
    except Exception:
        # on the meta device, or not called like this
        return False
