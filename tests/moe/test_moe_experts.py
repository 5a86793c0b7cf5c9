"""``moe_experts``. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.moe.moe_experts import case

KERNEL = "moe_experts_up"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OAI = {"activation": "swiglu_oai", "alpha": 1.702, "limit": 1.0}
CLAMPED, ERF = {"limit": 0.5}, {"activation": "gelu_erf"}


def act(gate, up, activation="silu", alpha=1.702, limit=0.0):
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation in ("gelu", "gelu_erf"):
        return torch.nn.functional.gelu(gate, approximate="none" if activation == "gelu_erf" else "tanh") * up
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def naive(x, w_gate_up, w_down, weights, ids, bias_gate_up=None, bias_down=None, **options):
    """The expert loop that models run eagerly, in x's dtype."""
    linear = torch.nn.functional.linear
    out = torch.zeros_like(x)
    for e in range(w_gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        z = linear(x[token], w_gate_up[e], None if bias_gate_up is None else bias_gate_up[e])
        y = linear(act(*z.chunk(2, -1), **options), w_down[e], None if bias_down is None else bias_down[e])
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def gradients(function, grad, args, options):
    """The output, and gradients of every float argument that is there."""
    leaves = [t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
    out = function(*leaves, **options)
    wanted = [t for t in leaves if t is not None and t.is_floating_point()]
    return out.detach(), torch.autograd.grad(out, wanted, grad.to(out.dtype))


def widened(args):
    return [t.double() if t is not None and t.is_floating_point() else t for t in args]


def check(args, options, where):
    grad = torch.randn(args[0].shape, device=where).to(args[0].dtype)
    with poisoned():
        out, grads = gradients(tilefuse.moe_experts, grad, args, options)
        assert_bit_equal(tilefuse.moe_experts(*args, **options), out)
    with tilefuse.backend("reference"):
        exact, exact_grads = gradients(tilefuse.moe_experts, grad.double(), widened(args), options)
    plain, plain_grads = gradients(naive, grad, args, options)
    assert_close(out, exact, plain)
    for position, triple in enumerate(zip(grads, exact_grads, plain_grads)):
        # a weight gradient of a few rows is nearly an outer product: its rows share one rounding error each
        assert_close(*triple, rows=position == 0, name=f"gradient {position}")
    return out, grads


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, OAI, OAI | {"limit": 0.0}, CLAMPED, ERF])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_the_formula(options, bias):
    args = widened(case(8, 4, 2, 20, 12, bias=bias))
    grad = torch.randn(8, 20, dtype=torch.float64)
    with tilefuse.backend("reference"):
        out, grads = gradients(tilefuse.moe_experts, grad, args, options)
    expected, expected_grads = gradients(naive, grad, args, options)
    for a, b in zip((out, *grads), (expected, *expected_grads)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "bias"), [({}, False), ({"activation": "gelu"}, True), (OAI, True)])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"), [(40, 7, 3, 97, 47), (33, 4, 2, 64, 130), (48, 5, 5, 128, 64)]
)
def test_4_5_6_matches_oracle(tokens, experts, top_k, hidden, inner, options, bias, dtype, where):
    check(case(tokens, experts, top_k, hidden, inner, where, dtype, bias=bias), options, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [CLAMPED, ERF], ids=["silu_clamped", "gelu_erf"])
def test_clamped_silu_and_exact_gelu(options, dtype, where):
    args = case(33, 4, 2, 64, 130, where, dtype, bias=True)
    out, _ = check(args, options, where)
    other = tilefuse.moe_experts(*args, activation="gelu" if options is ERF else "silu")
    assert (out - other).abs().max() > (0.1 if options is CLAMPED else 1e-4)


