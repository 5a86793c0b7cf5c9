"""Block-scaled e4m3 quantisation: ``fp8_quantize``, ``fp8_quantize_dual`` and ``fp8_dequantize``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import errors
from ...library import kernel, op

__all__ = ["fp8_dequantize", "fp8_quantize", "fp8_quantize_dual"]

_MODULE = "fp8/quantize"
BLOCK = 128
CODES = torch.float8_e4m3fn
SCALE_FORMATS = ("fp32", "pow2")
# smallest eps whose scale, eps / 448, is a normal float32
MIN_EPS = 448.0 * 2.0**-126
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
_NOT_DIFFERENTIABLE = "quantisation has no gradient (fp8_linear has one)"


def blocks_of(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK


def empty_row_scale(like: Tensor, rows: int, blocks: int) -> Tensor:
    """``[rows, blocks]`` float32 in the physical layout of (1, 128) scales, which TMA and cuBLASLt read.

    Rows are contiguous and blocks are ``round_up(rows, 4)`` elements apart.
    """
    pitch = max((rows + 3) // 4 * 4, 4)
    return like.new_empty_strided((rows, blocks), (1, pitch), dtype=torch.float32)


def check_scale_options(name: str, scale_format: str, eps: float) -> None:
    """Checks ``scale_format`` and ``eps``. Kernels round eps to float32."""
    if scale_format not in SCALE_FORMATS:
        errors.value_error(name, "scale_format", "'fp32' or 'pow2'", scale_format)
    if not MIN_EPS <= eps <= FLOAT32_MAX:
        errors.value_error(name, "eps", f"in [{MIN_EPS:.4g}, {FLOAT32_MAX:.4g}] (eps / 448 a normal float32)", eps)


def check_block(name: str, block: Sequence[int]) -> int:
    """Checks ``block``; returns its number of rows."""
    if tuple(block) not in ((1, BLOCK), (BLOCK, BLOCK)):
        errors.value_error(name, "block", "(1, 128) or (128, 128)", tuple(block))
    return block[0]


def check_input(name: str, arg: str, x: Tensor, min_dims: int = 1) -> None:
    if x.dtype not in errors.FLOATS:
        errors.check_dtype(name, arg, x, errors.FLOATS)
    if x.ndim < min_dims:
        errors.value_error(name, arg, "[..., K]" if min_dims == 1 else "[..., M, K]", x)
    errors.check_not_differentiated(name, _NOT_DIFFERENTIABLE, **{arg: x})


def as_rows(x: Tensor) -> Tensor:
    """``[rows, K]`` with a contiguous last dim: a view where the strides allow one, else a copy."""
    x = errors.check_last_dim_contiguous(x)
    # -1 is ambiguous for an empty tensor
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def split_rows(scale: Tensor, lead: Sequence[int]) -> Tensor:
    """``[rows, blocks]`` scales as ``[*lead, blocks]``, without a copy."""
    if len(lead) == 1:
        # a view of one row would make up another stride for it
        return scale
    return scale.view(*lead, scale.shape[1])


def as_batch(x: Tensor) -> Tensor:
    """``[G, M, K]`` with a contiguous last dim."""
    return errors.check_last_dim_contiguous(x).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _fake_rows(x: Tensor, _pow2: bool, _eps: float) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    return x.new_empty((m, k), dtype=CODES), empty_row_scale(x, m, blocks_of(k))


def _fake_tiles(x: Tensor, _pow2: bool, _eps: float) -> tuple[Tensor, Tensor]:
    g, m, k = x.shape
    scale = x.new_empty((g, blocks_of(m), blocks_of(k)), dtype=torch.float32)
    return x.new_empty((g, m, k), dtype=CODES), scale


def _fake_dual(x: Tensor, _pow2: bool, _eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x.shape
    return (
        x.new_empty((m, k), dtype=CODES),
        empty_row_scale(x, m, blocks_of(k)),
        x.new_empty((k, m), dtype=CODES),
        empty_row_scale(x, k, blocks_of(m)),
    )


def _fake_dequantize(q: Tensor, _scale: Tensor, _block_rows: int, out_dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=out_dtype)


def only_standard_out(*args: object) -> str | None:
    """Refuses an ``out_dtype`` (the last argument) that only the reference computes."""
    return "only the reference computes in float64" if args[-1] == torch.float64 else None


fp8_quantize_rows = kernel(
    "fp8_quantize_rows(Tensor x, bool pow2, float eps) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_rows,
    backends=("reference", "cpu", "triton", "cuda"),
)
fp8_quantize_tiles = kernel(
    "fp8_quantize_tiles(Tensor x, bool pow2, float eps) -> (Tensor, Tensor)", module=_MODULE, fake=_fake_tiles
)
fp8_quantize_dual_fwd = kernel(
    "fp8_quantize_dual_fwd(Tensor x, bool pow2, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_dual,
)
fp8_dequantize_fwd = kernel(
    "fp8_dequantize_fwd(Tensor q, Tensor scale, int block_rows, ScalarType out_dtype) -> Tensor",
    module=_MODULE,
    fake=_fake_dequantize,
    dtypes={b: (CODES,) for b in ("cpu", "triton")},
    when={b: only_standard_out for b in ("cpu", "triton")},
)


@op(
    module=_MODULE,
    kernels=("fp8_quantize_rows", "fp8_quantize_tiles"),
    not_repeated="views of its arguments and results",
)
def fp8_quantize(
    x: Tensor, *, block: Sequence[int] = (1, 128), scale_format: str = "fp32", eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Quantises blocks of ``x`` to e4m3 with one float32 dequantisation scale each: ``x ~= q * scale``.

    The rule, with the same bits on every backend: ``amax`` is taken over the block's finite elements;
    ``scale = 1`` if ``amax == 0``, else ``max(amax, eps) / 448`` correctly rounded, and with
    ``scale_format="pow2"`` rounded up to a power of two by its bits;
    ``q = round_to_nearest_even(clamp(x / scale, -448, 448))`` with a correctly rounded division. NaN becomes the
    code 0x7f in its own element only, infinities become +-448, -0 is kept, subnormals round to nearest even.

    Args:
        x: ``[..., K]``, or ``[..., M, K]`` for 128 x 128 blocks; float32, bfloat16 or float16 (float64 on the
            reference backend, rounded to float32 first). Any strides; a copy is made if the last dim is not
            contiguous. Any size, also 0; ragged edges behave as if padded with zeros.
        block: ``(1, 128)`` (activations: 128 along K for each row) or ``(128, 128)`` (weights; leading dims never
            share a block).
        scale_format: ``"fp32"``, or ``"pow2"`` for powers of two (what UE8M0 scales hold; 1 x 128 codes can then
            be regrouped without a second rounding).
        eps: lower bound of ``amax`` where it is not 0, rounded to float32; ``eps / 448`` must be a normal number.

    Returns:
        ``(q, scale)``: q ``float8_e4m3fn``, contiguous, of x's shape. scale float32, ``[..., ceil(K / 128)]`` for
        (1, 128), stored with rows (leading dims flattened) contiguous and ``round_up(rows, 4)`` elements between
        blocks, as TMA and cuBLASLt read it; ``[..., ceil(M / 128), ceil(K / 128)]`` contiguous for (128, 128).

    Not differentiable (``fp8_linear`` is). Deterministic and batch-invariant.

    Raises:
        ValueError: wrong block, scale_format, eps or number of dims.
        TypeError: x is not a float tensor.
        RuntimeError: x requires grad and grad mode is on.

    Example::

        q, scale = tilefuse.fp8_quantize(torch.randn(4, 7168, dtype=torch.bfloat16))

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3); zero blocks as Transformer Engine treats them.
    """
    rows = check_block("fp8_quantize", block)
    check_scale_options("fp8_quantize", scale_format, eps)
    check_input("fp8_quantize", "x", x, 1 if rows == 1 else 2)
    if rows == 1:
        q, scale = fp8_quantize_rows(as_rows(x), scale_format == "pow2", eps)
        return q.view(x.shape), split_rows(scale, x.shape[:-1])
    q, scale = fp8_quantize_tiles(as_batch(x), scale_format == "pow2", eps)
    return q.view(x.shape), scale.view(*x.shape[:-2], *scale.shape[1:])


