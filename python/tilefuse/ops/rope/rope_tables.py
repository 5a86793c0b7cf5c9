"""Tables of cosines and sines for every rotary scaling rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import errors

__all__ = ["rope_tables"]


# what a dict without a type may say: they do not change the frequencies of the default rule
_WITHOUT_TYPE = frozenset(
    ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "mrope_section", "mrope_interleaved")
)


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The rule that a ``rope_parameters`` dict names; ValueError for one that cannot be the dict of one rule."""
    nested = [key for key, value in scaling.items() if isinstance(value, Mapping)]
    if nested:
        expected = f"one rule's dict, such as scaling[{nested[0]!r}]"
        errors.value_error("rope_tables", "scaling", expected, f"a dict of dicts with the keys {', '.join(nested)}")
    kind = scaling.get("rope_type") or scaling.get("type")
    unknown = [str(key) for key, value in scaling.items() if value is not None and key not in _WITHOUT_TYPE]
    if not kind and unknown:
        errors.value_error("rope_tables", "scaling", f"a dict with a rope_type for {', '.join(unknown)}", dict(scaling))
    return kind or "default"


class _Parameters:
    """One call's numbers, with the scaling dict's missing keys reported by name."""

    def __init__(
        self, rotary_dim: int, max_positions: int, base: float, scaling: Mapping[str, Any], dtype: torch.dtype
    ):
        self.dim = rotary_dim
        self.scaling = scaling
        self.kind = rope_type(scaling)
        self.dtype = dtype
        self.base = scaling["rope_theta"] if scaling.get("rope_theta") is not None else base
        # Hugging Face takes this from the model's config, which a scaling dict does not carry
        self.max_position_embeddings = scaling.get("max_position_embeddings") or max_positions

    def __getitem__(self, key: str) -> Any:
        if key not in self.scaling:
            errors.value_error("rope_tables", "scaling", f"a dict with {key!r} for {self.kind!r}", dict(self.scaling))
        return self.scaling[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.scaling.get(key, default)

    def exponents(self, dim: int | None = None) -> Tensor:
        return torch.arange(0, dim or self.dim, 2).to(self.dtype) / self.dim

    def inv_freq(self, base: float | None = None) -> Tensor:
        return 1.0 / ((self.base if base is None else base) ** self.exponents())


def _default(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    return p.inv_freq(), 1.0


def _linear(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    return p.inv_freq() / p["factor"], 1.0


def _proportional(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    # the pairs that do not turn keep frequency 0 inside the full width (Gemma 4)
    turning = int(p.get("partial_rotary_factor", 1.0) * p.dim // 2)
    inv_freq = torch.zeros(p.dim // 2, dtype=p.dtype)
    inv_freq[:turning] = 1.0 / (p.base ** p.exponents(2 * turning)) if turning else 0.0
    return inv_freq / p.get("factor", 1.0), 1.0


def _dynamic(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    if p.dim == 2:
        errors.value_error("rope_tables", "rotary_dim", "at least 4 for 'dynamic'", p.dim)
    longest = p.max_position_embeddings
    length = longest if seq_len is None else max(seq_len, longest)
    factor = p["factor"]
    stretch = (factor * length / longest) - (factor - 1)
    return p.inv_freq(p.base * stretch ** (p.dim / (p.dim - 2))), 1.0


def _yarn(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    original = p["original_max_position_embeddings"]
    factor = p["factor"]
    if factor is None:
        factor = p.max_position_embeddings / original

    def magnitude(scale: float, weight: float = 1) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = p.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = p.get("mscale"), p.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = float(magnitude(factor, mscale) / magnitude(factor, mscale_all_dim))
        else:
            attention_factor = magnitude(factor)

    def pair_that_turns(times: float) -> float:
        return (p.dim * math.log(original / (times * 2 * math.pi))) / (2 * math.log(p.base))

    low, high = pair_that_turns(p.get("beta_fast") or 32), pair_that_turns(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(p.dim // 2, dtype=p.dtype) - low) / (high - low)).clamp(0, 1)
    frequencies = p.base ** p.exponents()
    keep = 1 - ramp
    return (1.0 / (factor * frequencies)) * (1 - keep) + (1.0 / frequencies) * keep, attention_factor


def _longrope(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    original = p["original_max_position_embeddings"]
    short, long = p["short_factor"], p["long_factor"]
    factor = p.get("factor")
    if factor is None:
        factor = p.max_position_embeddings / original
    attention_factor = p.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    stretch = torch.tensor(long if seq_len and seq_len > original else short, dtype=p.dtype)
    if stretch.shape != (p.dim // 2,):
        errors.value_error("rope_tables", "scaling", f"factors of {p.dim // 2} values", [*stretch.shape])
    return 1.0 / (stretch * p.base ** p.exponents()), attention_factor


def _llama3(p: _Parameters, seq_len: int | None) -> tuple[Tensor, float]:
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    inv_freq = p.inv_freq()
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < original / high) * ~(wavelength > original / low)
    return torch.where(medium, between, scaled), 1.0


_RULES: dict[str, Callable[[_Parameters, int | None], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def rope_tables(
    rotary_dim: int,
    max_positions: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    seq_len: int | None = None,
    angle_dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin ``[max_positions, rotary_dim / 2]`` float32, for ``rope`` and the ops around it.

    ``cos[p, i] = m * cos(p * f_i)`` with ``f_i = base ** (-2i / rotary_dim)`` changed by the scaling rule and ``m``
    its attention factor (1 for most rules), which is folded into both tables.

    Args:
        rotary_dim: number of rotated dims, even.
        max_positions: number of rows.
        base: also called theta; the dict's ``rope_theta`` wins over it.
        scaling: a Hugging Face ``rope_parameters`` or ``rope_scaling`` dict. Its ``rope_type`` (or ``type``) is
            ``default``, ``linear``, ``dynamic``, ``yarn``, ``longrope``, ``llama3`` or ``proportional``; the other
            keys are Hugging Face's. A dict of one such dict per layer type (Gemma-3) is refused: pass the layer's.
            Without a type the rule is ``default``, and keys that it does not have are refused.
            ``partial_rotary_factor`` matters for ``proportional`` only: elsewhere ``rotary_dim`` says it. Where a rule
            needs the config's ``max_position_embeddings`` (``dynamic``; ``yarn`` and ``longrope`` without a factor), a
            key of that name is read, else ``max_positions`` is taken.
        seq_len: the length that ``dynamic`` and ``longrope`` adapt to; None is Hugging Face's state before the first
            forward: no stretch, and the short factors.
        angle_dtype: float64 angles are right to the last bit of the float32 table at any position. float32 angles
            are off by up to 9e-3 at 128k positions; they are what Hugging Face computes, reproduced bit for bit.
        device: where the tables go; they are always computed on the CPU.

    Not differentiable; the result does not require grad.

    Raises:
        ValueError: an odd ``rotary_dim``, an unknown rule, a key that the rule needs and ``scaling`` lacks, nested
            dicts, or keys of a rule without its type.
        TypeError: an ``angle_dtype`` other than float32 and float64.

    Source: RoFormer (arXiv 2104.09864), YaRN (2309.00071), LongRoPE (2402.13753), Llama 3.1's and Hugging Face's code.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        errors.value_error("rope_tables", "rotary_dim", "even and at least 2", rotary_dim)
    if max_positions < 0:
        errors.value_error("rope_tables", "max_positions", "at least 0", max_positions)
    if angle_dtype not in (torch.float32, torch.float64):
        errors.type_error("rope_tables", "angle_dtype", "torch.float32 or torch.float64", angle_dtype)
    p = _Parameters(rotary_dim, max_positions, base, scaling or {}, angle_dtype)
    if p.kind not in _RULES:
        errors.value_error("rope_tables", "scaling", f"of a rope_type among {', '.join(_RULES)}", p.kind)
    with torch.device("cpu"), torch.no_grad():
        inv_freq, attention_factor = _RULES[p.kind](p, seq_len)
        angle = torch.arange(max_positions).to(angle_dtype)[:, None] * inv_freq
        cos, sin = ((t * attention_factor).float() for t in (angle.cos(), angle.sin()))
    device = torch.get_default_device() if device is None else device
    return cos.to(device), sin.to(device)
