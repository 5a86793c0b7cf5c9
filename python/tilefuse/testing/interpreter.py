"""Makes Triton's CPU interpreter (``TRITON_INTERPRET=1``) compute what an NVIDIA GPU computes.

Triton stores bfloat16 and FP8 as unsigned integers in its interpreter, and several operations then work on those
integers. ``install()`` replaces them; everything else stays Triton's. What differs from upstream (3.6 to 3.9;
later versions have some of it):

==========================  ==================================================  ========================================
operation                   upstream                                            here
==========================  ==================================================  ========================================
float -> bf16, fp8          no carry into the exponent, no saturation,          round to nearest even, once, from any
                            truncated subnormals                                source; ``rtz`` truncates
int -> bf16                 integer stored as bits                              round to nearest even, once
``tl.dot`` on bf16          product of the bit patterns                         float32 product and sum
``tl.dot`` on float32       exact whatever ``input_precision`` says             operands cut to TF32 for ``"tf32"``
bf16 + - * / fma < == ...   on the bit patterns                                 in float32, rounded to bf16
bf16 sum, max, cumsum       on the bit patterns                                 in float32, rounded to bf16
``tl.maximum``, ``clamp``   NaN wins                                            as ``propagate_nan`` says
float -> int                undefined out of range                              saturates, NaN gives 0
bf16 atomic add             integer add                                         float32 add, rounded to bf16
arithmetic on fp8           on the bit patterns                                 NotImplementedError: convert first
argmax, argmin with NaN     first NaN                                           ValueError: a GPU's answer depends on
                                                                                the order of the reduction
masked load, no ``other``   zero                                                all bits set (NaN, -1, True): a GPU
                                                                                promises nothing
access out of bounds        reads or writes whatever is there                   IndexError
``and``, ``if`` on a block  always true                                         ValueError
int1 arithmetic             saturates                                           wraps around
histogram                   counts ``bins`` in the last bin                     ignores it
``fma``                     two roundings                                       one
==========================  ==================================================  ========================================

Conversion to FP8 saturates as Triton's code for sm_90 and later does (``cvt.rn.satfinite.e4m3x2.f32`` and
``.e5m2x2.f32``, read from the PTX of Triton 3.7): values beyond the largest finite one, infinities included, become
+-448 (e4m3) or +-57344 (e5m2), NaN becomes 0x7F whatever its sign, -0 is kept, subnormals round to nearest even.
On sm_89 the same Triton code goes through float16 with truncation (``cvt.rz.f16.f32``) and may differ in the last
place; that path is not modelled.

Not modelled: approximate division and special functions (exact here, within a few units in the last place on a GPU),
the order of sums, the 14-bit accumulator of Hopper's FP8 tensor cores (``max_num_imprecise_acc``), races.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_installed = False


def install() -> None:
    """Repairs the interpreter of this process. Safe to call more than once.

    Raises:
        ImportError: Triton or ml_dtypes is missing.
    """
    global _installed
    if _installed:
        return
    try:
        import ml_dtypes  # noqa: F401
        import triton.runtime.interpreter as upstream
    except ImportError as error:
        raise ImportError(
            f"tilefuse.testing.interpreter needs triton and ml_dtypes (pip install triton ml_dtypes): {error}"
        ) from error
    _repair(upstream)
    _installed = True


def _odd_float32(x: np.ndarray) -> np.ndarray:
    """float64 -> float32, rounded to odd: rounding the result once more, to fewer bits, is then correct."""
    y = x.astype(np.float32)
    inexact = (y != x) & np.isfinite(x)
    if not inexact.any():
        return y
    y = np.where(inexact & (np.abs(y.astype(np.float64)) > np.abs(x)), np.nextafter(y, np.float32(0)), y)
    bits = y.view(np.uint32)
    return np.where(inexact, bits | 1, bits).astype(np.uint32).view(np.float32)


def _exact_float64(x: np.ndarray) -> np.ndarray:
    """Integers -> float64, rounded to odd where they have more than 53 bits."""
    if x.dtype.itemsize == 8:
        wide = (x > 2**53) if x.dtype.kind == "u" else (x > 2**53) | (x < -(2**53))
        sticky = ((x & x.dtype.type(0x7FF)) != 0).astype(x.dtype) << x.dtype.type(11)
        x = np.where(wide, (x >> x.dtype.type(11) << x.dtype.type(11)) | sticky, x)
    return x.astype(np.float64)


def _repair(upstream: Any) -> None:
    import ml_dtypes

    tl, ir, Handle = upstream.tl, upstream._ir, upstream.TensorHandle
    Builder = upstream.InterpreterBuilder
    get_np_dtype = functools.cache(upstream._get_np_dtype)

    # the formats that numpy stores as integers: numpy type, largest finite value (None: overflows to inf), NaN bits
    formats = {
        tl.bfloat16: (np.dtype(ml_dtypes.bfloat16), None, 0x7FFF),
        tl.float8e4nv: (np.dtype(ml_dtypes.float8_e4m3fn), 448.0, 0x7F),
        tl.float8e5: (np.dtype(ml_dtypes.float8_e5m2), 57344.0, 0x7F),
        tl.float8e4b8: (np.dtype(ml_dtypes.float8_e4m3fnuz), 240.0, 0x80),
        tl.float8e5b16: (np.dtype(ml_dtypes.float8_e5m2fnuz), 57344.0, 0x80),
    }

    def decode(data: np.ndarray, dtype: Any) -> np.ndarray:
        """Stored form -> a numpy float or integer array; bf16 and fp8 widened to float32, exactly."""
        dtype = dtype.scalar
        if dtype not in formats or data.dtype == np.bool_:
            if dtype == tl.float8e4b15:
                raise NotImplementedError("float8e4b15 is not supported by tilefuse's interpreter")
            return data
        return np.ascontiguousarray(data).view(formats[dtype][0]).astype(np.float32)

    def encode(x: np.ndarray, dtype: Any, rounding: Any = None) -> np.ndarray:
        """Numbers -> stored form, rounded to nearest even once, or towards zero."""
        dtype = dtype.scalar
        x = np.asarray(x)
        to_zero = rounding == ir.ROUNDING_MODE.RTZ
        if dtype not in formats:
            if dtype == tl.float8e4b15:
                raise NotImplementedError("float8e4b15 is not supported by tilefuse's interpreter")
            y = x.astype(get_np_dtype(dtype), copy=False)
            if to_zero and dtype in (tl.float16, tl.float32):
                y = np.where(np.abs(y.astype(x.dtype)) > np.abs(x), np.nextafter(y, y.dtype.type(0)), y)
            return y
        if x.dtype.kind in "iub":
            x = _exact_float64(x)
        if x.dtype == np.float64:
            x = _odd_float32(x)
        x = np.asarray(x, np.float32)
        np_dtype, largest, nan_bits = formats[dtype]
        nan = np.isnan(x)
        if largest is not None:
            x = np.clip(x, np.float32(-largest), np.float32(largest))
        stored = get_np_dtype(dtype)
        y = np.ascontiguousarray(x.astype(np_dtype)).view(stored)
        if to_zero:
            larger = np.abs(y.view(np_dtype).astype(np.float32)) > np.abs(x)
            y = np.where(larger, y - stored.type(1), y)
        return np.where(nan, stored.type(nan_bits), y).astype(stored)

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        with np.errstate(all="ignore"):
            return encode(decode(data, source), target, rounding).reshape(data.shape)

    def to_int(x: np.ndarray, target: np.dtype) -> np.ndarray:
        """cvt.rzi: saturates at 16, 32 or 64 bits and NaN is 0; 8-bit targets are the low bits of the 16-bit result."""
        via = np.dtype(f"{target.kind}2") if target.itemsize == 1 else target
        info = np.iinfo(via)
        x = np.where(np.isnan(x), 0, np.trunc(x)).astype(np.float64)
        # float(info.max) may round up to a power of two
        over, under = x >= float(info.max), x <= float(info.min)
        y = np.where(over | under, 0, x).astype(via)
        y = np.where(over, via.type(info.max), np.where(under, via.type(info.min), y))
        return y.astype(target)

    def cast(self: Any, source: Any, target: Any) -> Any:
        target = target.scalar
        with np.errstate(all="ignore"):
            x = decode(source.data, source.dtype)
            np_dtype = get_np_dtype(target)
            if x.dtype.kind == "f" and target not in formats and np_dtype.kind in "iu":
                return Handle(to_int(x, np_dtype), target)
            return Handle(encode(x, target).reshape(source.data.shape), target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return Handle(convert_float(source.data, source.dtype.scalar, target.scalar, rounding), target.scalar)

    def values(handles: tuple[Any, ...]) -> list[np.ndarray]:
        for handle in handles:
            if handle.dtype.scalar in formats and handle.dtype.scalar != tl.bfloat16:
                raise NotImplementedError(f"arithmetic on {handle.dtype.scalar}: convert to a wider type first")
        return [decode(h.data, h.dtype) for h in handles]

    def arithmetic(compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
        def method(self: Any, *handles: Any) -> Any:
            dtype = handles[-1].dtype.scalar
            with np.errstate(all="ignore"):
                return Handle(encode(compute(*values(handles)), dtype), dtype)

        return method

    def comparison(compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
        def method(self: Any, *handles: Any) -> Any:
            with np.errstate(all="ignore"):
                return Handle(np.asarray(compute(*values(handles)), np.bool_), tl.int1)

        return method

    def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        if x.dtype == np.float64:
            return x * y + z
        # the product is exact in float64; the sum is rounded to odd there, so that rounding it again is right
        product, z = np.broadcast_arrays(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64))
        total = product + z
        part = total - product
        lost = (product - (total - part)) + (z - part)
        even = (total.view(np.int64) & 1) == 0
        nudge = (lost != 0) & even & np.isfinite(total) & np.isfinite(lost)
        return np.where(nudge, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)

    def integers(compute: Callable[..., np.ndarray], upstream_method: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, a: Any, b: Any) -> Any:
            if a.data.dtype == b.data.dtype == np.bool_:
                # one-bit integers wrap around
                return Handle((compute(a.data.astype(np.int8), b.data.astype(np.int8)) & 1).astype(np.bool_), tl.int1)
            return upstream_method(self, a, b)

        return method

    def ashr(self: Any, a: Any, b: Any) -> Any:
        signed = np.dtype(f"i{a.data.dtype.itemsize}")
        return Handle((a.data.view(signed) >> b.data.astype(signed)).view(a.data.dtype), a.dtype.scalar)

    def umulhi(self: Any, a: Any, b: Any) -> Any:
        bits = 8 * a.data.dtype.itemsize
        x, y = np.broadcast_arrays(*(h.data.view(f"u{bits // 8}").astype(object) for h in (a, b)))
        return Handle(((x * y) >> bits).astype(f"u{bits // 8}").view(a.data.dtype), a.dtype.scalar)

    def histogram(self: Any, data: Any, bins: int, mask: Any) -> Any:
        valid = (data.data >= 0) & (data.data < bins)
        if mask is not None:
            valid &= mask.data
        counts = np.bincount(data.data[valid].astype(np.int64), minlength=bins)
        return Handle(counts.astype(np.int32), tl.int32)

    def clamp(self: Any, x: Any, low: Any, high: Any, propagate: Any) -> Any:
        keep = propagate == ir.PROPAGATE_NAN.ALL
        largest, smallest = (np.maximum, np.minimum) if keep else (np.fmax, np.fmin)
        return arithmetic(lambda a, b, c: smallest(largest(a, b), c))(self, x, low, high)

    for name, compute in {
        "fadd": np.add,
        "fsub": np.subtract,
        "fmul": np.multiply,
        "fneg": np.negative,
        "fdiv": np.divide,
        "approx_divf": np.divide,
        "precise_divf": np.divide,
        "frem": np.fmod,
        "minimumf": np.minimum,
        "maximumf": np.maximum,
        "minnumf": np.fmin,
        "maxnumf": np.fmax,
        "fma": fma,
        "cos": np.cos,
        "sin": np.sin,
        "exp": np.exp,
        "exp2": np.exp2,
        "log": np.log,
        "log2": np.log2,
        "sqrt": np.sqrt,
        "precise_sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "floor": np.floor,
        "ceil": np.ceil,
    }.items():
        setattr(Builder, f"create_{name}", arithmetic(compute))
    Builder.create_clampf = clamp
    for name, compute in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        setattr(Builder, f"create_{name}", integers(compute, getattr(Builder, f"create_{name}")))
    Builder.create_ashr = ashr
    Builder.create_umulhi = umulhi
    Builder.create_histogram = histogram

    for name, compute in {
        "OLT": np.less,
        "OGT": np.greater,
        "OLE": np.less_equal,
        "OGE": np.greater_equal,
        "OEQ": np.equal,
        "ONE": lambda a, b: (a < b) | (a > b),
        "ULT": lambda a, b: ~(a >= b),
        "UGT": lambda a, b: ~(a <= b),
        "ULE": lambda a, b: ~(a > b),
        "UGE": lambda a, b: ~(a < b),
        "UEQ": lambda a, b: ~((a < b) | (a > b)),
        "UNE": np.not_equal,
    }.items():
        setattr(Builder, f"create_fcmp{name}", comparison(compute))

    upstream._convert_float = convert_float
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = fp_to_fp
    Builder.get_bf16 = lambda self, value: Handle(encode(np.array([value], np.float64), tl.bfloat16), tl.bfloat16)

    tf32 = ir.INPUT_PRECISION.TF32

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = decode(a.data, a.dtype), decode(b.data, b.dtype)
        if input_precision == tf32 and a.dtype.scalar == b.dtype.scalar == tl.float32:
            # tensor cores read the upper 19 bits of a float32 operand
            x, y = ((np.ascontiguousarray(v).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (x, y))
        compute = d.data.dtype if d.data.dtype.kind in "iu" or d.data.dtype == np.float64 else np.dtype(np.float32)
        with np.errstate(all="ignore"):
            total = np.matmul(x.astype(compute), y.astype(compute)) + decode(d.data, d.dtype).astype(compute)
            return Handle(encode(total, d.dtype), d.dtype.scalar)

    Builder.create_dot = dot

    # memory that a launch may touch: [start, end) of its arguments' storages; None does not check
    bounds: list[tuple[int, int]] | None = None

    def check_bounds(pointers: Any, mask: np.ndarray, what: str) -> None:
        if bounds is None:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # a scalar truth value that was spread over a block comes as int32
        mask = np.asarray(mask).astype(np.bool_, copy=False)
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
        addresses = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.uint64, copy=False)
        if addresses.size == 0:
            return
        low, high = int(addresses.min()), int(addresses.max()) + size
        if any(start <= low and high <= end for start, end in bounds):
            return
        inside = np.zeros(addresses.shape, np.bool_)
        for start, end in bounds:
            inside |= (addresses >= start) & (addresses <= max(start, end - size))
        if not inside.all():
            worst = int(addresses[~inside][0])
            start, end = min(bounds, key=lambda b: min(abs(worst - b[0]), abs(worst - b[1])), default=(0, 0))
            raise IndexError(
                f"{what} of {size} bytes outside every argument's memory in {int((~inside).sum())} of"
                f" {inside.size} active lanes: the first is at byte {worst - start} of a storage of {end - start} bytes"
            )

    def storages(value: Any) -> list[tuple[int, int]]:
        if isinstance(value, tuple):
            return [b for v in value for b in storages(v)]
        if isinstance(value, upstream.TensorDescriptor):
            return storages(value.base)
        if not hasattr(value, "data_ptr"):
            return []
        storage = upstream._unwrap_tensor(value).untyped_storage()
        return [(storage.data_ptr(), storage.data_ptr() + storage.nbytes())]

    init_args = upstream.GridExecutor._init_args_hst

    def init_args_and_bounds(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal bounds
        host_args, host_kwargs = init_args(self, args, kwargs)
        bounds = sorted({b for v in (*host_args, *host_kwargs.values()) for b in storages(v)})
        return host_args, host_kwargs

    upstream.GridExecutor._init_args_hst = init_args_and_bounds

    def int_to_ptr(self: Any, source: Any, target: Any) -> Any:
        nonlocal bounds
        # a table of addresses: what they point to is not among the arguments
        bounds = None
        return self.create_bitcast(source, target)

    Builder.create_int_to_ptr = int_to_ptr
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        check_bounds(pointers, mask.data, "load")
        if other is None:
            np_dtype = get_np_dtype(pointers.get_element_ty())
            undefined = np.full((*pointers.data.shape, np_dtype.itemsize), 0xFF, np.uint8)
            if np_dtype == np.bool_:
                undefined[:] = 1
            other = Handle(undefined.view(np_dtype)[..., 0], pointers.get_element_ty())
        return load(self, pointers, mask, other, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check_bounds(pointers, mask.data, "store")
        # reversed scans leave views with negative strides
        value = Handle(np.ascontiguousarray(value.data).reshape(value.data.shape), value.dtype)
        return store(self, pointers, value, mask, *rest, **options)

    Builder.create_masked_load = masked_load
    Builder.create_masked_store = masked_store

    pad_nan = ir.PADDING_OPTION.PAD_NAN

    def padded(method: Callable[..., Any], padding_of: Callable[..., Any], places: Callable[..., Any]) -> Any:
        """NaN padding of a block load, where numpy's NaN does not fit the stored integers."""

        def load(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = source.base.get_element_ty()
            if dtype not in formats or padding_of(source, *args) != pad_nan:
                return method(self, source, *args, **kwargs)
            pointers, mask = places(source, *args)
            mask = getattr(mask, "data", mask) if not isinstance(mask, np.ndarray) else mask
            check_bounds(pointers, mask, "load")
            fill = np.full(pointers.data.shape, formats[dtype][2], get_np_dtype(dtype))
            return Handle(upstream._interpreter.load(pointers.data, mask, fill, fill.dtype), dtype)

        return load

    if hasattr(Builder, "create_tensor_pointer_load"):  # Triton 3.9 has no block pointers any more
        Builder.create_tensor_pointer_load = padded(
            Builder.create_tensor_pointer_load,
            lambda pointer, check, padding, *rest: padding,
            lambda pointer, check, *rest: pointer.materialize_pointers(check),
        )
    Builder.create_descriptor_load = padded(
        Builder.create_descriptor_load,
        lambda descriptor, *rest: descriptor.padding,
        lambda descriptor, indices, *rest: descriptor.materialize_pointers(indices),
    )

    rmw = Builder.create_atomic_rmw

    def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check_bounds(pointers, mask.data, "atomic")
        dtype = value.dtype.scalar
        if dtype not in formats:
            return rmw(self, op, pointers, value, mask, *rest)
        if dtype != tl.bfloat16 or op != ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"atomic {op} on {dtype}")
        old = np.zeros(pointers.data.shape, np.uint16)
        active = np.broadcast_to(mask.data, pointers.data.shape)
        one, true = np.zeros(1, np.uint16), np.ones(1, np.bool_)
        # one element after the other: the same address may come twice
        for i in np.ndindex(pointers.data.shape):
            if active[i]:
                address = np.array([pointers.data[i]], np.uint64)
                before = Handle(upstream._interpreter.load(address, true, one, one.dtype), dtype)
                after = self.create_fadd(before, Handle(np.array([value.data[i]], np.uint16), dtype))
                upstream._interpreter.store(address, after.data, true)
                old[i] = before.data[0]
        return Handle(old, dtype)

    Builder.create_atomic_rmw = atomic_rmw
    cas = Builder.create_atomic_cas

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        check_bounds(pointers, np.ones((), np.bool_), "atomic")
        return cas(self, pointers, *rest)

    Builder.create_atomic_cas = atomic_cas

    patch_tensor = upstream._patch_lang_tensor

    def truth(self: Any) -> bool:
        # Triton's own code asks "is it given": a zero is given, too
        if sys._getframe(1).f_globals["__name__"] in ("triton.language.semantic", "triton.language.core"):
            return True
        if self.handle.data.size != 1:
            raise ValueError("the truth of a block is ambiguous: use & | ~ instead of and, or, not, if and a < b < c")
        return bool(self.handle.data)

    def patch_tensor_strictly(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__bool__", truth)

    upstream._patch_lang_tensor = patch_tensor_strictly

    def widened(cls: Any, name: str) -> None:
        """Reductions and scans that numpy does in one go: bf16 in float32, rounded once at the end."""
        method = getattr(cls, name)

        def run(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            first = input[0] if isinstance(input, tuple) else input
            dtype = first.dtype.scalar
            if dtype not in formats:
                with np.errstate(all="ignore"):
                    return method(self, input, *args, **kwargs)
            (x,) = values((first.handle,))
            result = method(self, self.to_tensor(x, tl.float32), *args, **kwargs)

            def narrow(t: Any) -> Any:
                if t.dtype.scalar != tl.float32:
                    return t
                shape = t.handle.data.shape if t.type.is_block() else ()
                kind = tl.block_type(dtype, list(shape)) if shape else dtype
                return tl.core.tensor(Handle(encode(t.handle.data, dtype), dtype), kind)

            return type(result)(narrow(t) for t in result) if isinstance(result, (tuple, list)) else narrow(result)

        setattr(cls, name, run)

    by_index = [
        getattr(tl.standard, f"_arg{which}_combine_tie_break_{how}")
        for which in ("min", "max")
        for how in ("left", "fast")
    ]
    apply_impl = upstream.ReduceOps.apply_impl

    def reduce(self: Any, input: Any) -> Any:
        if self.combine_fn in by_index and np.isnan(decode(input[0].handle.data, input[0].dtype)).any():
            raise ValueError("argmax or argmin over NaN: a GPU's answer depends on the order of the reduction")
        return apply_impl(self, input)

    upstream.ReduceOps.apply_impl = reduce
    widened(upstream.ReduceOps, "sum")
    widened(upstream.ReduceOps, "min_max")
    widened(upstream.ScanOps, "cumsum")
    widened(upstream.ScanOps, "cumprod")