def test_gradients_at_the_limit(where):
    """A value at the bound passes its gradient, as in torch.clamp, a clamped one none, and NaN stays NaN."""
    limit, inf, nan = 0.5, math.inf, math.nan
    gate = torch.tensor([0.5, 0.5, 0.75, -3.0, 0.25, 0.25, 0.25, nan, inf, 0.25], device=where)
    up = torch.tensor([0.25, 0.5, 0.25, 0.25, -0.5, 0.75, -0.75, 0.25, 0.25, nan], device=where)
    # an expert for each pair, whose bias is the pre-activation
    x, w_gate_up, w_down = (torch.zeros(s, device=where) for s in ((10, 1), (10, 2, 1), (10, 1, 1)))
    weights, ids = torch.ones(10, 1, device=where), torch.arange(10, device=where)[:, None]
    for activation in ("silu", "swiglu_oai"):
        z = torch.stack((gate, up), 1).requires_grad_()
        options = {"activation": activation, "limit": limit}
        out = tilefuse.moe_experts(x, w_gate_up, w_down + 1, weights, ids, z, **options)
        want = act(*z.chunk(2, 1), **options)
        torch.testing.assert_close(out, want, equal_nan=True)
        finite = want.isfinite()
        got, right = (torch.autograd.grad(y[finite].sum(), z)[0] for y in (out, want))
        torch.testing.assert_close(got[finite[:, 0]], right[finite[:, 0]])
        assert right[:7].eq(0).any()


@pytest.mark.parametrize("tokens", [1, 7])
def test_4_fewer_tokens_than_a_tile(tokens, where):
    """Also far more experts than slots, most of them empty."""
    args = case(tokens, 60, 6, 48, 32, where, bias=True)
    grad = torch.randn(tokens, 48, device=where)
    with poisoned():
        out, grads = gradients(tilefuse.moe_experts, grad, args, OAI)
    with tilefuse.backend("reference"):
        exact, exact_grads = gradients(tilefuse.moe_experts, grad.double(), widened(args), OAI)
    for ours, right in zip((out, *grads), (exact, *exact_grads)):
        torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("experts", [1, 4])
def test_5_extreme_counts(top_k, experts, where):
    check(case(21, experts, min(top_k, experts), 48, 32, where, dropped=0.0), {}, where)


def test_6_inner_511(where):
    check(case(6, 3, 2, 97, 511, where), {}, where)


def test_1_no_tokens(where):
    args = case(0, 4, 2, 32, 16, where, bias=True)
    out, grads = gradients(tilefuse.moe_experts, torch.zeros(0, 32, device=where), args, {})
    assert out.shape == (0, 32)
    assert [g.shape for g in grads] == [t.shape for t in args if t is not None and t.is_floating_point()]
    assert not any(g.any() for g in grads)


def test_10_all_dropped(where):
    args = case(5, 4, 2, 32, 16, where, bias=True, dropped=2.0)
    assert ((args[4] < 0) | (args[4] >= 4)).all()
    with poisoned():
        out, grads = gradients(tilefuse.moe_experts, torch.randn(5, 32, device=where), args, {})
    assert not out.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("empty", [0, 2, 4])
def test_2_empty_expert(empty, where):
    args = list(case(30, 5, 2, 48, 32, where, dropped=0.0))
    args[4] = torch.where(args[4] == empty, (empty + 1) % 5, args[4])
    _, grads = check(args, {}, where)
    assert not grads[1][empty].any() and not grads[2][empty].any()


def test_3_all_to_one_expert(where):
    args = list(case(70, 4, 1, 48, 32, where))
    args[4] = torch.full_like(args[4], 2)
    check(args, {}, where)


def test_10_11_dropped_slots_and_padding_rows_do_not_leak(where):
    args = list(case(12, 4, 2, 48, 32, where, dropped=0.4))
    args[4][3] = -1
    args[4][7] = 4
    grad = torch.randn(12, 48, device=where)
    clean = gradients(tilefuse.moe_experts, grad, args, {})
    assert not clean[0][[3, 7]].any()
    dirty = [t.clone() if t is not None else None for t in args]
    dirty[0][[3, 7]] = math.nan
    dropped = (args[4] < 0) | (args[4] >= 4)
    dirty[3][dropped] = math.inf
    grad[[3, 7]] = math.nan
    out, grads = gradients(tilefuse.moe_experts, grad, dirty, {})
    assert_bit_equal(out, clean[0])
    for ours, theirs in zip(grads, clean[1]):
        assert_bit_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_13_14_repeatable_and_batch_invariant(dtype, where, repeats):
    args = case(24, 4, 2, 64, 48, where, dtype, bias=True)
    grad = torch.randn(24, 64, device=where).to(dtype)
    out, grads = gradients(tilefuse.moe_experts, grad, args, OAI)
    for _ in range(repeats(where)):
        again = gradients(tilefuse.moe_experts, grad, args, OAI)
        for a, b in zip((again[0], *again[1]), (out, *grads)):
            assert_bit_equal(a, b)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20)):
        part = [args[0][rows], *args[1:3], args[3][rows], args[4][rows], *args[5:]]
        # a launch is tuned to the number of rows: the same configuration is part of the promise on a GPU
        if tilefuse.backend() != "triton":
            alone, alone_grads = gradients(tilefuse.moe_experts, grad[rows], part, OAI)
            assert_bit_equal(alone, out[rows])
            assert_bit_equal(alone_grads[0], grads[0][rows])


