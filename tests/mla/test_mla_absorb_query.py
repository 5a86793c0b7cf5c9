"""``mla_absorb_query``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.common import normal, surrounded, tables
from tilefuse.testing.inputs.mla.mla_absorb_query import cases

KERNEL, BACKWARD = "mla_absorb_query_fwd", "mla_absorb_query_bwd"
case = by_name(cases)
CASES = [case[0] for case in cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def absorb(q, w_uk, cos, sin, positions, interleaved=True):
    nope, rope = w_uk.shape[1], q.shape[2] - w_uk.shape[1]
    rows = torch.arange(q.shape[0]) if positions is None else positions.long()
    rotated = [None] * rope
    for i in range(rope // 2):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + rope // 2)
        a, b = q[..., nope + one], q[..., nope + two]
        c, s = cos[rows, i].to(q.dtype)[:, None], sin[rows, i].to(q.dtype)[:, None]
        rotated[one], rotated[two] = a * c - b * s, b * c + a * s
    latent = torch.stack([q[:, h, :nope] @ w_uk[h] for h in range(q.shape[1])], 1)
    return torch.cat([latent, *(r.unsqueeze(-1) for r in rotated)], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype, grad_where, compare):
    args, options = case(name, grad_where, dtype)
    compare(tilefuse.mla_absorb_query, absorb, args, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_matches_oracle(name, dtype, where, compare_forward):
    args, options = case(name, where, dtype)
    compare_forward(tilefuse.mla_absorb_query, absorb, args, options, dtype)


def test_many_tokens(compare_forward):
    """On the CPU: several blocks of tokens, the last one not full, and so much output that it goes past the caches."""
    q = normal(250, 8, 192, device="cpu", dtype=torch.bfloat16, seed=1)
    w_uk = normal(8, 256, 512, device="cpu", dtype=torch.bfloat16, seed=2)[:, :128]
    args = (q, w_uk, *tables(64, 250), None)
    compare_forward(tilefuse.mla_absorb_query, absorb, args, {}, torch.bfloat16)


BLOCKS = {
    # tokens, heads, P, R, r: several blocks of tokens and groups of columns, the last ones not full
    "even": (387, 3, 72, 328, 8),
    "odd": (259, 2, 67, 277, 6),
    "only_rope": (250, 2, 0, 70, 4),
}


def backward_args(name, dtype, positions=torch.int64):
    """Arguments of the backward kernel, views into NaN, none of them contiguous."""
    tokens, heads, nope, rank, rope = BLOCKS[name]
    grad = normal(heads, tokens, rank + rope, device="cpu", dtype=dtype, seed=1)
    grad = surrounded(grad, (0, 0, 1), (0, 0, 2)).transpose(0, 1)
    q = normal(tokens, heads, nope + rope, device="cpu", dtype=dtype, seed=2)
    w_uk = normal(heads, nope, rank, device="cpu", dtype=dtype, seed=3)
    q, w_uk = surrounded(q, (0, 1, 0), (0, 0, 3)), surrounded(w_uk, (0, 1, 3), (0, 1, 4))
    order = torch.arange(tokens - 1, -1, -1, dtype=positions)
    return grad, q, w_uk, *tables(rope, tokens), order, name != "odd"


def backward_formula(grad, q, w_uk, *rest):
    leaves = (q.detach().requires_grad_(), w_uk.detach().requires_grad_())
    return torch.autograd.grad(absorb(*leaves, *rest), leaves, grad)


@pytest.mark.cpu_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_cpu_backward(name, dtype, backward_kernel):
    args = backward_args(name, dtype)
    backward_kernel(torch.ops.tilefuse.mla_absorb_query_bwd, backward_formula, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_nan_in_its_row(dtype, grad_where):
    grad, q, w_uk, *rest = (a.to(grad_where) if torch.is_tensor(a) else a for a in backward_args("odd", dtype))
    grad, q, rest[2] = grad[:5].clone(), q[:5], rest[2][:5]
    clean = torch.ops.tilefuse.mla_absorb_query_bwd(grad, q, w_uk, *rest)
    grad[3, 1, 7] = float("nan")
    queries, weight = torch.ops.tilefuse.mla_absorb_query_bwd(grad, q, w_uk, *rest)
    nope = w_uk.shape[1]
    assert queries[3, 1, :nope].isnan().all()
    assert weight[1, :, 7].isnan().all()
    queries[3, 1, :nope], weight[1, :, 7] = clean[0][3, 1, :nope], clean[1][1, :, 7]
    assert_bit_equal(queries, clean[0])
    assert_bit_equal(weight, clean[1])


def test_gradcheck():
    (q, w, *rest), options = case("odd_widths", dtype=torch.float64)
    leaves = (q.clone().requires_grad_(), w.clone().requires_grad_())
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, w: tilefuse.mla_absorb_query(q, w, *rest, **options), leaves, fast_mode=True
        )


COS, SIN = tables(64, 8)
Q, W = torch.zeros(5, 3, 192), torch.zeros(3, 128, 512)
ERRORS = {
    "q": ({"q": Q[0]}, ValueError, r"q must be \[T, H, P \+ r\]"),
    "dtype": ({"q": Q.int()}, TypeError, "q must be float32 or"),
    "w_rank": ({"w_uk": W[0]}, ValueError, r"w_uk must be \[H, P, R\] with P <= 192"),
    "w_wide": ({"w_uk": torch.zeros(3, 200, 512)}, ValueError, r"w_uk must be \[H, P, R\] with P <= 192"),
    "w_heads": ({"w_uk": torch.zeros(2, 128, 512)}, ValueError, r"w_uk must be \[3, 128, 512\]"),
    "w_dtype": ({"w_uk": W.half()}, TypeError, "w_uk must be of q's dtype float32"),
    "odd": ({"w_uk": torch.zeros(3, 127, 512)}, ValueError, "q must be of an even RoPE width"),
    "cos": ({"cos": COS[:, :3]}, ValueError, r"cos must be \[P, 32\] float32"),
    "positions": ({"positions": torch.zeros(4).int()}, ValueError, r"positions must be \[5\]"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(
    "call", [tilefuse.mla_absorb_query, torch.ops.tilefuse.mla_absorb_query], ids=["function", "op"]
)
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    with pytest.raises(error, match=f"^tilefuse.mla_absorb_query: {message}"):
        call(**{"q": Q, "w_uk": W, "cos": COS, "sin": SIN} | edit)


def test_position_outside_of_the_tables(where):
    (q, w, cos, sin, positions), _ = case("deepseek", where)
    positions[2] = 40
    if where == "cpu":
        with pytest.raises(ValueError, match=r"tilefuse.mla_absorb_query: positions must be in \[0, 40\), got 40"):
            tilefuse.mla_absorb_query(q, w, cos, sin, positions)
    else:
        out = tilefuse.mla_absorb_query(q, w, cos, sin, positions)
        assert_bit_equal(out, tilefuse.mla_absorb_query(q, w, cos, sin, positions.clamp(max=39)))


def test_19_opcheck_and_compile():
    (q, w, *rest), options = case("odd_widths")
    leaves = (q.detach().requires_grad_(), w.detach().requires_grad_())
    torch.library.opcheck(torch.ops.tilefuse.mla_absorb_query_fwd.default, (q, w, *rest, True))
    torch.library.opcheck(torch.ops.tilefuse.mla_absorb_query.default, (*leaves, *rest), options)

    def function(q, w):
        return tilefuse.mla_absorb_query(q, w, *rest, **options).sum()

    step = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(step(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves)):
        assert_bit_equal(a, b)
