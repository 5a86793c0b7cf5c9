"""``mla_attention`` and chunked prefill. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.common import normal
from tilefuse.testing.inputs.mla.mla_attention import cases

KERNEL, BACKWARD = "mla_attention_fwd", "mla_attention_bwd"
case = by_name(cases)
CASES = [case[0] for case in cases("cpu", torch.float32)]


class FlashSoftmax(torch.autograd.Function):
    """softmax(scores) @ v in plain PyTorch with the backward of every flash kernel: the row term comes from ``out``.

    In 16 bits ``out`` is rounded, and that error, not that of a stored softmax, is the one to compare with.
    """

    @staticmethod
    def forward(ctx, scores, v):
        weights = torch.softmax(scores, -1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        ctx.save_for_backward(weights, v, out)
        return out, torch.logsumexp(scores, -1)

    @staticmethod
    def backward(ctx, g_out, g_lse):
        weights, v, out = ctx.saved_tensors
        delta = (g_out * out).sum(-1).transpose(1, 2) - g_lse
        g_weights = torch.einsum("bqhd,bkhd->bhqk", g_out, v)
        return weights * (g_weights - delta.unsqueeze(-1)), torch.einsum("bhqk,bqhd->bkhd", weights, g_out)


def dense(q, k, v, softmax_scale, causal):
    """[B, S, H, D], with the whole score matrix; empty rows are 0 and -inf, with zero gradients."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    queries, keys = q.shape[1], k.shape[1]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        visible = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    rows = visible.any(-1)
    safe = scores.masked_fill(~visible, -math.inf).masked_fill(~rows[:, None], 0.0)
    if not keys:
        return torch.einsum("bhqk,bkhd->bqhd", scores, v), scores.sum(-1) - math.inf
    if q.dtype == torch.float64:
        out, lse = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(safe, -1), v), torch.logsumexp(safe, -1)
    else:
        out, lse = FlashSoftmax.apply(safe, v)
    return torch.where(rows[:, None, None], out, 0.0), torch.where(rows, lse, -math.inf)


