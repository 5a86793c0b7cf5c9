"""Signatures of kernels for ahead-of-time compilation, from what their arguments are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

FLOATS = ("scale", "alpha", "limit")


def signature_of(
    fn: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], multiples: Iterable[str] = ()
) -> dict[str, Any]:
    """``signature``, ``constexprs`` and ``divisible`` of an ``AotCase``.

    Args:
        fn: the kernel. Arguments in `FLOATS` are float32; strides and `multiples` are integers that are multiples of
            16; known counts are plain integers; the rest are pointers.
        pointers: pointer -> element type; ``""`` names the others'.
        constants: value of each constant argument, None for a pointer that is absent.
        multiples: integer arguments that are multiples of 16, besides strides.
    """
    plain = {"tokens", "slots", "slot_programs", "chunks", "rows", "a_rows", "x_rows", "grad_rows", "tiles_m"}
    plain |= {"programs", "index_div", "top_k"}
    signature, divisible = {}, []
    for name in fn.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in plain:
            signature[name] = "i32"
        elif name.startswith("stride_") or name in multiples:
            signature[name] = "i32"
            divisible.append(name)
        else:
            signature[name] = "*" + pointers.get(name, pointers.get("", "i32"))
            divisible.append(name)
    return {"signature": signature, "constexprs": dict(constants), "divisible": tuple(divisible)}
