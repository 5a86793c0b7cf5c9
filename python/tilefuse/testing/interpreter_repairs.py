"""The repairs that ``interpreter.install()`` makes, one function each, and the table of what replaces what.

Importing this module needs Triton and ml_dtypes and changes nothing: `REPAIRS` is applied by ``apply()``.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import triton.runtime.interpreter as upstream

tl, ir, Handle, Builder = upstream.tl, upstream._ir, upstream.TensorHandle, upstream.InterpreterBuilder
_np_dtype = functools.cache(upstream._get_np_dtype)
_ADDRESS = np.dtype(np.uint64)

# the formats that numpy stores as integers: numpy type, largest finite value (None: overflows to inf), NaN bits
FORMATS = {
    tl.bfloat16: (np.dtype(ml_dtypes.bfloat16), None, 0x7FFF),
    tl.float8e4nv: (np.dtype(ml_dtypes.float8_e4m3fn), 448.0, 0x7F),
    tl.float8e5: (np.dtype(ml_dtypes.float8_e5m2), 57344.0, 0x7F),
    tl.float8e4b8: (np.dtype(ml_dtypes.float8_e4m3fnuz), 240.0, 0x80),
    tl.float8e5b16: (np.dtype(ml_dtypes.float8_e5m2fnuz), 57344.0, 0x80),
}


# Triton's own, to which a repair leaves the rest
_INIT_ARGS, _RESTORE_ARGS = upstream.GridExecutor._init_args_hst, upstream.GridExecutor._restore_args_dev
_PATCH_TENSOR, _PATCH_LANGUAGE = upstream._patch_lang_tensor, upstream._patch_lang
_LAUNCH = upstream.GridExecutor.__call__
_LOAD, _STORE = Builder.create_masked_load, Builder.create_masked_store
_RMW, _CAS = Builder.create_atomic_rmw, Builder.create_atomic_cas
_REDUCE = upstream.ReduceOps.apply_impl
_BY_INDEX = [
    getattr(tl.standard, f"_arg{which}_combine_tie_break_{how}") for which in ("min", "max") for how in ("left", "fast")
]


@dataclass(frozen=True)
class Repair:
    """Attributes of an object of Triton's, replaced; ``rows`` are those of the table in ``interpreter``'s docstring."""

    rows: tuple[str, ...]
    owner: Any
    replacements: dict[str, Any]


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


def _decode(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Stored form -> a numpy float or integer array; bf16 and fp8 widened to float32, exactly."""
    dtype = dtype.scalar
    if dtype not in FORMATS or data.dtype == np.bool_:
        if dtype == tl.float8e4b15:
            raise NotImplementedError("float8e4b15 is not supported by tilefuse's interpreter")
        return data
    return np.ascontiguousarray(data).view(FORMATS[dtype][0]).astype(np.float32)


def _encode(x: np.ndarray, dtype: Any, rounding: Any = None) -> np.ndarray:
    """Numbers -> stored form, rounded to nearest even once, or towards zero."""
    dtype = dtype.scalar
    x = np.asarray(x)
    to_zero = rounding == ir.ROUNDING_MODE.RTZ
    if dtype not in FORMATS:
        if dtype == tl.float8e4b15:
            raise NotImplementedError("float8e4b15 is not supported by tilefuse's interpreter")
        y = x.astype(_np_dtype(dtype), copy=False)
        if to_zero and dtype in (tl.float16, tl.float32):
            y = np.where(np.abs(y.astype(x.dtype)) > np.abs(x), np.nextafter(y, y.dtype.type(0)), y)
        return y
    if x.dtype.kind in "iub":
        x = _exact_float64(x)
    if x.dtype == np.float64:
        x = _odd_float32(x)
    x = np.asarray(x, np.float32)
    np_dtype, largest, nan_bits = FORMATS[dtype]
    nan = np.isnan(x)
    if largest is not None:
        x = np.clip(x, np.float32(-largest), np.float32(largest))
    stored = _np_dtype(dtype)
    y = np.ascontiguousarray(x.astype(np_dtype)).view(stored)
    if to_zero:
        larger = np.abs(y.view(np_dtype).astype(np.float32)) > np.abs(x)
        y = np.where(larger, y - stored.type(1), y)
    return np.where(nan, stored.type(nan_bits), y).astype(stored)