def formula(q, k, v, cu_q, cu_k, *, softmax_scale, causal=True):
    if cu_q is None:
        return dense(q, k, v, softmax_scale, causal)
    outs, lses = [], []
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        out, lse = dense(q[None, rows_q], k[None, rows_k], v[None, rows_k], softmax_scale, causal)
        outs.append(out[0])
        lses.append(lse[0])
    rest = q.shape[0] - bounds_q[-1]
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    lses.append(q.new_full((q.shape[1], rest), -math.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def run(function, args, options):
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    out, lse = function(*leaves, *args[3:], **options)
    g_out = normal(*out.shape, dtype=torch.float32, seed=3).to(out.device, out.dtype)
    g_lse = normal(*lse.shape, dtype=torch.float32, seed=4).to(lse.device, lse.dtype)
    g_lse = torch.where(lse.isinf(), 0.0, g_lse)
    grads = torch.autograd.grad((out, lse), leaves, (g_out, g_lse))
    return [x.detach() for x in (out, lse, *grads)]


def on_cpu(args, dtype):
    return tuple(a if a is None else a.cpu().to(dtype) if a.is_floating_point() else a.cpu() for a in args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_17_matches_oracle(name, dtype, grad_where):
    """Outputs and gradients, padded and packed, with empty sequences on either side and longer keys."""
    args, options = case(name, grad_where, dtype)
    with poisoned():
        got = run(tilefuse.mla_attention, args, options)
    exact = run(formula, on_cpu(args, torch.float64), options)
    naive = run(formula, on_cpu(args, dtype), options)
    for i, (g, e, n) in enumerate(zip(got, exact, naive, strict=True)):
        assert g.is_contiguous() and g.dtype == (torch.float32 if i == 1 else dtype)
        # float32 scores are rounded at their own magnitude
        tiny = 2e-5 if i == 1 else float(2**-20 * (1 + e.abs().max())) if dtype == torch.float32 and e.numel() else None
        # a row of gradients in the causal corner is one rounded number times a row: its error is a single draw, and the
        # ratio of two such draws says nothing. The largest error and that of the whole tensor do.
        rows = i < 2 or dtype == torch.float32
        assert_close(g, e, n, tiny=tiny, rows=rows, name=("out", "lse", "dq", "dk", "dv")[i])
    for g, a in zip(got, run(tilefuse.mla_attention, args, options)):
        assert_bit_equal(g, a)


@pytest.mark.parametrize("name", ["fewer_keys", "not_causal", "packed"])
def test_gradcheck(name):
    args, options = case(name, dtype=torch.float64)
    leaves = [a[..., :24].clone().requires_grad_() for a in args[:3]]
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: tilefuse.mla_attention(q, k, v, *args[3:], **options)[0], leaves, fast_mode=True
        )
    got = run(tilefuse.mla_attention, args, options)
    for g, e in zip(got, run(formula, args, options)):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_17_nan_in_another_sequence(where):
    args, options = case("packed", where)
    clean = tilefuse.mla_attention(*args, **options)
    q, k, v, cu_q, cu_k = args
    k, v = k.clone(), v.clone()
    k[:17], v[:17] = float("nan"), float("nan")
    out, lse = tilefuse.mla_attention(q, k, v, cu_q, cu_k, **options)
    assert_bit_equal(out[17:], clean[0][17:])
    assert_bit_equal(lse[:, 17:], clean[1][:, 17:])


def test_17_a_sequence_does_not_see_its_batch(where):
    (q, k, v, cu_q, cu_k), options = case("packed", where)
    out, lse = tilefuse.mla_attention(q, k, v, cu_q, cu_k, **options)
    bounds = cu_q[:2].contiguous(), cu_k[:2].contiguous()
    alone = tilefuse.mla_attention(q[:17], k[:17], v[:17], *bounds, **options)
    assert_bit_equal(out[:17], alone[0])
    assert_bit_equal(lse[:, :17], alone[1])


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
@pytest.mark.parametrize("chunk", [7, 64, 160])
def test_11_chunked_prefill_equals_one_shot(chunk, layout, where):
    """Gather, expand, attend, merge; one sequence has no context at all, one is a decode step."""
    heads, nope, v_dim, rank, rope, page_size = 2, 32, 32, 128, 16, 16
    contexts, new = [150, 0, 40], [5, 3, 1]
    options = {"softmax_scale": (nope + rope) ** -0.5 * 1.3}
    dims = {"kv_lora_rank": rank, "nope_dim": nope, "v_dim": v_dim}
    cos, sin = torch.ones(200, rope // 2, device=where), torch.zeros(200, rope // 2, device=where)
    width = rank + rank // 32 + 2 * rope if layout == "fp8" else rank + rope
    cache = torch.zeros(24, page_size, width, device=where, dtype=torch.uint8 if layout == "fp8" else torch.float32)
    table = torch.arange(30, device=where, dtype=torch.int32).view(3, 10).clamp(max=23)
    tokens = [c + n for c, n in zip(contexts, new)]
    slots = torch.cat(
        [
            table[b, torch.arange(n, device=where) // page_size] * page_size + torch.arange(n, device=where) % page_size
            for b, n in enumerate(tokens)
        ]
    )
    kv_a = normal(sum(tokens), rank + rope, device=where, dtype=torch.float32)
    weight = torch.ones(rank, device=where)
    tilefuse.mla_append_kv(kv_a, weight, cos, sin, slots * 0, cache, slots, layout=layout)
    w_ukv = normal(heads * (nope + v_dim), rank, device=where, dtype=torch.float32) * rank**-0.5
    q = normal(sum(new), heads, nope + rope, device=where, dtype=torch.float32)

    def bounds(lengths):
        return torch.tensor([0, *lengths], device=where).cumsum(0).int()

    def keys(table, lengths):
        latent = tilefuse.mla_gather_kv(
            cache,
            table,
            bounds(lengths),
            total_tokens=sum(lengths),
            kv_lora_rank=rank,
            layout=layout,
            out_dtype=torch.float32,
        )
        return tilefuse.mla_expand_kv(latent, w_ukv, **dims), latent

    (k, v), latent = keys(table, tokens)
    whole = tilefuse.mla_attention(q, k, v, bounds(new), bounds(tokens), **options)
    fresh = [slice(bound + c, bound + c + n) for bound, c, n in zip(bounds(tokens).tolist(), contexts, new)]
    k, v = tilefuse.mla_expand_kv(torch.cat([latent[s] for s in fresh]), w_ukv, **dims)
    merged = tilefuse.mla_attention(q, k, v, bounds(new), bounds(new), **options)
    chunk = max(page_size, chunk // page_size * page_size)
    for start in range(0, max(contexts), chunk):
        lengths = [min(max(c - start, 0), chunk) for c in contexts]
        (k, v), _ = keys(table[:, start // page_size :], lengths)
        part = tilefuse.mla_attention(q, k, v, bounds(new), bounds(lengths), causal=False, **options)
        merged = tilefuse.merge_attention(*part, *merged)
    for a, b in zip(merged, whole):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
def test_17_more_than_a_million_tokens():
    q, k, v = (normal(1_100_000, 1, d, device="cuda") for d in (48, 48, 32))
    bounds = torch.arange(0, 1_100_001, 50, device="cuda", dtype=torch.int32)
    out, lse = tilefuse.mla_attention(q, k, v, bounds, bounds, softmax_scale=0.1)
    few = bounds[:2].contiguous()
    alone = tilefuse.mla_attention(q[-50:], k[-50:], v[-50:], few, few, softmax_scale=0.1)
    assert_bit_equal(out[-50:], alone[0])
    assert_bit_equal(lse[:, -50:], alone[1])


Q, K, V = torch.zeros(2, 5, 3, 48), torch.zeros(2, 7, 3, 48), torch.zeros(2, 7, 3, 32)
BOUNDS = torch.tensor([0, 5])
PACKED = {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS}
ERRORS = {
    "rank": ({"q": Q[0, 0]}, ValueError, r"q must be \[B, Sq, H, D\] or \[Tq, H, D\]"),
    "dtype": ({"q": Q.int()}, TypeError, "q must be float32 or"),
    "grouped": ({"k": K[:, :, :1], "v": V[:, :, :1]}, ValueError, "k must be .* with as many heads as q"),
    "v_heads": ({"v": V[:, :, :1]}, ValueError, "v must be .* with as many heads as q"),
    "k_width": ({"k": K[..., :40]}, ValueError, r"k must be \[2, Sk, 3, 48\]"),
    "k_dtype": ({"k": K.half()}, TypeError, "k must be of q's dtype float32"),
    "v_rows": ({"v": V[:, :6]}, ValueError, "v must be of as many rows as k, 7"),
    "v_width": ({"v": V[..., :0]}, ValueError, "v must be of a head dim > 0"),
    "device": ({"v": V.to("meta")}, ValueError, "v must be on the device of q"),
    "bounds": ({"cu_seqlens_q": BOUNDS}, ValueError, "cu_seqlens_q must be None unless q is packed"),
    "packed": ({**PACKED, "cu_seqlens_k": None}, ValueError, r"cu_seqlens_k must be \[B \+ 1\] int32 or int64 with"),
    "packed_shapes": ({**PACKED, "cu_seqlens_k": torch.zeros(3).int()}, ValueError, r"cu_seqlens_k must be \[2\]"),
    "packed_dtype": ({**PACKED, "cu_seqlens_q": BOUNDS.float()}, TypeError, r"cu_seqlens_q must be \[2\] int32"),
    "scale": ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be positive"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_attention, torch.ops.tilefuse.mla_attention], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    with pytest.raises(error, match=f"^tilefuse.mla_attention: {message}"):
        call(**{"q": Q, "k": K, "v": V, "softmax_scale": 1.0} | edit)


def test_19_opcheck_and_compile():
    args, options = case("fewer_keys")
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    rest = (None, None, options["softmax_scale"], True)
    torch.library.opcheck(torch.ops.tilefuse.mla_attention_fwd.default, (*args[:3], *rest))
    torch.library.opcheck(torch.ops.tilefuse.mla_attention.default, (*leaves, None, None), options)
    step = torch.compile(tilefuse.mla_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(step, args, options), run(tilefuse.mla_attention, args, options)):
        assert_bit_equal(a, b)


def test_19_compiles_once_for_every_length():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda q, k, v: tilefuse.mla_attention(q, k, v, softmax_scale=0.2)[0],
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for length in (5, 9, 14):
        q, k = (torch.randn(2, length, 3, 24) for _ in range(2))
        v = torch.randn(2, length, 3, 16)
        assert_bit_equal(compiled(q, k, v), tilefuse.mla_attention(q, k, v, softmax_scale=0.2)[0])
    assert len(graphs) == 1
