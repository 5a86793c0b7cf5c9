"""Is a low-precision result as good as it can be?

The rule: with ``oracle`` the float64 result on the kernel's exact operands and ``naive`` the plain
low-precision PyTorch computation on the same operands, accept when

    ``max|out - oracle| <= 2 * max|naive - oracle| + tiny``

and the same for the root mean square over each row (last dim) and each 64x64 tile (last two dims, leading dims
flattened). NaN and infinite elements must match the oracle's and are left out of the sums.

Two details keep the rule honest where luck decides:

* naive's error counts as at least the error of the oracle itself rounded to out's dtype: the best result there can
  be is always accepted, and a lucky naive result does not condemn it. Rows of fewer than 64 elements also count
  naive's relative error over the whole tensor, times the row's own scale.
* ``tiny`` stands for the noise of float32 (for float64 outputs: float64) arithmetic: by default ``8 * 2**-24``
  (float64: ``8 * 2**-53``) times the scale, plus half the smallest subnormal of out's dtype. The scale is
  ``max|oracle|`` for the maximum and the row's or tile's own root mean square of the oracle for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
TILE = 64
NOISE_ULPS = 8


@dataclass(frozen=True)
class ErrorReport:
    """How an output compares with the oracle. Ratios are to naive's error; at most 2 passes."""

    passed: bool
    max_error: float
    naive_max_error: float
    max_ratio: float
    rms_ratio: float  # root mean square over the whole tensor
    row_ratio: float  # worst row
    tile_ratio: float  # worst 64x64 tile
    message: str  # empty when passed

    def __bool__(self) -> bool:
        return self.passed


def _fail(message: str) -> ErrorReport:
    nan = math.nan
    return ErrorReport(False, nan, nan, math.inf, math.inf, math.inf, math.inf, message)


def _index(flat: int, shape: torch.Size) -> list[int]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return index[::-1]


def _first(mask: Tensor) -> tuple[int, list[int]]:
    return int(mask.sum()), _index(int(mask.flatten().to(torch.uint8).argmax()), mask.shape)


def _ratio(error: Tensor, baseline: Tensor, tiny: Tensor) -> Tensor:
    """(error - tiny) / baseline, 0 where the error is within tiny."""
    excess = (error - tiny).clamp(min=0)
    return torch.where(excess == 0, 0.0, excess / baseline)