def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return _encode(_decode(data, source), target, rounding).reshape(data.shape)


def _to_int(x: np.ndarray, target: np.dtype) -> np.ndarray:
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
        x = _decode(source.data, source.dtype)
        np_dtype = _np_dtype(target)
        if x.dtype.kind == "f" and target not in FORMATS and np_dtype.kind in "iu":
            return Handle(_to_int(x, np_dtype), target)
        return Handle(_encode(x, target).reshape(source.data.shape), target)


def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    return Handle(convert_float(source.data, source.dtype.scalar, target.scalar, rounding), target.scalar)


def bf16_constant(self: Any, value: float) -> Any:
    return Handle(_encode(np.array([value], np.float64), tl.bfloat16), tl.bfloat16)


def _values(handles: tuple[Any, ...]) -> list[np.ndarray]:
    for handle in handles:
        if handle.dtype.scalar in FORMATS and handle.dtype.scalar != tl.bfloat16:
            raise NotImplementedError(f"arithmetic on {handle.dtype.scalar}: convert to a wider type first")
    return [_decode(h.data, h.dtype) for h in handles]


def arithmetic(compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
    def method(self: Any, *handles: Any) -> Any:
        dtype = handles[-1].dtype.scalar
        with np.errstate(all="ignore"):
            return Handle(_encode(compute(*_values(handles)), dtype), dtype)

    return method


def comparison(compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
    def method(self: Any, *handles: Any) -> Any:
        with np.errstate(all="ignore"):
            return Handle(np.asarray(compute(*_values(handles)), np.bool_), tl.int1)

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


def one_bit(name: str, compute: Callable[..., np.ndarray]) -> Callable[..., Any]:
    upstream_method = getattr(Builder, name)

    def method(self: Any, a: Any, b: Any) -> Any:
        if a.data.dtype == b.data.dtype == np.bool_:
            # one-bit integers wrap around
            return Handle((compute(a.data.astype(np.int8), b.data.astype(np.int8)) & 1).astype(np.bool_), tl.int1)
        return upstream_method(self, a, b)

    return method


def integer_comparison(name: str) -> Callable[..., Any]:
    upstream_method = getattr(Builder, name)

    def method(self: Any, a: Any, b: Any) -> Any:
        return Handle(upstream_method(self, a, b).data, tl.int1)

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


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    x, y = _decode(a.data, a.dtype), _decode(b.data, b.dtype)
    if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == b.dtype.scalar == tl.float32:
        # tensor cores read the upper 19 bits of a float32 operand
        x, y = ((np.ascontiguousarray(v).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (x, y))
    compute = d.data.dtype if d.data.dtype.kind in "iu" or d.data.dtype == np.float64 else np.dtype(np.float32)
    with np.errstate(all="ignore"):
        total = np.matmul(x.astype(compute), y.astype(compute)) + _decode(d.data, d.dtype).astype(compute)
        return Handle(_encode(total, d.dtype), d.dtype.scalar)


class _Memory:
    """What a launch may touch: [start, end) of its arguments' storages; None does not check."""

    def __init__(self) -> None:
        self.bounds: list[tuple[int, int]] | None = None

    def check(self, pointers: Any, mask: np.ndarray, what: str) -> None:
        if self.bounds is None:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # a scalar truth value that was spread over a block comes as int32
        mask = np.asarray(mask).astype(np.bool_, copy=False)
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
        addresses = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.uint64, copy=False)
        if addresses.size == 0:
            return
        low, high = int(addresses.min()), int(addresses.max()) + size
        if any(start <= low and high <= end for start, end in self.bounds):
            return
        inside = np.zeros(addresses.shape, np.bool_)
        for start, end in self.bounds:
            inside |= (addresses >= start) & (addresses <= max(start, end - size))
        if not inside.all():
            worst = int(addresses[~inside][0])
            start, end = min(self.bounds, key=lambda b: min(abs(worst - b[0]), abs(worst - b[1])), default=(0, 0))
            raise IndexError(
                f"{what} of {size} bytes outside every argument's memory in {int((~inside).sum())} of"
                f" {inside.size} active lanes: the first is at byte {worst - start} of a storage of {end - start} bytes"
            )


_memory = _Memory()


def _storages(value: Any) -> list[tuple[int, int]]:
    if isinstance(value, tuple):
        return [b for v in value for b in _storages(v)]
    if isinstance(value, upstream.TensorDescriptor):
        return _storages(value.base)
    if not hasattr(value, "data_ptr"):
        return []
    storage = upstream._unwrap_tensor(value).untyped_storage()
    return [(storage.data_ptr(), storage.data_ptr() + storage.nbytes())]


def _bounds(args: Any, kwargs: Any) -> list[tuple[int, int]]:
    return sorted({b for v in (*args, *kwargs.values()) for b in _storages(v)})


def init_args(self: Any, args: Any, kwargs: Any) -> Any:
    host_args, host_kwargs = _INIT_ARGS(self, args, kwargs)
    _memory.bounds = _bounds(host_args, host_kwargs)
    return host_args, host_kwargs


def restore_args(self: Any, args: Any, host_args: Any, kwargs: Any, host_kwargs: Any) -> None:
    # the same memory on the CPU, of which a copy would touch every page
    if _bounds(args, kwargs) != _bounds(host_args, host_kwargs):
        _RESTORE_ARGS(self, args, host_args, kwargs, host_kwargs)


def int_to_ptr(self: Any, source: Any, target: Any) -> Any:
    # a table of addresses: what they point to is not among the arguments
    _memory.bounds = None
    return self.create_bitcast(source, target)


def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
    _memory.check(pointers, mask.data, "load")
    if other is None:
        np_dtype = _np_dtype(pointers.get_element_ty())
        undefined = np.full((*pointers.data.shape, np_dtype.itemsize), 0xFF, np.uint8)
        if np_dtype == np.bool_:
            undefined[:] = 1
        other = Handle(undefined.view(np_dtype)[..., 0], pointers.get_element_ty())
    return _LOAD(self, pointers, mask, other, *rest, **options)


def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
    _memory.check(pointers, mask.data, "store")
    # reversed scans leave views with negative strides
    value = Handle(np.ascontiguousarray(value.data).reshape(value.data.shape), value.dtype)
    return _STORE(self, pointers, value, mask, *rest, **options)


def padded(method: Callable[..., Any], padding_of: Callable[..., Any], places: Callable[..., Any]) -> Any:
    """NaN padding of a block load, where numpy's NaN does not fit the stored integers."""

    def load(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = source.base.get_element_ty()
        if dtype not in FORMATS or padding_of(source, *args) != ir.PADDING_OPTION.PAD_NAN:
            return method(self, source, *args, **kwargs)
        pointers, mask = places(source, *args)
        mask = getattr(mask, "data", mask) if not isinstance(mask, np.ndarray) else mask
        _memory.check(pointers, mask, "load")
        fill = np.full(pointers.data.shape, FORMATS[dtype][2], _np_dtype(dtype))
        return Handle(upstream._interpreter.load(pointers.data, mask, fill, fill.dtype), dtype)

    return load


def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _memory.check(pointers, mask.data, "atomic")
    dtype = value.dtype.scalar
    if dtype not in FORMATS:
        return _RMW(self, op, pointers, value, mask, *rest)
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


def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
    _memory.check(pointers, np.ones((), np.bool_), "atomic")
    return _CAS(self, pointers, *rest)


def truth(self: Any) -> bool:
    # Triton's own code asks "is it given": a zero is given, too
    if sys._getframe(1).f_globals["__name__"] in ("triton.language.semantic", "triton.language.core"):
        return True
    if self.handle.data.size != 1:
        raise ValueError("the truth of a block is ambiguous: use & | ~ instead of and, or, not, if and a < b < c")
    return bool(self.handle.data)


def patch_tensor(tensor: Any, scope: Any) -> None:
    _PATCH_TENSOR(tensor, scope)
    scope.set_attr(tensor, "__bool__", truth)


class _Language:
    """Triton's functions while a launch runs, which upstream patches again in every function that a kernel calls."""

    # what is read of a kernel: the modules to patch that it knows
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def __init__(self) -> None:
        self.launching = self.patched = False
        self.patches: list[tuple[Any, str, Any]] | None = None

    def patch(self) -> Any:
        self.patched = True
        if self.patches is None:
            scope = _PATCH_LANGUAGE(self.everything)
            self.patches = [(owner, name, vars(owner)[name]) for owner, name, _ in scope._changes]
            return scope
        scope = upstream._LangPatchScope()
        for patch in self.patches:
            scope.set_attr(*patch)
        return scope


_language = _Language()


def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    _language.launching = True
    try:
        return _LAUNCH(self, *args, **kwargs)
    finally:
        _language.launching = _language.patched = False


def patch_language(fn: Any) -> Any:
    if not _language.launching:
        return _PATCH_LANGUAGE(fn)
    return upstream._LangPatchScope() if _language.patched else _language.patch()


def numpy_type(dtype: Any) -> Any:
    """As upstream, which makes its table of types for each call; types of pointers have no hash."""
    return _ADDRESS if dtype.scalar.is_ptr() else _np_dtype(dtype.scalar)


@functools.cache
def _shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(s) for s in shape])


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    """As upstream, which makes a type of the shape's own for each tensor."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(tuple(type.shape) if type.is_block() else ())


def widened(method: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions and scans that numpy does in one go: bf16 in float32, rounded once at the end."""

    def run(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        first = input[0] if isinstance(input, tuple) else input
        dtype = first.dtype.scalar
        if dtype not in FORMATS:
            with np.errstate(all="ignore"):
                return method(self, input, *args, **kwargs)
        (x,) = _values((first.handle,))
        result = method(self, self.to_tensor(x, tl.float32), *args, **kwargs)

        def narrow(t: Any) -> Any:
            if t.dtype.scalar != tl.float32:
                return t
            shape = t.handle.data.shape if t.type.is_block() else ()
            kind = tl.block_type(dtype, list(shape)) if shape else dtype
            return tl.core.tensor(Handle(_encode(t.handle.data, dtype), dtype), kind)

        return type(result)(narrow(t) for t in result) if isinstance(result, (tuple, list)) else narrow(result)

    return run


def reduce(self: Any, input: Any) -> Any:
    if self.combine_fn in _BY_INDEX and np.isnan(_decode(input[0].handle.data, input[0].dtype)).any():
        raise ValueError("argmax or argmin over NaN: a GPU's answer depends on the order of the reduction")
    return _REDUCE(self, input)


def _of(make: Callable[..., Any], computations: dict[str, Callable[..., np.ndarray]]) -> dict[str, Any]:
    return {f"create_{name}": make(compute) for name, compute in computations.items()}


def _wrapped(owner: Any, *names: str) -> dict[str, Any]:
    return {name: widened(getattr(owner, name)) for name in names}


def _padded_loads() -> dict[str, Any]:
    found = {
        "create_descriptor_load": padded(
            Builder.create_descriptor_load,
            lambda descriptor, *rest: descriptor.padding,
            lambda descriptor, indices, *rest: descriptor.materialize_pointers(indices),
        )
    }
    # Triton 3.9 has no block pointers any more
    if hasattr(Builder, "create_tensor_pointer_load"):
        found["create_tensor_pointer_load"] = padded(
            Builder.create_tensor_pointer_load,
            lambda pointer, check, padding, *rest: padding,
            lambda pointer, check, *rest: pointer.materialize_pointers(check),
        )
    return found


FLOATS = {
    "fadd": np.add,
    "fsub": np.subtract,
    "fmul": np.multiply,
    "fneg": np.negative,
    "fdiv": np.divide,
    "approx_divf": np.divide,
    "precise_divf": np.divide,
    "frem": np.fmod,
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
}
EXTREMES = {"minimumf": np.minimum, "maximumf": np.maximum, "minnumf": np.fmin, "maxnumf": np.fmax}
INTEGERS = {"create_add": np.add, "create_sub": np.subtract, "create_mul": np.multiply}
COMPARISONS = {
    "fcmpOLT": np.less,
    "fcmpOGT": np.greater,
    "fcmpOLE": np.less_equal,
    "fcmpOGE": np.greater_equal,
    "fcmpOEQ": np.equal,
    "fcmpONE": lambda a, b: (a < b) | (a > b),
    "fcmpULT": lambda a, b: ~(a >= b),
    "fcmpUGT": lambda a, b: ~(a <= b),
    "fcmpULE": lambda a, b: ~(a > b),
    "fcmpUGE": lambda a, b: ~(a < b),
    "fcmpUEQ": lambda a, b: ~((a < b) | (a > b)),
    "fcmpUNE": np.not_equal,
}

REPAIRS = (
    Repair(("float -> bf16, fp8",), upstream, {"_convert_float": convert_float}),
    Repair(("float -> bf16, fp8",), Builder, {"create_fp_to_fp": fp_to_fp, "get_bf16": bf16_constant}),
    Repair(("int -> bf16", "float -> int"), Builder, {"cast_impl": cast}),
    Repair(("tl.dot on bf16", "tl.dot on float32"), Builder, {"create_dot": dot}),
    Repair(("bf16 + - * / < == exp ...", "arithmetic on fp8"), Builder, _of(arithmetic, FLOATS)),
    Repair(("bf16 + - * / < == exp ...", "arithmetic on fp8"), Builder, _of(comparison, COMPARISONS)),
    Repair(("bf16 sum, max, cumsum",), upstream.ReduceOps, _wrapped(upstream.ReduceOps, "sum", "min_max")),
    Repair(("bf16 sum, max, cumsum",), upstream.ScanOps, _wrapped(upstream.ScanOps, "cumsum", "cumprod")),
    Repair(("tl.maximum, clamp",), Builder, {"create_clampf": clamp, **_of(arithmetic, EXTREMES)}),
    Repair(("bf16 atomic add",), Builder, {"create_atomic_rmw": atomic_rmw}),
    Repair(("argmax, argmin with NaN",), upstream.ReduceOps, {"apply_impl": reduce}),
    Repair(("masked load, no other", "access out of bounds"), Builder, {"create_masked_load": masked_load}),
    Repair(
        ("access out of bounds",),
        Builder,
        {"create_masked_store": masked_store, "create_atomic_cas": atomic_cas, "create_int_to_ptr": int_to_ptr},
    ),
    Repair(("access out of bounds",), upstream.GridExecutor, {"_init_args_hst": init_args}),
    Repair(("block load padded with NaN",), Builder, _padded_loads()),
    Repair(("and, if on a block",), upstream, {"_patch_lang_tensor": patch_tensor}),
    # the same results, several times as fast
    Repair((), upstream, {"_patch_lang": patch_language, "_get_np_dtype": numpy_type}),
    Repair((), tl.tensor, {"__init__": init_tensor}),
    Repair((), upstream.GridExecutor, {"__call__": launch, "_restore_args_dev": restore_args}),
    Repair(("int1 arithmetic",), Builder, {n: one_bit(n, compute) for n, compute in INTEGERS.items()}),
    Repair(
        ("int < == of scalars",),
        Builder,
        {name: integer_comparison(name) for name in dir(Builder) if name.startswith("create_icmp")},
    ),
    Repair(("histogram",), Builder, {"create_histogram": histogram}),
    Repair(("fma",), Builder, _of(arithmetic, {"fma": fma})),
    Repair(("signed >>, umulhi",), Builder, {"create_ashr": ashr, "create_umulhi": umulhi}),
)


def apply() -> None:
    for repair in REPAIRS:
        for name, replacement in repair.replacements.items():
            setattr(repair.owner, name, replacement)
