"""Writes the cases of the resource gate in few words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tilefuse import arch

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


def tiles(choose: Callable[[str], Any]) -> Iterator[tuple[Any, tuple[str, ...], str]]:
    """(tile, targets, suffix for a case's name) of each tile that ``choose(target)`` takes on some target."""
    found: list[tuple[Any, list[str]]] = []
    for target in arch.COMPILE_TARGETS:
        tile = choose(target)
        for known, targets in found:
            if known == tile:
                targets.append(target)
                break
        else:
            found.append((tile, [target]))
    for number, (tile, targets) in enumerate(found):
        yield tile, tuple(targets), f"_{targets[0]}" if number else ""


def case(
    name: str,
    fn: Any,
    pointers: Mapping[str, str | None],
    constants: Mapping[str, Any],
    *,
    floats: Iterable[str] = (),
    odd: Iterable[str] = (),
    **rest: Any,
) -> Any:
    """An ``AotCase`` whose signature follows from the kernel's argument names.

    Args:
        name, fn: of the case.
        pointers: argument -> element type (``"bf16"``), or None for an optional tensor that is not given.
        constants: constexpr arguments and compile options, as a launch mixes them.
        floats: float arguments. Every other argument is an integer.
        odd: integers not known to be multiples of 16. The others are strides (the arguments that the kernel lets
            Triton specialise).
        **rest: further fields of ``AotCase``.
    """
    from ...testing.aot import AotCase

    options = {key: value for key, value in constants.items() if key in OPTIONS}
    constexprs = {key: value for key, value in constants.items() if key not in OPTIONS}
    constexprs |= {key: None for key, kind in pointers.items() if kind is None}
    signature, divisible = {}, []
    plain = {p.name for p in fn.params if p.do_not_specialize}
    for arg in fn.arg_names:
        if arg in constexprs:
            signature[arg] = "constexpr"
        elif arg in pointers:
            signature[arg] = f"*{pointers[arg]}"
            divisible.append(arg)
        elif arg in floats:
            signature[arg] = "fp32"
        else:
            signature[arg] = "i32"
            if arg not in plain and arg not in odd:
                divisible.append(arg)
    return AotCase(name, fn, signature, constexprs, options, divisible=divisible, **rest)
