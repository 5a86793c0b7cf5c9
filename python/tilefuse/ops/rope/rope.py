"""Rotary position embedding: ``rope``, ``rope_qk`` and their in-place forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import errors
from ...library import gradient_of, kernel, op
from ...overlap import check_in_place

__all__ = ["rope", "rope_", "rope_qk", "rope_qk_"]

_MODULE = "rope/rope"
_TABLES = "Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens"
_OPTIONS = "bool interleaved, int rotary_offset, bool conjugate, int[]? mrope_section, bool mrope_interleaved"


def check_rope(
    name: str,
    arg: str,
    x: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    rotary_offset: int,
    mrope_section: Sequence[int] | None = None,
) -> None:
    """The argument checks of every op of this family, for the public function and the fake alike."""
    # every eager call passes here: sizes are compared one by one, because a slice of a shape costs 0.2 us
    shape = x.shape
    rank = len(shape)
    if rank != 3 and rank != 4:
        errors.value_error(name, arg, "[B, S, H, D] or [T, H, D]", x)
    dtype, device, dim = x.dtype, x.device, shape[-1]
    if dtype not in errors.FLOATS:
        errors.check_dtype(name, arg, x, errors.FLOATS)
    if k is not None:
        k_shape = k.shape
        same = len(k_shape) == rank and k_shape[0] == shape[0] and k_shape[-1] == dim
        if not same or (rank == 4 and k_shape[1] != shape[1]):
            errors.value_error(name, "k", f"of {arg}'s shape but for the number of heads, {[*shape]}", k)
        if k.dtype != dtype:
            errors.type_error(name, "k", f"of {arg}'s dtype {errors.dtype_name(dtype)}", k)
        if k.device != device:
            errors.check_device(name, "k", k, x, arg)
    table = cos.shape
    if len(table) != 2 or table[1] == 0:
        errors.value_error(name, "cos", "[P, rotary_dim / 2] float32", cos)
    if cos.dtype != torch.float32:
        errors.type_error(name, "cos", "[P, rotary_dim / 2] float32", cos)
    if sin.shape != table:
        errors.value_error(name, "sin", f"of cos's shape {[*table]}", sin)
    if sin.dtype != torch.float32:
        errors.type_error(name, "sin", "[P, rotary_dim / 2] float32", sin)
    rotary_dim = 2 * table[1]
    if rotary_offset < 0 or rotary_offset + rotary_dim > dim:
        errors.value_error(
            name, "rotary_offset", f"in [0, D - rotary_dim] with D = {dim}, rotary_dim = {rotary_dim}", rotary_offset
        )
    if table[0] == 0 and shape[:-2].numel():
        # a GPU clamps positions to the table's rows, so there must be one
        errors.value_error(name, "cos", "a table of at least one row", cos)
    if cos.device != device or sin.device != device:
        errors.check_device(name, "cos", cos, x, arg)
        errors.check_device(name, "sin", sin, x, arg)
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        errors.check_not_differentiated(name, "tables get no gradient", cos=cos, sin=sin)
    if positions is not None:
        if cu_seqlens is not None:
            errors.value_error(name, "cu_seqlens", "None when positions is given", cu_seqlens)
        where = positions.shape
        if mrope_section:
            same = where == (3, *shape[:-2])
        else:
            same = len(where) == rank - 2 and where[0] == shape[0] and (rank == 3 or where[1] == shape[1])
        if not same or positions.dtype not in errors.INDEX_DTYPES:
            expected = f"{[3, *shape[:-2]] if mrope_section else [*shape[:-2]]} int32 or int64"
            (errors.type_error if same else errors.value_error)(name, "positions", expected, positions)
        if positions.device != device:
            errors.check_device(name, "positions", positions, x, arg)
    elif cu_seqlens is not None:
        if len(shape) != 3:
            errors.value_error(name, "cu_seqlens", f"None unless {arg} is packed [T, H, D]", cu_seqlens)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            errors.value_error(name, "cu_seqlens", "[B + 1] int32 or int64", cu_seqlens)
        if cu_seqlens.dtype not in errors.INDEX_DTYPES:
            errors.type_error(name, "cu_seqlens", "[B + 1] int32 or int64", cu_seqlens)
        if cu_seqlens.device != device:
            errors.check_device(name, "cu_seqlens", cu_seqlens, x, arg)
    elif shape[-3] > table[0] and device.type == "cpu":
        errors.value_error(name, "cos", f"a table of at least {shape[-3]} rows, one per position", cos)
    if mrope_section:
        if positions is None:
            errors.value_error(name, "positions", "given with mrope_section", positions)
        if len(mrope_section) != 3 or min(mrope_section) < 0 or 2 * sum(mrope_section) != rotary_dim:
            errors.value_error(
                name, "mrope_section", f"3 sections that sum to {rotary_dim // 2}", [*mrope_section]
            )  # fmt: skip


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Kernels take any strides but a contiguous last dim: elsewhere this costs a copy."""
    # is_contiguous costs a third of stride
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()


