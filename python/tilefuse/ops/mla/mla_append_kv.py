"""Norm, RoPE, quantisation and the store into the paged latent cache, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import errors
from ...library import STANDARD_DTYPES, kernel, op
from ...overlap import check_in_place
from .checks import check_cache, check_index, check_tables, rows_of
from .mla_compress_kv import check_kv_a

__all__ = ["mla_append_kv"]

_NAME = "mla_append_kv"
_MODULE = "mla/mla_append_kv"


def _check(kv_a, weight, cos, sin, positions, cache, slot_mapping, eps, layout) -> None:
    rope_dim = check_kv_a(_NAME, kv_a, weight)
    row = check_cache(_NAME, cache, weight.shape[0], layout)
    if row.rope_dim != rope_dim:
        errors.value_error(_NAME, "cache", f"wide enough for R = {row.rank} and r = {rope_dim}", cache)
    check_tables(_NAME, "kv_a", kv_a, rope_dim, cos, sin, positions)
    errors.check_device(_NAME, "cache", cache, kv_a, "kv_a")
    tokens = min(kv_a.shape[0], slot_mapping.shape[0]) if slot_mapping.ndim == 1 else kv_a.shape[0]
    check_index(_NAME, "slot_mapping", slot_mapping, (tokens,), kv_a, "kv_a")
    if not eps > 0:
        errors.value_error(_NAME, "eps", "positive", eps)


def _fake(kv_a, weight, cos, sin, positions, cache, slot_mapping, eps, interleaved, layout):
    _check(kv_a, weight, cos, sin, positions, cache, slot_mapping, eps, layout)


def _not_float64(kv_a, weight, cos, sin, positions, cache, *_):
    wide = [t.dtype for t in (weight, cache) if t.is_floating_point() and t.dtype not in STANDARD_DTYPES]
    return f"does not take {errors.dtype_name(wide[0])}" if wide else None


def _not_cuda(kv_a, weight, cos, sin, positions, cache, *_):
    if weight.dtype not in (kv_a.dtype, torch.float32):
        return f"does not take a {errors.dtype_name(weight.dtype)} weight with {errors.dtype_name(kv_a.dtype)} rows"
    if cache.dtype not in (kv_a.dtype, torch.uint8):
        return f"does not write {errors.dtype_name(kv_a.dtype)} rows to a {errors.dtype_name(cache.dtype)} cache"
    return None


mla_append_kv_fwd = kernel(
    "mla_append_kv_fwd(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) cache, "
    "Tensor slot_mapping, float eps, bool interleaved, str layout) -> ()",
    module=_MODULE,
    fake=_fake,
    backends=("reference", "cpu", "triton", "cuda"),
    when={"cpu": _not_float64, "triton": _not_float64, "cuda": _not_cuda},
)


@op(
    module=_MODULE,
    kernels=("mla_append_kv_fwd",),
    mutates=("cache",),
)
def mla_append_kv(
    kv_a: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    layout: str = "bf16",
) -> None:
    """Writes latent rows into the paged cache: ``mla_compress_kv`` and the store (and quantisation) in one pass.

    The row of token t goes to slot ``slot_mapping[t] = page * page_size + row``. The same bits on every backend.

    Args:
        kv_a: ``[T, R + r]`` raw down-projection, float32, bfloat16 or float16, any strides.
        weight: ``[R]`` of the norm.
        cos, sin: ``[P, r / 2]`` float32.
        positions: ``[T]`` int32 or int64.
        cache: ``[pages, page_size, width]``, written in place, any page size and page or row strides. Every byte of a
            row is documented in ``tilefuse/ops/mla/layout.py``:

            * ``layout="bf16"``: bfloat16 or float16 (float32, float64 for checks), ``width = R + r``:
              ``[normed R | rotated r]``, one rounding to the cache's dtype.
            * ``layout="fp8"``: uint8, ``width = R + R / 32 + 2 r`` bytes (656 at R = 512, r = 64, the layout of
              FlashMLA's sparse kernels and vLLM's ``fp8_ds_mla``): R e4m3 codes, R / 128 float32 scales, r bfloat16.
              Codes and scales follow ``fp8_quantize``'s exact rule (``scale_format="pow2"``, blocks of 128) on the
              unrounded float32 norm. Rows must start at multiples of 4 bytes.
        slot_mapping: ``[<= T]`` int32 or int64; tokens past its end and slots < 0 are skipped (the padding of a CUDA
            graph). Slots must not repeat.
        eps, interleaved: as in ``mla_compress_kv``.

    Not differentiable: raises where kv_a or weight would need a gradient.

    Raises:
        ValueError: wrong shapes or layout; on CPU also a slot past the cache or a position outside of the tables,
            before anything is written. (A GPU skips such a slot and clamps such a position.)
        TypeError: wrong dtypes.

    Source: the cache rows of FlashMLA (``tests/quant.py``) and DeepSeek-V3.2; power-of-two scales as FlashMLA's
    reference writes them.
    """
    _check(kv_a, weight, cos, sin, positions, cache, slot_mapping, eps, layout)
    check_in_place(_NAME, cache=cache)
    errors.check_not_differentiated(_NAME, "it has no backward", kv_a=kv_a, weight=weight, cos=cos, sin=sin)
    mla_append_kv_fwd(
        rows_of(kv_a), weight.contiguous(), rows_of(cos), rows_of(sin), positions.contiguous(), cache,
        slot_mapping.contiguous(), eps, interleaved, layout,
    )  # fmt: skip