def _tiles(x: Tensor) -> Tensor:
    """[R, C] -> sums over 64x64 tiles."""
    rows, cols = x.shape
    x = torch.nn.functional.pad(x, (0, -cols % TILE, 0, -rows % TILE))
    return x.view(x.shape[0] // TILE, TILE, x.shape[1] // TILE, TILE).sum((1, 3))


def _noise(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute part of the default ``tiny``."""
    info = torch.finfo(dtype)
    return NOISE_ULPS * 2.0 ** (-53 if dtype is torch.float64 else -24), info.smallest_normal * info.eps / 2


def error_report(
    out: Tensor, oracle: Tensor, naive: Tensor, *, tiny: float | None = None, rows: bool = True
) -> ErrorReport:
    """Applies the rule of this module and says by how much; see ``assert_close`` for the arguments."""
    for name, tensor in (("out", out), ("oracle", oracle), ("naive", naive)):
        if not tensor.dtype.is_floating_point:
            return _fail(f"{name} must be a floating-point tensor, got {tensor.dtype}; use assert_bit_equal")
        if tensor.shape != out.shape:
            return _fail(f"{name} has shape {[*tensor.shape]}, out has {[*out.shape]}")
    if oracle.dtype != torch.float64:
        return _fail(f"oracle must be float64, got {oracle.dtype}")
    dtype = out.dtype
    y, exact, plain = (t.detach().to("cpu", torch.float64) for t in (out, oracle, naive))
    rounded = exact if dtype.itemsize == 1 else exact.to(dtype).to(torch.float64)

    wrong = y.isnan() != exact.isnan()
    if wrong.any():
        count, where = _first(wrong)
        i = tuple(where)
        return _fail(f"{count} of {y.numel()} elements: NaN in one only, first at {where}: {y[i]} for {exact[i]}")
    # where the oracle overflows out's dtype, the infinity is the right answer
    wrong = (y.isinf() | rounded.isinf()) & (y != rounded)
    if wrong.any():
        count, where = _first(wrong)
        i = tuple(where)
        return _fail(f"{count} of {y.numel()} elements: infinities differ, first at {where}: {y[i]} for {exact[i]}")
    if y.numel() == 0:
        return ErrorReport(True, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "")

    use = rounded.isfinite() & y.isfinite()
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(use, y - exact, zero).abs()
    scale = torch.where(use, exact, zero).abs()
    rounding = torch.where(use, rounded - exact, zero).abs()
    # a naive result that is not finite where the oracle is says nothing about the error to allow
    naive_error = torch.where(use & plain.isfinite(), plain - exact, zero).abs()
    relative, absolute = _noise(dtype)

    def allowed(of_scale: Tensor) -> Tensor:
        return of_scale * relative + absolute if tiny is None else torch.full_like(of_scale, tiny)

    naive_max = torch.maximum(naive_error.max(), rounding.max())
    max_ratio = _ratio(error.max(), naive_max, allowed(scale.max()))

    error2, scale2, naive2, rounding2 = error.square(), scale.square(), naive_error.square(), rounding.square()
    count = use.to(torch.float64)

    def rms(sums: list[Tensor], n: Tensor) -> tuple[Tensor, Tensor]:
        """Ratios, from the sums of error2, naive2, rounding2, scale2 over regions of n elements."""
        e, base, best, size = ((s / n.clamp(min=1)).sqrt() for s in sums)
        base = torch.maximum(base, best)
        total = naive2.sum() / scale2.sum()
        if total.isfinite():
            base = torch.where(n < TILE, torch.maximum(base, total.sqrt() * size), base)
        return _ratio(e, base, allowed(size)), e

    squares = [error2, naive2, rounding2, scale2]
    rms_ratio, _ = rms([s.sum() for s in squares], count.sum())
    row_ratio = tile_ratio = torch.zeros(1, dtype=torch.float64)
    if rows and y.dim() > 0:
        width = y.shape[-1]
        as_rows = [s.reshape(-1, width) for s in squares]
        row_ratio, _ = rms([s.sum(1) for s in as_rows], count.reshape(-1, width).sum(1))
        tile_ratio, _ = rms([_tiles(s) for s in as_rows], _tiles(count.reshape(-1, width)))

    problems = []
    if max_ratio > FACTOR:
        flat = int(error.flatten().argmax())
        where = _index(flat, y.shape)
        i = tuple(where)
        problems.append(
            f"largest error {error[i]:.4g} at {where} (got {y[i]:.9g} for {exact[i]:.9g}) is {float(max_ratio):.3g}x"
            f" naive's largest {float(naive_max):.4g}"
        )
    if rms_ratio > FACTOR:
        problems.append(f"RMS error is {float(rms_ratio):.3g}x naive's")
    if (bad := row_ratio > FACTOR).any():
        where = _index(int(row_ratio.argmax()), y.shape[:-1])
        problems.append(
            f"{int(bad.sum())} of {bad.numel()} rows, worst {where}: RMS error {float(row_ratio.max()):.3g}x naive's"
        )
    if (bad := tile_ratio > FACTOR).any():
        tile = _index(int(tile_ratio.argmax()), tile_ratio.shape)
        problems.append(
            f"{int(bad.sum())} of {bad.numel()} 64x64 tiles, worst {tile}: RMS error"
            f" {float(tile_ratio.max()):.3g}x naive's"
        )
    return ErrorReport(
        passed=not problems,
        max_error=float(error.max()),
        naive_max_error=float(naive_max),
        max_ratio=float(max_ratio),
        rms_ratio=float(rms_ratio),
        row_ratio=float(row_ratio.max()) if row_ratio.numel() else 0.0,
        tile_ratio=float(tile_ratio.max()) if tile_ratio.numel() else 0.0,
        message="; ".join(problems),
    )


def assert_close(
    out: Tensor, oracle: Tensor, naive: Tensor, *, tiny: float | None = None, rows: bool = True, name: str = "out"
) -> None:
    """Raises AssertionError unless ``out`` is as close to ``oracle`` as ``naive`` is, within a factor of 2.

    Args:
        out: the kernel's output, any floating dtype and device.
        oracle: float64, same shape: the exact result on the kernel's operands.
        naive: same shape: the plain PyTorch computation in the kernel's dtype on the same operands.
        tiny: absolute error that always passes; None derives it from out's dtype and the oracle's scale (module
            docstring).
        rows: also check each row and each 64x64 tile, not only the whole tensor.
        name: how the message calls ``out``.
    """
    report = error_report(out, oracle, naive, tiny=tiny, rows=rows)
    if not report:
        raise AssertionError(f"{name} {[*out.shape]} {out.dtype}: {report.message}")


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """The raw bits as integers of the same shape."""
    x = x.detach().cpu()
    x = x.resolve_conj().resolve_neg() if x.is_complex() else x
    x = x.contiguous()
    if x.dtype is torch.bool:
        return x.to(torch.uint8)
    return (
        torch.view_as_real(x).view(_BITS[x.element_size() // 2]) if x.is_complex() else x.view(_BITS[x.element_size()])
    )


def assert_bit_equal(a: Tensor, b: Tensor, nan_bits: bool = False, *, name: str = "tensors") -> None:
    """Raises AssertionError unless both tensors have the same shape, dtype and bits (-0 is not +0).

    Strides and devices are ignored. Two NaNs are equal whatever their sign and payload, unless ``nan_bits``.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise AssertionError(f"{name} differ: {[*a.shape]} {a.dtype} and {[*b.shape]} {b.dtype}")
    different = _bits(a) != _bits(b)
    if different.dim() > a.dim():
        different = different.any(-1)
    if a.dtype.is_floating_point and not nan_bits:
        different &= ~(a.detach().cpu().float().isnan() & b.detach().cpu().float().isnan())
    if different.any():
        count, where = _first(different)
        i = tuple(where)
        raise AssertionError(
            f"{name} {[*a.shape]} {a.dtype} differ in {count} of {a.numel()} elements, first at {where}:"
            f" {a[i].item()!r} and {b[i].item()!r}"
        )