def rest_of(
    cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *options: Any
) -> tuple[Any, ...]:
    """What the kernel ops take after the tensors that they rotate."""
    bounds = cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
    return contiguous_rows(cos), contiguous_rows(sin), positions, bounds, *options


def _fake_x(name: str) -> Any:
    def fake(x, cos, sin, positions, cu_seqlens, _interleaved, rotary_offset, _conjugate, mrope_section, _mrope):
        check_rope(name, "x", x, None, cos, sin, positions, cu_seqlens, rotary_offset, mrope_section)
        return None if name.endswith("_") else x.new_empty(x.shape)

    return fake


def _fake_qk(name: str) -> Any:
    def fake(q, k, cos, sin, positions, cu_seqlens, _interleaved, rotary_offset, _conjugate, mrope_section, _mrope):
        check_rope(name, "q", q, k, cos, sin, positions, cu_seqlens, rotary_offset, mrope_section)
        return None if name.endswith("_") else (q.new_empty(q.shape), k.new_empty(k.shape))

    return fake


_BACKENDS = ("reference", "cpu", "triton", "cuda")
rope_fwd = kernel(
    f"rope_fwd(Tensor x, {_TABLES}, {_OPTIONS}) -> Tensor",
    module=_MODULE,
    fake=_fake_x("rope"),
    backends=_BACKENDS,
    linear=("x",),
)
rope_qk_fwd = kernel(
    f"rope_qk_fwd(Tensor q, Tensor k, {_TABLES}, {_OPTIONS}) -> (Tensor, Tensor)",
    module=_MODULE,
    fake=_fake_qk("rope_qk"),
    backends=_BACKENDS,
    linear=("q k",),
)
rope_inplace = kernel(
    f"rope_inplace(Tensor(a!) x, {_TABLES}, {_OPTIONS}) -> ()",
    module=_MODULE,
    fake=_fake_x("rope_"),
    backends=_BACKENDS,
)
rope_qk_inplace = kernel(
    f"rope_qk_inplace(Tensor(a!) q, Tensor(b!) k, {_TABLES}, {_OPTIONS}) -> ()",
    module=_MODULE,
    fake=_fake_qk("rope_qk_"),
    backends=_BACKENDS,
)


