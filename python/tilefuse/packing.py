"""Packed weights: a matrix in the order in which the CPU kernels read it, made once at load.

The layout is that of ``csrc/common/panel_matmul.h``: strips of 16 rows of the weight, inside of a strip the elements of
each 2 (bfloat16) or 4 (e4m3) of K side by side for all 16 rows; rows past the last whole strip stay as they are. K is
padded to a multiple of 4. It is the same for every instruction set: each unpacks a strip into what it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import errors

__all__ = ["PackedWeight", "pack_weight"]

_STRIP = 16
_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# of the layout; a pickle of another one is refused
_VERSION = 1


@dataclass(frozen=True, repr=False, eq=False)
class PackedWeight:
    """A weight that ``pack_weight`` made, for the CPU. Ops take it wherever they take the weight.

    Attributes:
        data: ``[.., N, K' / 2, 2]`` with K' = K padded to a multiple of 4: the packed elements, whose order is the
            kernels' business.
        scale: the scales that were given with the weight, or None.
        in_features: K.
        version: of the layout.

    It pickles, deep-copies, crosses processes and is read by any number of threads. It is not a parameter: no
    ``state_dict`` holds it, and ``unpack`` gives back the checkpoint's bits.
    """

    data: Tensor
    scale: Tensor | None
    in_features: int
    version: int = _VERSION

    @property
    def shape(self) -> torch.Size:
        """``[.., N, K]``, the weight's."""
        return torch.Size((*self.data.shape[:-2], self.in_features))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def ndim(self) -> int:
        return self.data.ndim - 1

    def dim(self) -> int:
        return self.ndim

    @property
    def format(self) -> str:
        """``"bf16"`` or ``"fp8"``."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def unpack(self) -> Tensor:
        """The weight ``[.., N, K]`` with its own bits, contiguous."""
        return unpack_data(self.data, self.in_features)

    def __repr__(self) -> str:
        return f"PackedWeight({[*self.shape]} {errors.dtype_name(self.dtype)})"

    def __getstate__(self) -> dict[str, Any]:
        # bytes: pickle does not read e4m3 tensors back
        return self.__dict__ | {"data": self.data.view(torch.uint8), "format": self.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["version"] != _VERSION:
            raise ValueError(
                f"tilefuse.PackedWeight: a pack of layout {state['version']}, this version reads {_VERSION}: pack the "
                "checkpoint's weight again"
            )
        dtype = _DTYPES[state.pop("format")]
        self.__dict__.update(state | {"data": state["data"].view(dtype)})


# what an op takes as a weight
Weight = Tensor | PackedWeight


def check_weight_scale(
    name: str, arg: str, scale: Tensor | None, w: Weight, like: errors.Typed, like_arg: str
) -> Tensor:
    """Checks the scales of e4m3 codes ``w [.., N, K]``: of 128 x 128 or 1 x 128 blocks, told apart by shape."""
    *lead, n, k = w.shape
    tiles, rows = (*lead, -(-n // 128), -(-k // 128)), (*lead, n, -(-k // 128))
    expected = f"{[*tiles]} or {[*rows]} float32"
    # not `in`: torch.compile finds no tuple of symbolic sizes in another
    if scale is None or (tuple(scale.shape) != tiles and tuple(scale.shape) != rows):
        errors.value_error(name, arg, expected, scale)
    if scale.dtype != torch.float32:
        errors.type_error(name, arg, expected, scale)
    errors.check_device(name, arg, scale, like, like_arg)
    errors.check_not_differentiated(name, "scales get no gradient", **{arg: scale})
    return scale


def _strips(packed: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The whole strips of one packed weight and of its matrix ``[N, K']``, as views of one shape."""
    n, k = matrix.shape
    whole = n // _STRIP
    flat, rows = packed.view(-1)[: whole * _STRIP * k], matrix[: whole * _STRIP]
    if packed.element_size() == 2:
        return flat.view(whole, k // 2, _STRIP, 2), rows.view(whole, _STRIP, k // 2, 2).transpose(1, 2)
    # [strip][4 of K][4 rows][pair][row][element of the pair]
    order = rows.view(whole, 4, 4, k // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return flat.view(order.shape), order


def _rest(packed: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The rows past the last whole strip, likewise."""
    n, k = matrix.shape
    first = n // _STRIP * _STRIP
    return packed.view(-1)[first * k :].view(n - first, k), matrix[first:]


def pack_weight(w: Tensor, scale: Tensor | None = None, *, format: str = "bf16") -> PackedWeight:
    """Packs a weight for the CPU kernels, which then only stream it: the result has the same bits, sooner.

    Args:
        w: ``[N, K]`` or ``[E, N, K]``, bfloat16 (``format="bf16"``) or float8_e4m3fn (``"fp8"``), on the CPU, any
            strides: a transposed view packs into the same form. Any sizes, also 0.
        scale: float32 block scales of e4m3 codes, ``[.., ceil(N / 128), ceil(K / 128)]`` or ``[.., N, ceil(K / 128)]``,
            as ``fp8_quantize`` makes them; kept as they are. None with bfloat16.
        format: ``"bf16"`` or ``"fp8"``.

    Returns:
        A ``PackedWeight`` as large as w (but for the padding of K). Beside it one matrix of w at most is held at a
        time.

    ``fp8_matmul``, ``fp8_grouped_matmul``, ``fp8_linear``, ``grouped_matmul``, ``moe_experts`` and ``moe_experts_fp8``
    take it in place of the weight, on the CPU and without gradients. Deterministic.

    Raises:
        ValueError: a wrong shape, device or format.
        TypeError: a dtype that is not the format's.
        RuntimeError: w or scale requires grad and grad mode is on.

    Example::

        w = tilefuse.pack_weight(w_gate_up)
        out = tilefuse.moe_experts(x, w, tilefuse.pack_weight(w_down), weights, ids)
    """
    name = "pack_weight"
    if format not in _DTYPES:
        errors.value_error(name, "format", f"one of {', '.join(_DTYPES)}", format)
    if w.ndim not in (2, 3):
        errors.value_error(name, "w", "[N, K] or [E, N, K]", w)
    if w.dtype != _DTYPES[format]:
        errors.type_error(name, "w", f"{errors.dtype_name(_DTYPES[format])} with format {format!r}", w)
    if w.device.type != "cpu":
        raise ValueError(f"tilefuse.{name}: w must be on the CPU, whose kernels read packed weights, got {w.device}")
    errors.check_not_differentiated(name, "packed weights are for inference", w=w)
    if format == "bf16" and scale is not None:
        errors.value_error(name, "scale", "None with format 'bf16'", scale)
    if format == "fp8":
        check_weight_scale(name, "scale", scale, w, w, "w")
    return PackedWeight(pack_data(w.detach()), scale, w.shape[-1])


def _bits(t: Tensor) -> Tensor:
    # bytes: not every operation takes e4m3
    return t.view(torch.uint8 if t.element_size() == 1 else torch.int16)


def pack_data(w: Tensor, into: Tensor | None = None) -> Tensor:
    """The data of a packed weight, of ``w [.., N, K]`` or ``[E, P, N / P, K]``: rows in P parts of any strides.

    ``into``: where to, contiguous. It may be w's own memory if that holds one matrix after the other, K padded.
    """
    k = w.shape[-1]
    lead, n = (w.shape[:1], w.shape[1] * w.shape[2]) if w.ndim == 4 else (w.shape[:-2], w.shape[-2])
    padded = -(-k // 4) * 4
    shape = (*lead, n, padded // 2, 2)
    data = torch.empty(shape, dtype=w.dtype, device="cpu") if into is None else into.view(shape)
    count = lead[0] if lead else 1
    matrices = _bits(w) if lead else _bits(w)[None]
    whole = matrices.new_zeros(n, padded)
    part = whole.view(*matrices.shape[1:-1], padded)[..., :k]
    for packed, matrix in zip(_bits(data).view(count, n, padded // 2, 2), matrices):
        part.copy_(matrix)
        for to, source in (_strips(packed, whole), _rest(packed, whole)):
            to.copy_(source)
    return data


def unpack_into(w: Tensor, data: Tensor) -> None:
    """The inverse of ``pack_data``: writes a packed weight's elements to ``w``, of any strides."""
    n, pairs, _ = data.shape[-3:]
    count = data.shape[0] if data.ndim == 4 else 1
    matrices = _bits(w) if data.ndim == 4 else _bits(w)[None]
    whole = matrices.new_empty(n, 2 * pairs)
    part = whole.view(*matrices.shape[1:-1], 2 * pairs)[..., : w.shape[-1]]
    for packed, matrix in zip(_bits(data).view(count, n, pairs, 2), matrices):
        for source, to in (_strips(packed, whole), _rest(packed, whole)):
            to.copy_(source)
        matrix.copy_(part)


def unpack_data(data: Tensor, k: int) -> Tensor:
    """The weight ``[.., N, K]`` of a packed weight's data."""
    w = data.new_empty(*data.shape[:-2], k)
    unpack_into(w, data)
    return w


def operand(w: Weight) -> Tensor:
    """What a kernel op takes: a packed weight's data, or a weight with a contiguous last dim."""
    return w.data if isinstance(w, PackedWeight) else errors.check_last_dim_contiguous(w)


def plain(w: Tensor, dims: int, k: int) -> Tensor:
    """A kernel op's weight of ``dims`` dims and K elements a row, unpacked where it is a packed weight's data."""
    return w if w.ndim == dims else unpack_data(w, k)


def refuse_packed(w: Tensor, dims: int) -> str | None:
    """For backends that read weights as they lie."""
    return None if w.ndim == dims else "packed weights are for the CPU"


def check_inference(op: str, read: tuple[Weight, ...], /, **tensors: Tensor | None) -> None:
    """Raises where a gradient would have to pass a packed weight."""
    if any(isinstance(w, PackedWeight) for w in read):
        errors.check_not_differentiated(op, "packed weights are for inference", **tensors)
