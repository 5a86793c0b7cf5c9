"""``merge_attention``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.common import normal
from tilefuse.testing.inputs.mla.merge_attention import cases

KERNEL, BACKWARD = "merge_attention_fwd", "merge_attention_bwd"
case = by_name(cases)
CASES = [case[0] for case in cases("cpu", torch.float32)]
INF = float("inf")


def formula(out_a, lse_a, out_b, lse_b):
    """By the sums themselves, relative to the larger lse; an empty side is left out."""
    lse_a, lse_b = (torch.where(x.isinf(), -INF, x) for x in (lse_a, lse_b))
    top = torch.maximum(lse_a, lse_b)
    base = torch.where(top.isinf(), 0.0, top)
    a, b = ((x - base).exp().transpose(-1, -2).unsqueeze(-1).to(out_a.dtype) for x in (lse_a, lse_b))
    total = a + b
    one = torch.where(a == 0, 0.0, a * torch.where(a == 0, 0.0, out_a))
    two = torch.where(b == 0, 0.0, b * torch.where(b == 0, 0.0, out_b))
    out = (one + two) / torch.where(total == 0, 1.0, total)
    return out, base + ((lse_a - base).exp() + (lse_b - base).exp()).log()


def run(function, args):
    leaves = [a.detach().requires_grad_() for a in args]
    out = function(*leaves)
    grads = [normal(*o.shape, dtype=torch.float32, seed=i).to(o.device, o.dtype) for i, o in enumerate(out)]
    # no gradient flows out of a merged lse of -inf
    grads[1] = torch.where(out[1].isinf(), 0.0, grads[1])
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, grads))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_10_matches_oracle(name, dtype, grad_where):
    """Empty sides hold NaN and are marked -inf or +inf; the sides' strides differ."""
    args = case(name, grad_where, dtype)[0]
    with poisoned():
        got = run(tilefuse.merge_attention, args)
    exact = run(formula, [a.cpu().double() for a in args])
    naive = run(formula, [a.cpu() for a in args])
    for i, (g, e, n) in enumerate(zip(got, exact, naive, strict=True)):
        if name == "empty_sides" and i >= 2:
            # the formula's gradient of an empty side is NaN where ours is 0
            e, n = torch.where(e.isnan(), 0.0, e), torch.where(n.isnan(), 0.0, n)
        assert_close(g, e, n, name=str(i))
    for g, a in zip(got, run(tilefuse.merge_attention, args)):
        assert_bit_equal(g, a)


def test_10_both_empty(where):
    out = torch.full((4, 2, 8), float("nan"), device=where)
    lse = torch.full((2, 4), -INF, device=where)
    merged, total = tilefuse.merge_attention(out, lse, out, lse)
    assert (merged == 0).all() and (total == -INF).all()


def test_10_one_side_empty_returns_the_other(where):
    out_a, lse_a, out_b, lse_b = case("packed", where)[0]
    merged, total = tilefuse.merge_attention(out_a, lse_a, out_b * float("nan"), lse_b * 0 - INF)
    assert_bit_equal(merged, out_a.contiguous())
    assert_bit_equal(total, lse_a.contiguous())


@pytest.mark.parametrize("name", ["padded", "packed"])
def test_gradcheck(name):
    args = [
        a[:2].clone().requires_grad_() if a.dim() == 4 else a.clone().requires_grad_()
        for a in case(name, dtype=torch.float64)[0]
    ]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(tilefuse.merge_attention, args, fast_mode=True)


OUT, LSE = torch.zeros(5, 3, 8), torch.zeros(3, 5)
ERRORS = {
    "rank": ({"out_a": OUT[0]}, ValueError, r"out_a must be \[B, S, H, D\] or \[T, H, D\]"),
    "dtype": ({"out_a": OUT.int()}, TypeError, "out_a must be float32 or"),
    "shape": ({"out_b": OUT[:4]}, ValueError, r"out_b must be \[5, 3, 8\], got \[4, 3, 8\]"),
    "other_dtype": ({"out_b": OUT.half()}, TypeError, "out_b must be of out_a's dtype float32"),
    "lse_shape": ({"lse_a": LSE.T}, ValueError, r"lse_a must be \[3, 5\] float32, got \[5, 3\]"),
    "lse_dtype": ({"lse_b": LSE.double()}, TypeError, r"lse_b must be \[3, 5\] float32, got .*float64"),
    "device": ({"lse_b": LSE.to("meta")}, ValueError, "lse_b must be on the device of out_a"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.merge_attention, torch.ops.tilefuse.merge_attention], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    arguments = {"out_a": OUT, "lse_a": LSE, "out_b": OUT, "lse_b": LSE} | edit
    with pytest.raises(error, match=f"^tilefuse.merge_attention: {message}"):
        call(*arguments.values())


def test_19_opcheck_and_compile():
    args = case("packed")[0]
    leaves = [a.detach().requires_grad_() for a in args]
    torch.library.opcheck(torch.ops.tilefuse.merge_attention_fwd.default, args)
    torch.library.opcheck(torch.ops.tilefuse.merge_attention.default, leaves)
    step = torch.compile(tilefuse.merge_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(step, args), run(tilefuse.merge_attention, args)):
        assert_bit_equal(a, b)