@op(
    module=_MODULE,
    kernels=("fp8_quantize_dual_fwd",),
    not_repeated="views of its arguments and results",
)
def fp8_quantize_dual(
    x: Tensor, *, scale_format: str = "fp32", eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantises ``x`` along both of its directions with one read: what a linear layer's training step needs.

    The same as ``(*fp8_quantize(x), *fp8_quantize(x.flatten(0, -2).t()))`` to the bit. The second pair is the
    transposed operand of the weight gradient, whose 128-element blocks run along the tokens.

    Args:
        x: ``[..., K]``, leading dims flattened to M tokens; otherwise as in ``fp8_quantize``.
        scale_format, eps: as in ``fp8_quantize``.

    Returns:
        ``(q, scale, q_t, scale_t)``: q of x's shape and scale ``[..., ceil(K / 128)]`` as from ``fp8_quantize``;
        q_t ``[K, M]`` contiguous and scale_t ``[K, ceil(M / 128)]``, stored with K contiguous and ``round_up(K, 4)``
        elements between blocks.

    Not differentiable. Deterministic. Raises what ``fp8_quantize`` raises.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2); Transformer Engine quantises rows and columns in one read.
    """
    check_scale_options("fp8_quantize_dual", scale_format, eps)
    check_input("fp8_quantize_dual", "x", x)
    q, scale, q_t, scale_t = fp8_quantize_dual_fwd(as_rows(x), scale_format == "pow2", eps)
    return q.view(x.shape), split_rows(scale, x.shape[:-1]), q_t, scale_t


@op(
    module=_MODULE,
    kernels=("fp8_dequantize_fwd",),
    dtypes=(CODES,),
    not_repeated="views of its arguments and results",
)
def fp8_dequantize(
    q: Tensor, scale: Tensor, *, block: Sequence[int] = (1, 128), out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``q * scale`` of each block: the product is rounded to float32 and then to ``out_dtype``.

    Args:
        q: ``[..., K]`` or ``[..., M, K]`` float8_e4m3fn, any strides.
        scale: float32 dequantisation scales of any strides, ``[..., ceil(K / 128)]`` for block (1, 128),
            ``[..., ceil(M / 128), ceil(K / 128)]`` for (128, 128).
        block: ``(1, 128)`` or ``(128, 128)``.
        out_dtype: float32, bfloat16, float16, or float64 (reference backend; the product is then exact).

    Returns:
        A contiguous tensor of q's shape.

    Not differentiable. Deterministic and batch-invariant.

    Raises:
        ValueError: wrong block or shapes.
        TypeError: wrong dtypes.
        RuntimeError: scale requires grad and grad mode is on.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3); the inverse of ``fp8_quantize`` up to its rounding.
    """
    rows = check_block("fp8_dequantize", block)
    errors.check_dtype("fp8_dequantize", "q", q, (CODES,))
    if q.ndim < (1 if rows == 1 else 2):
        errors.value_error("fp8_dequantize", "q", "[..., K]" if rows == 1 else "[..., M, K]", q)
    lead = q.shape[:-1] if rows == 1 else (*q.shape[:-2], blocks_of(q.shape[-2]))
    check_scale("fp8_dequantize", "scale", scale, (*lead, blocks_of(q.shape[-1])), q, "q")
    if out_dtype not in errors.FLOATS:
        errors.type_error("fp8_dequantize", "out_dtype", " or ".join(map(errors.dtype_name, errors.FLOATS)), out_dtype)
    if rows == 1:
        flat, scales = as_rows(q).unsqueeze(0), scale.reshape(1, math.prod(scale.shape[:-1]), scale.shape[-1])
    else:
        flat, scales = as_batch(q), scale.reshape(math.prod(scale.shape[:-2]), *scale.shape[-2:])
    return fp8_dequantize_fwd(flat, scales, rows, out_dtype).view(q.shape)


def check_scale(name: str, arg: str, scale: Tensor, shape: Sequence[int], like: errors.Typed, like_arg: str) -> None:
    """A float32 scale of exactly this shape, on the device of its codes, that asks for no gradient."""
    if tuple(scale.shape) != tuple(shape):
        errors.value_error(name, arg, f"{[*shape]} float32", scale)
    if scale.dtype != torch.float32:
        errors.type_error(name, arg, f"{[*shape]} float32", scale)
    errors.check_device(name, arg, scale, like, like_arg)
    errors.check_not_differentiated(name, "scales get no gradient", **{arg: scale})