def test_14_batch_mates_change_nothing(where):
    """The same token among others, with as many rows: bits must not move."""
    args = list(case(24, 4, 2, 64, 48, where))
    out = tilefuse.moe_experts(*args)
    args[0], args[4] = args[0].clone(), args[4].clone()
    args[0][1:] = args[0][1:].flip(0) * 3
    args[4][1:] = args[4][1:].flip(0)
    assert_bit_equal(tilefuse.moe_experts(*args)[:1], out[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_15_cuda_graph_replay_with_other_routing(dtype, assert_replays):
    """Forward and backward; later routings leave experts empty, use one only, and drop everything."""
    x, w_gate_up, w_down, weights, _, *biases = case(40, 8, 2, 64, 48, "cuda", dtype, bias=True)
    logits = torch.randn(40, 8, device="cuda")
    leaves = [t.requires_grad_() for t in (x, w_gate_up, w_down, weights, *biases)]
    grad = torch.randn(40, 64, device="cuda").to(dtype)

    def step():
        _, ids = tilefuse.moe_route(logits, top_k=2)
        ids = torch.where(logits.gather(1, ids.long()) > -50, ids, -1)
        out = tilefuse.moe_experts(*leaves[:4], ids, *leaves[4:])
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    empty = torch.randn(40, 8, device="cuda")
    empty[:, [0, 3, 7]] = -30.0
    one = torch.full((40, 8), -100.0, device="cuda")
    one[:, 5] = 0.0
    nothing = torch.full((40, 8), -100.0, device="cuda")
    with tilefuse.backend("triton"):
        assert_replays(step, logits, (empty, one, nothing, torch.randn(40, 8, device="cuda")))


@pytest.mark.gpu
def test_12_a_pre_activation_of_more_than_2_31_elements():
    """T k 2 I > 2^31: the last tokens have the bits they have in a batch of as many rows per expert."""
    tokens, experts, top_k, hidden, inner = 70_000, 4, 8, 64, 2048
    assert tokens * top_k * 2 * inner > 2**31
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator).bfloat16() / 8

    x, w_gate_up, w_down = normal(tokens, hidden), normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
    weights = torch.rand(tokens, top_k, device="cuda", generator=generator)
    ids = torch.randint(0, experts, (tokens, top_k), device="cuda", generator=generator)
    x.requires_grad_()
    with tilefuse.backend("triton"):
        out = tilefuse.moe_experts(x, w_gate_up, w_down, weights, ids)
        (dx,) = torch.autograd.grad(out, x, out.detach())
        few = x.detach()[-100:].requires_grad_()
        part = tilefuse.moe_experts(few, w_gate_up, w_down, weights[-100:], ids[-100:])
        (dfew,) = torch.autograd.grad(part, few, part.detach())
    # another tile sums in another order
    torch.testing.assert_close(out[-100:], part, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx[-100:], dfew, rtol=2e-2, atol=2e-2)


def test_saves_only_x_and_the_pre_activation():
    """Saved bytes beyond arguments and the integer plan: the pre-activation alone."""
    args = case(16, 4, 2, 64, 48, dtype=torch.bfloat16, dropped=0.0)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
    known = {t.data_ptr() for t in leaves if t is not None}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tilefuse.moe_experts(*leaves)
    extra = [t for t in saved if t is not None and t.data_ptr() not in known and t.is_floating_point()]
    assert [(tuple(t.shape), t.dtype) for t in extra] == [((32, 96), torch.bfloat16)]


def test_6_strided_and_transposed_weights(where):
    args = list(case(9, 3, 2, 64, 32, where))
    expected = tilefuse.moe_experts(*args)
    views = list(args)
    views[0] = torch.cat((args[0], args[0]), 1)[:, 64:]
    for i in (1, 2):
        views[i] = torch.cat((args[i], torch.full_like(args[i], math.nan)), -1)[..., : args[i].shape[-1]]
    assert_bit_equal(tilefuse.moe_experts(*views), expected)
    for i in (1, 2):
        views[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(tilefuse.moe_experts(*views), expected, rtol=1e-5, atol=1e-5)


def test_16_gradcheck():
    for options, bias in (
        ({}, False), ({"activation": "gelu"}, True), (OAI | {"limit": 3.0}, True), ({"limit": 3.0}, True), (ERF, False),
    ):  # fmt: skip
        args = widened(case(4, 3, 2, 6, 5, bias=bias))
        leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
        with tilefuse.backend("reference"):
            assert torch.autograd.gradcheck(lambda *a, o=options: tilefuse.moe_experts(*a, **o), leaves, fast_mode=True)


def test_16_compile():
    compiled = torch.compile(tilefuse.moe_experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        args = case(tokens, 4, 2, 32, 16)
        grad = torch.randn(tokens, 32)
        ours = gradients(compiled, grad, args, {})
        eager = gradients(tilefuse.moe_experts, grad, args, {})
        for a, b in zip((ours[0], *ours[1]), (eager[0], *eager[1])):
            assert_bit_equal(a, b)


def test_checkpointing():
    args = case(6, 4, 2, 32, 16)
    x = args[0].requires_grad_()
    out = torch.utils.checkpoint.checkpoint(lambda x: tilefuse.moe_experts(x, *args[1:]), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_bit_equal(grad, torch.autograd.grad(tilefuse.moe_experts(x, *args[1:]).sum(), x)[0])


X, G, D = torch.zeros(4, 8), torch.zeros(3, 12, 8), torch.zeros(3, 8, 6)
W, I = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"moe_experts: x must be \[T, H\], got \[8\] float32", (X[0], G, D, W, I), {}),
        (TypeError, "x must be float32 or", (X.int(), G, D, W, I), {}),
        (ValueError, r"w_gate_up must be \[E, 2 I, 8\], got \[3, 11, 8\] float32", (X, G[:, 1:], D, W, I), {}),
        (TypeError, "w_gate_up must be of x's dtype", (X, G.half(), D, W, I), {}),
        (ValueError, r"w_down must be \[3, 8, 6\], got \[3, 8, 5\] float32", (X, G, D[..., 1:], W, I), {}),
        (TypeError, "w_down must be of x's dtype", (X, G, D.half(), W, I), {}),
        (ValueError, r"ids must be \[4, k\]", (X, G, D, W, I[:3]), {}),
        (TypeError, "ids must be int32 or int64", (X, G, D, W, I.float()), {}),
        (ValueError, r"weights must be \[4, 2\] float32", (X, G, D, W[:, :1], I), {}),
        (TypeError, "weights must be float32 or of x's dtype", (X, G, D, W.double(), I), {}),
        (ValueError, r"bias_gate_up must be \[3, 12\]", (X, G, D, W, I, D[..., 0]), {}),
        (TypeError, "bias_down must be of x's dtype", (X, G, D, W, I, None, D[..., 0].half()), {}),
        (ValueError, "activation must be one of silu, gelu, swiglu_oai", (X, G, D, W, I), {"activation": "relu"}),
        (ValueError, r"limit must be 0 \(no clamp\) with gelu, got 0.5", (X, G, D, W, I),
         {"activation": "gelu", "limit": 0.5}),
        (ValueError, "limit must be 0", (X, G, D, W, I), ERF | CLAMPED),
        (ValueError, "w_down must be on the device of x", (X, G, D.to("meta"), W, I), {}),
        (ValueError, "ids must be on the device of x", (X, G, D, W, I.to("meta")), {}),
    ],
)  # fmt: skip
def test_errors(error, match, args, options):
    for call in (tilefuse.moe_experts, torch.ops.tilefuse.moe_experts):
        with pytest.raises(error, match=match):
            call(*args, **options)
