"""``grouped_matmul``. Numbers in names: docs/known-bugs.md."""

import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tilefuse
from tilefuse import arch
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.moe.grouped_matmul import SHAPES, case

KERNEL = "grouped_matmul_fwd"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(a, b, offsets, a_index=None, bias=None):
    """One linear layer per group, in a's dtype."""
    rows = a.shape[0] if a_index is None else a_index.shape[0]
    out = a.new_zeros(rows, b.shape[1])
    bounds = offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        source = a[start:end] if a_index is None else a[a_index[start:end].long()]
        value = torch.nn.functional.linear(source, b[e], None if bias is None else bias[e])
        out = torch.cat((out[:start], value, out[end:]))
    return out


def gradients(function, grad, a, b, offsets, a_index, bias):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (a, b, bias)]
    out = function(leaves[0], leaves[1], offsets, a_index, leaves[2])
    wanted = [leaf for leaf in leaves if leaf is not None]
    return out.detach(), torch.autograd.grad(out, wanted, grad.to(out.dtype))


@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_the_formula(name):
    for gather, bias in ((False, True), (True, False)):
        a, b, offsets, index, column = case(name, dtype=torch.float64, gather=gather, bias=bias)
        with tilefuse.backend("reference"):
            out = tilefuse.grouped_matmul(a, b, offsets, index, column)
        bounds = offsets.tolist()
        for p in range(out.shape[0]):
            group = [e for e in range(len(bounds) - 1) if bounds[e] <= p < bounds[e + 1]]
            expected = torch.zeros(b.shape[1], dtype=torch.float64)
            if group:
                row = a[p if index is None else index[p]]
                expected = (b[group[0]] * row).sum(-1) + (0 if column is None else column[group[0]])
            torch.testing.assert_close(out[p], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gather", "transposed", "bias"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0)])
@pytest.mark.parametrize("name", SHAPES)
def test_2_6_11_matches_oracle(name, gather, transposed, bias, dtype, where):
    """Empty groups, odd sizes, NaN in rows and indices out of range where nobody may look; forward and backward."""
    args = case(name, where, dtype, gather=gather, transposed=transposed, bias=bias)
    rows = (args[0] if args[3] is None else args[3]).shape[0]
    grad = torch.randn(rows, args[1].shape[1], device=where).to(dtype)
    with poisoned():
        out, grads = gradients(tilefuse.grouped_matmul, grad, *args)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    with tilefuse.backend("reference"):
        exact, exact_grads = gradients(tilefuse.grouped_matmul, grad.double(), *wide)
    plain, plain_grads = gradients(naive, grad, *args)
    assert_close(out, exact, plain)
    first, last = int(args[2][0]), int(args[2][-1])
    assert not out[:first].any() and not out[last:].any()
    for position, (ours, right, theirs) in enumerate(zip(grads, exact_grads, plain_grads)):
        assert_close(ours, right, theirs, rows=position == 0, name=f"gradient {position}")
    counts = args[2].diff().tolist()
    for e, count in enumerate(counts):
        if count == 0:
            assert not grads[1][e].any(), "an empty group's weight gradient is exactly 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_of_whole_row_blocks(dtype, where):
    """Groups of more rows than a block, unevenly placed; NaN in the rows that belong to nobody."""
    offsets = torch.tensor([3, 153, 153, 223], dtype=torch.int32, device=where)
    a, grad = (torch.randn(230, size, device=where).to(dtype) for size in (40, 24))
    for rows in (slice(0, 3), slice(223, 230)):
        a[rows] = grad[rows] = math.nan
    b = torch.randn(3, 24, 40, device=where).to(dtype).requires_grad_()
    with poisoned():
        (found,) = torch.autograd.grad(tilefuse.grouped_matmul(a, b, offsets), b, grad)
    for e, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
        exact = grad[first:last].double().T @ a[first:last].double()
        assert_close(found[e], exact, grad[first:last].T @ a[first:last], rows=False)


def test_1_no_rows(where):
    """Connected zero gradients, where torch's grouped_mm raises."""
    a, b, offsets, _, bias = case("one_group", where, bias=True)
    a, b, bias = a[:0].requires_grad_(), b.requires_grad_(), bias.requires_grad_()
    out = tilefuse.grouped_matmul(a, b, torch.zeros_like(offsets), None, bias)
    assert out.shape == (0, b.shape[1])
    out.sum().backward()
    assert a.grad.shape == a.shape and not b.grad.any() and not bias.grad.any()


def test_3_4_one_group_and_one_row(where):
    for rows in (1, 7, 70):
        a, b = torch.randn(rows, 40, device=where), torch.randn(3, 24, 40, device=where)
        offsets = torch.tensor([0, 0, rows, rows], device=where)
        out = tilefuse.grouped_matmul(a, b, offsets)
        assert_close(out, a.double() @ b[1].double().T, a @ b[1].T)


def test_indices_outside_count_as_zero_rows(where):
    a, b, offsets, index, bias = case("one_group", where, gather=True, bias=True)
    index[2], index[4] = -1, a.shape[0]
    out = tilefuse.grouped_matmul(a, b, offsets, index, bias)
    torch.testing.assert_close(out[[2, 4]], bias[0].expand(2, -1), rtol=1e-6, atol=1e-6)


def test_out_dtype(where):
    args = case("several_tiles", where, torch.bfloat16)
    for transposed in (False, True):
        b = args[1].transpose(1, 2).contiguous().transpose(1, 2) if transposed else args[1]
        out = tilefuse.grouped_matmul(args[0], b, args[2], out_dtype=torch.float32)
        assert out.dtype == torch.float32
        with tilefuse.backend("reference"):
            exact = tilefuse.grouped_matmul(args[0].double(), b.double(), args[2])
        assert_close(out, exact, naive(args[0].float(), b.float(), args[2]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("gather", [False, True])
def test_13_14_repeatable_and_batch_invariant(dtype, gather, where, repeats):
    a, b, offsets, index, _ = case("several_tiles", where, dtype, gather=gather)
    grad = torch.randn(100, 64, device=where).to(dtype)
    first = gradients(tilefuse.grouped_matmul, grad, a, b, offsets, index, None)
    for _ in range(repeats(where)):
        out, grads = gradients(tilefuse.grouped_matmul, grad, a, b, offsets, index, None)
        for x, y in zip((out, *grads), (first[0], *first[1])):
            assert_bit_equal(x, y)
    if tilefuse.backend() == "triton":
        # the number of rows chooses the tile, and a tile is part of the promise: same rows, other neighbours
        other, other_index = a.flip(0).clone(), index
        if gather:
            other_index = index.flip(0).clone()
            other_index[10:20] = index[10:20]
            other = a
        else:
            other[10:20] = a[10:20]
        out = tilefuse.grouped_matmul(other, b, offsets, other_index)
        assert_bit_equal(out[10:20], first[0][10:20])
        return
    # the rows of each group alone, in other numbers and at other places
    for start, end, e in ((0, 3, 0), (69, 70, 0), (72, 75, 1), (80, 100, 2)):
        bounds = [0] * (e + 1) + [end - start] * (3 - e)
        rows = a if gather else a[start:end]
        part = tilefuse.grouped_matmul(
            rows, b, torch.tensor(bounds, device=where), index[start:end] if gather else None
        )
        assert_bit_equal(part, first[0][start:end])


def test_6_strides(where):
    a, b, offsets, *_ = case("several_tiles", where)
    expected = tilefuse.grouped_matmul(a, b, offsets)
    wide_a = torch.cat((torch.full_like(a, math.nan), a), 1)[:, 64:]
    wide_b = torch.cat((b, torch.full_like(b, math.nan)), 2)[..., :64]
    assert_bit_equal(tilefuse.grouped_matmul(wide_a, wide_b, offsets.long()), expected)
    assert_bit_equal(tilefuse.grouped_matmul(a.T.contiguous().T, b, offsets), expected)
    strided = torch.stack((b, b), -1)[..., 0]
    assert_bit_equal(tilefuse.grouped_matmul(a, strided, offsets), expected)


def test_16_gradcheck():
    a, b, offsets, _, bias = case("one_group", dtype=torch.float64, bias=True)
    a, b, bias = a[:, :5], b[:, :6, :5].contiguous(), bias[:, :6].contiguous()
    index = torch.tensor([3, 0, 3, 6, 1, 1, 2])
    with tilefuse.backend("reference"):
        for i in (None, index):
            leaves = [t.clone().requires_grad_() for t in (a, b, bias)]
            assert torch.autograd.gradcheck(lambda a, b, c, i=i: tilefuse.grouped_matmul(a, b, offsets, i, c), leaves)


def test_16_compile():
    compiled = torch.compile(tilefuse.grouped_matmul, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (100, 90):
        a, b, offsets, *_ = case("several_tiles")
        a, offsets = a[:rows].requires_grad_(), offsets.clamp(max=rows)
        out = compiled(a, b, offsets)
        expected = tilefuse.grouped_matmul(a, b, offsets)
        assert_bit_equal(out.detach(), expected.detach())
        grads = [torch.autograd.grad(o.sum(), a)[0] for o in (out, expected)]
        assert_bit_equal(*grads)


def far(t, gap):
    """The same tensor, its rows gap elements apart: what lies between is never touched."""
    strides = (gap, *t[0].contiguous().stride())
    memory = t.new_empty(gap * (t.shape[0] - 1) + t[0].numel())
    view = memory.as_strided(t.shape, strides)
    view.copy_(t)
    return view


@pytest.mark.parametrize("gather", [False, True])
def test_12_rows_and_experts_past_2_31_elements(gather, where):
    rows, experts = torch.randn(3, 16, device=where).bfloat16(), torch.randn(3, 24, 16, device=where).bfloat16()
    offsets = torch.tensor([0, 1, 2, 3], device=where)
    index = torch.tensor([1, 2, 0], device=where) if gather else None
    grad = torch.randn(3, 24, device=where).bfloat16()
    expected = gradients(tilefuse.grouped_matmul, grad, rows, experts, offsets, index, None)
    # a stride that fits int32: a product of two int32 would wrap at the third row
    gap = 2**30 + 64
    for a, b in ((far(rows, gap), experts), (rows, far(experts, gap))):
        a, b = a.requires_grad_(), b.requires_grad_()
        out = tilefuse.grouped_matmul(a, b, offsets, index)
        assert_bit_equal(out.detach(), expected[0])
        for ours, right in zip(torch.autograd.grad(out, (a, b), grad), expected[1]):
            assert_bit_equal(ours.contiguous(), right)
        del a, b, out


@pytest.mark.gpu
def test_12_a_weight_gradient_of_more_than_2_31_elements():
    experts, width = 130, 4112
    a, grad = (torch.randn(2 * experts, width, device="cuda").bfloat16() for _ in range(2))
    b = torch.zeros(experts, width, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert b.numel() > 2**31
    offsets = torch.arange(0, 2 * experts + 1, 2, device="cuda")
    with tilefuse.backend("triton"):
        (db,) = torch.autograd.grad(tilefuse.grouped_matmul(a, b, offsets), b, grad)
        few = torch.tensor([0, 2], device="cuda")
        last = b.detach()[-1:].clone().requires_grad_()
        (alone,) = torch.autograd.grad(tilefuse.grouped_matmul(a[-2:], last, few), last, grad[-2:])
    assert_bit_equal(db[-1], alone[0])
    # two products of float32 and one rounding
    expected = grad[:2].double().T @ a[:2].double()
    torch.testing.assert_close(db[0].double(), expected, rtol=2**-8, atol=1e-4)


def test_rows_gathered_first(monkeypatch):
    """The configuration that copies gathered rows together before the matmul."""
    import tilefuse.triton_kernels.moe.grouped_matmul as module

    copies, chosen, gathered = [], module.config, module.gathered
    monkeypatch.setattr(module, "config", lambda *args: replace(chosen(*args), gather_first=True))
    monkeypatch.setattr(module, "gathered", lambda *args: copies.append(args) or gathered(*args))
    for name in SHAPES:
        args = case(name, gather=True, bias=True)
        with tilefuse.backend("triton"), poisoned():
            out = tilefuse.grouped_matmul(*args)
        with tilefuse.backend("reference"):
            exact = tilefuse.grouped_matmul(*(t.double() if t.is_floating_point() else t for t in args))
        assert_close(out, exact, naive(*args))
    assert len(copies) == len(SHAPES)


A, B, O = torch.zeros(8, 4), torch.zeros(3, 5, 4), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"grouped_matmul: a must be \[rows, K\], got \[8\] float32", (A[:, 0], B, O), {}),
        (TypeError, "a must be float32 or", (A.int(), B, O), {}),
        (ValueError, r"b must be \[E, N, 4\], got \[3, 5, 3\] float32", (A, B[..., :3], O), {}),
        (TypeError, "b must be of a's dtype", (A, B.half(), O), {}),
        (ValueError, r"offsets must be \[4\] int32 or int64, got \[3\] int32", (A, B, O[:3]), {}),
        (TypeError, "offsets must be int32 or int64", (A, B, O.float()), {}),
        (ValueError, "a_index must be", (A, B, O, O[None]), {}),
        (TypeError, "a_index must be int32 or int64", (A, B, O, O.float()), {}),
        (ValueError, r"bias must be \[3, 5\]", (A, B, O, None, B[0]), {}),
        (TypeError, "bias must be of a's dtype", (A, B, O, None, B[..., 0].half()), {}),
        (TypeError, "out_dtype must be", (A, B, O), {"out_dtype": torch.float16}),
        (ValueError, "b must be on the device of a", (A, B.to("meta"), O), {}),
        (ValueError, "offsets must be on the device of a", (A, B, O.to("meta")), {}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.grouped_matmul, torch.ops.tilefuse.grouped_matmul):
        with pytest.raises(error, match=match):
            call(*args, **options)


def test_tensor_descriptors_take_two_byte_rows_that_follow_each_other():
    from tilefuse.triton_kernels.moe.grouped_matmul import can_use_tma, fit_tma

    with FakeTensorMode(), arch.pretend("sm_90"):
        a = torch.empty(64, 32, dtype=torch.bfloat16, device="cuda")
        b = torch.empty(4, 48, 32, dtype=torch.bfloat16, device="cuda")
        with mock.patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size()):
            assert fit_tma(a) and can_use_tma(a, b)
            # float32 spills, an expanded row has no stride, rows of 8 bytes do not align, columns are not rows
            assert not fit_tma(a.float())
            assert not fit_tma(torch.empty(1, 32, dtype=torch.bfloat16, device="cuda").expand(64, 32))
            assert not fit_tma(torch.empty(64, 36, dtype=torch.bfloat16, device="cuda"))
            assert not fit_tma(torch.empty(32, 64, dtype=torch.bfloat16, device="cuda").t())
            assert not can_use_tma(a, torch.empty(1, 48, 32, dtype=torch.bfloat16, device="cuda").expand(4, 48, 32))
            with arch.pretend("sm_89"):
                assert not fit_tma(a)


def test_tile_bound():
    """The host's bound on row tiles holds for every split of the rows."""
    from tilefuse.triton_kernels.common.grouped import max_tiles

    for rows, groups in itertools.product((0, 1, 5, 16), (0, 1, 3)):
        for cuts in itertools.combinations_with_replacement(range(rows + 1), groups + 1):
            sizes = [b - a for a, b in itertools.pairwise(cuts)] + [rows - cuts[-1], cuts[0]]
            assert sum(-(-size // 4) for size in sizes) <= max_tiles(rows, groups, 4)