@gradient_of(rope_fwd)
class _Rope(torch.autograd.Function):
    """The rotation is linear and its transpose is the conjugate rotation, whatever factor the tables carry."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, section, mrope):
        ctx.save_for_backward(cos, sin, positions, cu_seqlens)
        ctx.options = (interleaved, rotary_offset, not conjugate, section, mrope)
        return rope_fwd(x, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, section, mrope)

    @staticmethod
    def backward(ctx, dout):
        return _apply(dout, (*ctx.saved_tensors, *ctx.options)), *(None,) * 9


@gradient_of(rope_qk_fwd)
class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, section, mrope):
        ctx.save_for_backward(cos, sin, positions, cu_seqlens)
        ctx.options = (interleaved, rotary_offset, not conjugate, section, mrope)
        ctx.set_materialize_grads(False)
        q_out, k_out = rope_qk_fwd(
            q, k, cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, section, mrope
        )
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(q_out)
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(k_out)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        dq = dk = None
        rest = (*ctx.saved_tensors, *ctx.options)
        if dq_out is not None and dk_out is not None:
            dq, dk = _apply_qk(dq_out, dk_out, rest)
        elif dq_out is not None:
            dq = _apply(dq_out, rest)
        elif dk_out is not None:
            dk = _apply(dk_out, rest)
        return dq, dk, *(None,) * 9


def _apply(x: Tensor, rest: tuple[Any, ...]) -> Tensor:
    x = contiguous_rows(x)
    if errors.needs_grad(x):
        return _Rope.apply(x, *rest)
    return rope_fwd(x, *rest)


def _apply_qk(q: Tensor, k: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, k = contiguous_rows(q), contiguous_rows(k)
    if errors.needs_grad(q, k):
        return _RopeQK.apply(q, k, *rest)
    return rope_qk_fwd(q, k, *rest)


@op(
    module=_MODULE,
    kernels=("rope_fwd",),
    differentiable=("x",),
)
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_offset: int = 0,
    conjugate: bool = False,
    mrope_section: Sequence[int] = (),
    mrope_interleaved: bool = False,
) -> Tensor:
    """Rotary position embedding of one tensor.

    Each pair ``(a, b)`` of the rotary slice at position ``p`` becomes
    ``(a * cos[p, i] - b * sin[p, i], b * cos[p, i] + a * sin[p, i])``, computed in float32 and rounded once.

    Args:
        x: ``[B, S, H, D]`` or packed ``[T, H, D]``; float32, bfloat16 or float16 (float64 on the reference
            backend). Any strides; a last dim that is not contiguous costs one copy.
        cos, sin: ``[P, R / 2]`` float32 (see ``rope_tables``), ``R <= D`` even. They get no gradient.
        positions: ``[T]`` or ``[B, S]`` int32 or int64; None counts 0, 1, .. in every sequence.
        cu_seqlens: ``[B + 1]`` int32 or int64, start of each sequence in packed x; positions restart there.
            Only without ``positions``. Tokens past the last boundary count from it.
        interleaved: pairs are ``(2i, 2i + 1)`` (GPT-J) instead of ``(i, i + R / 2)`` (NeoX, Hugging Face).
        rotary_offset: first dim of the rotary slice. Dims outside of it are copied bit for bit.
        conjugate: rotate by the opposite angle (sin negated).
        mrope_section: ``(t, h, w)`` pair counts that sum to ``R / 2``; positions is then ``[3, T]`` or
            ``[3, B, S]`` and each pair takes its position from one of the three rows (Qwen2-VL).
        mrope_interleaved: sections alternate t, h, w, t, h, w, .. (Qwen3-VL) instead of lying side by side.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Gradient: for x, the conjugate rotation (the transpose; not the inverse when the tables carry an attention
    factor). Twice differentiable. Deterministic and batch-invariant.

    Raises:
        ValueError: wrong shapes or combinations; on CPU also a position outside of the table, before anything is
            written. (A GPU clamps it to the table's rows: the check would cost a synchronisation.)
        TypeError: wrong dtypes.
        RuntimeError: cos or sin require grad and grad mode is on.

    Example::

        cos, sin = tilefuse.rope_tables(64, 4096)
        y = tilefuse.rope(torch.randn(2, 512, 8, 64), cos, sin)

    Source: Su et al., RoFormer (arXiv 2104.09864); mRoPE: Wang et al., Qwen2-VL (arXiv 2409.12191).
    """
    check_rope("rope", "x", x, None, cos, sin, positions, cu_seqlens, rotary_offset, mrope_section)
    rest = rest_of(
        cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section or None, mrope_interleaved
    )
    return _apply(x, rest)


@op(
    module=_MODULE,
    kernels=("rope_qk_fwd", "rope_fwd"),
    differentiable=("q", "k"),
)
def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_offset: int = 0,
    conjugate: bool = False,
    mrope_section: Sequence[int] = (),
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys in one launch.

    The same as ``(rope(q, ...), rope(k, ...))``. ``q`` and ``k`` differ only in their number of heads (either may
    have more); their dtypes must agree. A gradient flows to each of the two that requires it.
    See ``rope`` for the arguments, gradients and errors. Deterministic and batch-invariant.

    Returns:
        ``(q', k')``, contiguous.
    """
    check_rope("rope_qk", "q", q, k, cos, sin, positions, cu_seqlens, rotary_offset, mrope_section)
    rest = rest_of(
        cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section or None, mrope_interleaved
    )
    return _apply_qk(q, k, rest)


@op(
    module=_MODULE,
    kernels=("rope_inplace",),
    mutates=("x",),
)
def rope_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_offset: int = 0,
    conjugate: bool = False,
    mrope_section: Sequence[int] = (),
    mrope_interleaved: bool = False,
) -> Tensor:
    """``rope`` in place: x may be any view, and dims outside of the rotary slice are neither read nor written.

    Not differentiable. Arguments as in ``rope``.

    Returns:
        x itself (``torch.ops.tilefuse.rope_`` returns nothing).

    Raises:
        RuntimeError: a gradient would be needed (x requires grad and grad mode is on).
        ValueError: as ``rope``, and for an x whose elements overlap (where ``torch.compile`` traces, only seen if they
            do by a stride of 0). Nothing is written then.
    """
    check_rope("rope_", "x", x, None, cos, sin, positions, cu_seqlens, rotary_offset, mrope_section)
    check_in_place("rope_", x=x)
    errors.check_not_differentiated("rope_", "works in place and has no gradient", x=x)
    rest = rest_of(
        cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section or None, mrope_interleaved
    )
    if x.stride(-1) == 1:
        rope_inplace(x, *rest)
    else:
        x.copy_(rope_fwd(x.contiguous(), *rest))
    return x


@op(
    module=_MODULE,
    kernels=("rope_qk_inplace",),
    mutates=("q", "k"),
)
def rope_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_offset: int = 0,
    conjugate: bool = False,
    mrope_section: Sequence[int] = (),
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rope_qk`` in place, in one launch: q and k may be views into one packed projection, but must not overlap,
    not even be the same tensor.

    Not differentiable. Arguments as in ``rope``; errors as in ``rope_``.

    Returns:
        ``(q, k)`` themselves (``torch.ops.tilefuse.rope_qk_`` returns nothing).
    """
    check_rope("rope_qk_", "q", q, k, cos, sin, positions, cu_seqlens, rotary_offset, mrope_section)
    check_in_place("rope_qk_", q=q, k=k)
    errors.check_not_differentiated("rope_qk_", "works in place and has no gradient", q=q, k=k)
    rest = rest_of(
        cos, sin, positions, cu_seqlens, interleaved, rotary_offset, conjugate, mrope_section or None, mrope_interleaved
    )
    if q.stride(-1) == 1 and k.stride(-1) == 1:
        rope_qk_inplace(q, k, *rest)
    else:
        for x, rotated in zip((q, k), rope_qk_fwd(contiguous_rows(q), contiguous_rows(k), *rest)):
            x.copy_(rotated)
    return q, k
