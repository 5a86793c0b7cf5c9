"""``mla_decode`` and ``mla_sparse_decode``. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tilefuse
from tilefuse import arch, library
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.mla.common import WILD, normal, tables
from tilefuse.testing.inputs.mla.mla_decode import SCALE_V3, cases, sparse_cases
from tilefuse.testing.inputs.mla.mla_decode import case as make

KERNEL = "mla_decode_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
SPARSE = [case[0] for case in sparse_cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def find(found, name):
    return next(c[1:] for c in found if c[0] == name)


def rows_of(cache, slots, rank, layout, dtype):
    """Dequantised rows, byte by byte from the documentation of the layout."""
    rows = cache[slots // cache.shape[1], slots % cache.shape[1]].cpu()
    if layout == "bf16":
        return rows.to(dtype)
    codes = rows[:, :rank].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[:, rank : rank + rank // 32].contiguous().view(torch.float32).double()
    rotated = rows[:, rank + rank // 32 :].contiguous()
    rotated = rotated.view(torch.bfloat16).double() if rotated.shape[1] else rotated.double()
    return torch.cat((codes * scales.repeat_interleave(128, 1), rotated), 1).to(dtype)


def one_row(q, rows, sink, scale, rank):
    """One query of one head over its keys, in q's dtype: out [R] and lse."""
    if rows.shape[0] == 0:
        return torch.zeros(rank, dtype=q.dtype), torch.tensor(-math.inf, dtype=q.dtype)
    scores = (rows @ q) * scale
    lse = torch.logsumexp(scores, 0)
    top = scores.max()
    weights = torch.exp(scores - top)
    total = weights.sum() + (0 if sink is None else torch.exp(sink.to(q.dtype) - top))
    return (weights / total) @ rows[:, :rank], lse


def oracle(
    q,
    cache,
    table,
    lens,
    sinks=None,
    *,
    softmax_scale,
    kv_lora_rank=512,
    causal=True,
    window=-1,
    layout="bf16",
    num_splits=0,
    dtype=torch.float64,
):
    batch, queries, heads, _ = q.shape
    q, table = q.cpu().to(dtype), table.cpu().long()
    out = torch.zeros(batch, queries, heads, kv_lora_rank, dtype=dtype)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=dtype)
    for b in range(batch):
        length = int(lens[b])
        key = torch.arange(length)
        rows = (
            rows_of(
                cache,
                table[b, key // cache.shape[1]] * cache.shape[1] + key % cache.shape[1],
                kv_lora_rank,
                layout,
                dtype,
            )
            if length
            else torch.zeros(0, q.shape[-1], dtype=dtype)
        )
        for j in range(queries):
            own = length - queries + j
            last = own + 1 if causal else length
            first = max(own - window, 0) if window >= 0 else 0
            for h in range(heads):
                out[b, j, h], lse[b, h, j] = one_row(
                    q[b, j, h],
                    rows[first : max(last, 0)],
                    None if sinks is None else sinks.cpu()[h],
                    softmax_scale,
                    kv_lora_rank,
                )
    return out, lse


def sparse_oracle(
    q, cache, indices, sinks=None, *, softmax_scale, kv_lora_rank=512, layout="bf16", dtype=torch.float64
):
    batch, queries, heads, _ = q.shape
    q, indices = q.cpu().to(dtype), indices.cpu().long()
    out = torch.zeros(batch, queries, heads, kv_lora_rank, dtype=dtype)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=dtype)
    for b in range(batch):
        for j in range(queries):
            slots = [s for s in indices[b, j].tolist() if 0 <= s < cache.shape[0] * cache.shape[1]]
            rows = rows_of(cache, torch.tensor(slots, dtype=torch.int64), kv_lora_rank, layout, dtype)
            for h in range(heads):
                sink = None if sinks is None else sinks.cpu()[h]
                out[b, j, h], lse[b, h, j] = one_row(q[b, j, h], rows, sink, softmax_scale, kv_lora_rank)
    return out, lse


def compare(function, formula, args, options, scores=torch.float32):
    with poisoned():
        got = function(*args, **options)
    q = args[0]
    assert got[0].shape == (*q.shape[:3], options["kv_lora_rank"]) and got[0].dtype == q.dtype
    assert got[1].shape == (q.shape[0], q.shape[2], q.shape[1]) and got[1].dtype == torch.float32
    assert got[0].is_contiguous() and got[1].is_contiguous()
    exact = formula(*args, **options)
    naive = formula(*args, **options, dtype=q.dtype)
    # float32 scores are rounded at their own magnitude, of which the largest lse is a measure
    largest = exact[1][exact[1].isfinite()].abs().max() if exact[1].isfinite().any() else 0.0
    tiny = float(2**-22 * (1 + largest)) if q.dtype == torch.float32 else None
    assert_close(got[0], exact[0], naive[0], tiny=tiny)
    # scores are float32 whatever q is, unless keys had to be rounded
    assert_close(got[1], exact[1], formula(*args, **options, dtype=scores)[1], tiny=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_3_matches_oracle(name, dtype, where):
    """Unused rows and pages are NaN, table tails wild (known bug 3)."""
    args, options = find(cases(where, dtype), name)
    compare(tilefuse.mla_decode, oracle, args, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_13_sparse_matches_oracle(name, dtype, where):
    args, options = find(sparse_cases(where, dtype), name)
    compare(tilefuse.mla_sparse_decode, sparse_oracle, args, options)


@pytest.mark.parametrize("heads", [1, 3, 9, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_1_heads_and_queries(heads, queries, where):
    args, options = make(where, torch.bfloat16, [20, 33][: 2 if heads < 64 else 1], heads=heads, queries=queries)
    compare(tilefuse.mla_decode, oracle, args, options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [[20], [140, 7], [4096, 4096, 1, 0, 77, 4000], [300] * 64], ids=lambda n: f"B{len(n)}"
)
@pytest.mark.parametrize("heads", [1, 3, 9, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_1_grid_on_a_gpu(queries, heads, lengths, causal, dtype):
    args, options = make("cuda", dtype, lengths, queries=queries, heads=heads, rank=512, page_size=64, causal=causal)
    out, lse = tilefuse.mla_decode(*args, **options)
    with tilefuse.backend("reference"):
        exact = tilefuse.mla_decode(
            *(t.double() if t is not None and t.is_floating_point() else t for t in args), **options
        )
        naive = tilefuse.mla_decode(*args, **options)
    assert_close(out, exact[0], naive[0])
    torch.testing.assert_close(lse, exact[1].float(), rtol=1e-5, atol=2e-5)


def test_2_mostly_empty_batch(where):
    lengths = [0] * 128
    lengths[5], lengths[90] = 17, 1
    args, options = make(where, torch.bfloat16, lengths, heads=2, page_size=16)
    compare(tilefuse.mla_decode, oracle, args, options)


def absorbed_and_full(where, dtype, heads, nope, v_dim, rank, rope, scale, layout):
    """Decode over the compressed cache, and attention over full keys and values, of one small sequence."""
    length, page_size = 37, 16
    kv_a = normal(length, rank + rope, device=where, dtype=dtype)
    weight = torch.ones(rank, device=where, dtype=dtype)
    cos, sin = tables(rope, length, where)
    position = torch.arange(length, device=where)
    wide = torch.uint8 if layout == "fp8" else dtype
    width = rank + rank // 32 + 2 * rope if layout == "fp8" else rank + rope
    cache = torch.zeros(4, page_size, width, device=where, dtype=wide)
    slots = position + page_size
    tilefuse.mla_append_kv(kv_a, weight, cos, sin, position, cache, slots, layout=layout)
    w_ukv = normal(heads * (nope + v_dim), rank, device=where, dtype=torch.float64) * rank**-0.5
    w_ukv = w_ukv.to(dtype)
    w_uk, w_uv = w_ukv.view(heads, nope + v_dim, rank).split((nope, v_dim), 1)
    q = normal(2, heads, nope + rope, device=where, dtype=dtype)
    last_two = position[-2:]
    q_absorbed = tilefuse.mla_absorb_query(q, w_uk, cos, sin, last_two).unsqueeze(0)
    table = torch.tensor([[1, 2, 3]], device=where, dtype=torch.int32)
    lens = torch.tensor([length], device=where, dtype=torch.int32)
    out, lse = tilefuse.mla_decode(
        q_absorbed, cache, table, lens, softmax_scale=scale, kv_lora_rank=rank, layout=layout
    )
    absorbed = torch.einsum("bqhr,hvr->bqhv", out, w_uv)
    latent = tilefuse.mla_gather_kv(
        cache,
        table,
        torch.tensor([0, length], device=where),
        total_tokens=length,
        kv_lora_rank=rank,
        layout=layout,
        out_dtype=dtype,
    )
    k, v = tilefuse.mla_expand_kv(latent, w_ukv, kv_lora_rank=rank, nope_dim=nope, v_dim=v_dim)
    q_rope = tilefuse.rope(q, cos, sin, last_two, interleaved=True, rotary_offset=nope) if rope else q
    full = tilefuse.mla_attention(q_rope.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), softmax_scale=scale)
    return (absorbed, lse), full


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
@pytest.mark.parametrize("heads", [16, 128], ids=["v2_lite", "v3"])
def test_4_absorbed_equals_full_attention(heads, layout):
    """DeepSeek-V2-Lite's and V3's dimensions in float64; the scale is that of width 192."""
    m = 0.1 * (1.0 if heads == 128 else 0.707) * math.log(40) + 1
    scale = 192**-0.5 * m * m
    assert scale == pytest.approx(SCALE_V3 if heads == 128 else 0.1147214, rel=1e-6)
    with tilefuse.backend("reference"):
        absorbed, full = absorbed_and_full("cpu", torch.float64, heads, 128, 128, 512, 64, scale, layout)
    torch.testing.assert_close(absorbed[0], full[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(absorbed[1].double(), full[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [(16, 128, 128, 512, 64), (2, 64, 128, 256, 64), (2, 256, 256, 512, 0)], ids=str)
@pytest.mark.parametrize(
    ("backend", "device"), [("auto", "cpu"), ("triton", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
def test_4_absorbed_equals_full_attention_in_float32(backend, device, dims):
    """Also R = 256, and no RoPE at all (known bug 5)."""
    with tilefuse.backend(backend):
        absorbed, full = absorbed_and_full(device, torch.float32, *dims, SCALE_V3, "bf16")
    torch.testing.assert_close(absorbed[0], full[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("backend", "device"), [("auto", "cpu"), ("triton", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
def test_4_absorbed_equals_full_attention_in_bfloat16(backend, device, layout):
    """Both forms round in other places: their difference is of the size of the full form's own error."""
    dims = (16, 128, 128, 512, 64, SCALE_V3, layout)
    with tilefuse.backend(backend):
        absorbed, full = absorbed_and_full(device, torch.bfloat16, *dims)
    out, right = absorbed[0].float(), full[0].float()
    assert (out - right).square().mean().sqrt() < 2**-7 * right.square().mean().sqrt()
    torch.testing.assert_close(absorbed[1], full[1], rtol=0, atol=2e-2)


def test_7_arbitrary_scales_are_read(where):
    args, options = find(cases(where, torch.bfloat16), "deepseek_fp8")
    cache = args[1]
    scales = cache[..., 512:528].contiguous().view(torch.float32)
    cache[..., 512:528] = (scales * 1.2345).view(torch.uint8)
    # a code times a scale that is no power of two is rounded to q's dtype
    compare(tilefuse.mla_decode, oracle, args, options, scores=torch.bfloat16)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_9_pages_past_2_31_elements(layout, where):
    dtype, kind = torch.bfloat16, torch.uint8 if layout == "fp8" else torch.bfloat16
    (q, cache, table, lens, _), options = make(where, dtype, [30], heads=2, layout=layout, page_size=16)
    width = cache.shape[2]
    far = 2**31 // 32 * 32 + 4096
    base = torch.empty(far + 16 * width, dtype=kind, device=where)
    wide = base.as_strided((2, 16, width), (far, width, 1))
    for i in range(2):
        wide[i] = cache[int(table[0, i])]
    moved = torch.tensor([[0, 1, WILD, WILD]], device=where, dtype=torch.int32)
    out = tilefuse.mla_decode(q, wide, moved, lens, **options)
    for a, b in zip(out, tilefuse.mla_decode(q, cache, table, lens, **options)):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_9_listed_rows_past_2_31_elements(layout, where):
    (q, cache, table, _, _), options = make(where, torch.bfloat16, [40], heads=2, layout=layout, page_size=16)
    width = cache.shape[2]
    # a stride that fits int32: a product of two int32 would wrap at the third page
    far = 2**30 + 4096
    wide = torch.empty(2 * far + 16 * width, dtype=cache.dtype, device=where).as_strided(
        (3, 16, width), (far, width, 1)
    )
    wide.copy_(cache[table[0, :3].long()])
    near = torch.arange(40, device=where).view(1, 1, 40)
    expected = tilefuse.mla_sparse_decode(q, wide.contiguous(), near, **options)
    for a, b in zip(tilefuse.mla_sparse_decode(q, wide, near, **options), expected):
        assert_bit_equal(a, b)


def test_wild_table_entry_inside_a_sequence_is_no_key(where):
    (q, cache, table, lens, _), options = make(where, torch.float32, [48, 48], heads=2, page_size=16)
    for b, page in ((0, -1), (1, WILD)):
        table[b, 1] = page
    out, lse = tilefuse.mla_decode(q, cache, table, lens, **options)
    short = table.clone()
    short[:, 1] = table[:, 2]
    expected = tilefuse.mla_decode(q, cache, short, lens - 16, **options)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_length_past_the_table_is_clamped(where):
    (q, cache, table, lens, _), options = make(where, torch.float32, [48, 48], heads=2, page_size=16)
    table = table[:, :3]
    expected = tilefuse.mla_decode(q, cache, table, lens, **options)
    for a, b in zip(tilefuse.mla_decode(q, cache, table, lens + 1000, **options), expected):
        assert_bit_equal(a, b)
    out, lse = tilefuse.mla_decode(q, cache, table, lens * 0 - 5, **options)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_14_sinks(where):
    """+-inf are legal, a sink without keys gives 0, lse does not change."""
    (q, cache, table, lens, _), options = make(where, torch.float32, [20, 0], heads=4, page_size=16)
    plain = tilefuse.mla_decode(q, cache, table, lens, **options)
    for splits in (1, 3):
        sinks = torch.tensor([-math.inf, math.inf, 0.0, float(plain[1][0, 3, 0])], device=where)
        out, lse = tilefuse.mla_decode(q, cache, table, lens, sinks, **options, num_splits=splits)
        torch.testing.assert_close(lse, plain[1])
        torch.testing.assert_close(out[0, :, 0], plain[0][0, :, 0])
        assert (out[0, :, 1] == 0).all()
        torch.testing.assert_close(out[0, :, 3], plain[0][0, :, 3] / 2)
        assert (out[1] == 0).all() and (lse[1] == -math.inf).all()


def test_15_splits(where):
    """Many splits agree with one; two runs are bit-equal; with fixed splits a row does not see its batch."""
    lengths = [700, 3, 130]
    (q, cache, table, lens, _), options = make(where, torch.float32, lengths, heads=2, page_size=64)
    one = tilefuse.mla_decode(q, cache, table, lens, **options, num_splits=1)
    for splits in (0, 2, 5, 100):
        got = tilefuse.mla_decode(q, cache, table, lens, **options, num_splits=splits)
        again = tilefuse.mla_decode(q, cache, table, lens, **options, num_splits=splits)
        for a, b, c in zip(got, again, one):
            assert_bit_equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        if splits:
            order = torch.tensor([2, 0], device=where)
            fewer = tilefuse.mla_decode(q[order], cache, table[order], lens[order], **options, num_splits=splits)
            for a, b in zip(fewer, got):
                assert_bit_equal(a, b[order])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_15_a_long_sequence_in_many_splits(layout):
    (q, cache, table, lens, _), options = make(
        "cuda", torch.bfloat16, [131072], heads=16, rank=512, page_size=64, layout=layout
    )
    one = tilefuse.mla_decode(q, cache, table, lens, **options, num_splits=1)
    for splits in (0, 64):
        got = tilefuse.mla_decode(q, cache, table, lens, **options, num_splits=splits)
        torch.testing.assert_close(got[0], one[0], rtol=2**-7, atol=2e-4)
        torch.testing.assert_close(got[1], one[1], rtol=1e-6, atol=1e-5)


def test_15_sparse_does_not_see_its_batch(where):
    (q, cache, indices, sinks), options = find(sparse_cases(where, torch.bfloat16), "sparse_bf16")
    whole = tilefuse.mla_sparse_decode(q, cache, indices, sinks, **options)
    part = tilefuse.mla_sparse_decode(q[1:], cache, indices[1:], sinks, **options)
    for a, b in zip(whole, part):
        assert_bit_equal(a[1:], b)


@pytest.mark.parametrize(("queries", "heads"), [(40, 2), (1024, 1)])
def test_16_many_queries(queries, heads, where):
    if queries > 64 and where == "cpu" and tilefuse.backend() == "triton":
        pytest.skip("a tile per row is slow in the interpreter")
    args, options = make(where, torch.float32, [70], queries=queries, heads=heads)
    compare(tilefuse.mla_decode, oracle, args, options)


@pytest.mark.parametrize("page_size", [2, 16, 61, 64, 69, 576])
def test_13_sparse_equals_dense(page_size, where):
    (q, cache, table, lens, _), options = make(where, torch.float32, [40, 40], heads=3, page_size=page_size)
    key = torch.arange(40, device=where)
    slots = table[:, key // page_size].long() * page_size + key % page_size
    dense = tilefuse.mla_decode(q, cache, table, lens, **options)
    options.pop("num_splits", None)
    sparse = tilefuse.mla_sparse_decode(q, cache, slots.unsqueeze(1), **options)
    for a, b in zip(sparse, dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_13_many_sparse_queries_on_a_gpu():
    """More rows than one dimension of a grid usually holds."""
    (q, cache, indices, _), options = find(sparse_cases("cuda", torch.bfloat16), "longer_than_keys_bf16")
    many = 70000
    q, indices = q[:1].expand(1, -1, -1, -1), indices[1:2]
    out, lse = tilefuse.mla_sparse_decode(q.repeat(1, many, 1, 1), cache, indices.repeat(1, many, 1), **options)
    one = tilefuse.mla_sparse_decode(q, cache, indices, **options)
    assert_bit_equal(out, one[0].expand_as(out).contiguous())
    assert_bit_equal(lse, one[1].expand_as(lse).contiguous())


@pytest.mark.gpu
def test_12_cuda_graph_replay_with_other_lengths(assert_replays):
    (q, cache, table, lens, _), options = make(
        "cuda", torch.bfloat16, [4000, 3000, 2000], heads=16, rank=512, page_size=64, queries=2
    )
    lengths = torch.tensor([[1, 0, 2000], [4000, 3000, 2000], [64, 2999, 5]])
    assert_replays(lambda: tilefuse.mla_decode(q, cache, table, lens, **options), lens, lengths)


def change(**values):
    return lambda a: a.update(values)


Q = torch.zeros(2, 1, 3, 192)
ERRORS = {
    "rank": (change(q=Q[0]), ValueError, r"q must be \[B, Sq, H, R \+ r\], absorbed, got \[1, 3, 192\]"),
    "dtype": (change(q=Q.int()), TypeError, "q must be float32 or"),
    "width": (change(q=Q[..., :180]), ValueError, r"q must be \[B, Sq, H, 128 \+ 64\] for this cache, absorbed"),
    "cache": (change(cache=torch.zeros(4, 192)), ValueError, r"cache must be \[pages, page_size, width\]"),
    "cache_dtype": (change(cache=torch.zeros(4, 16, 192).half()), TypeError, "cache must be of q's dtype float32"),
    "cache_device": (change(cache=torch.zeros(4, 16, 192, device="meta")), ValueError, "cache must be on the device"),
    "layout": (change(layout="fp4"), ValueError, "layout must be one of"),
    "kv_lora_rank": (change(kv_lora_rank=500), ValueError, r"cache must be \[pages, page_size, R \+ r\] with R = 500"),
    "table": (change(block_table=torch.zeros(3, 4).int()), ValueError, r"block_table must be \[2, max_pages\]"),
    "table_dtype": (change(block_table=torch.zeros(2, 4)), TypeError, r"block_table must be \[2, 4\] int32 or int64"),
    "lens": (change(seq_lens=torch.zeros(3).int()), ValueError, r"seq_lens must be \[2\] int32 or int64"),
    "lens_dtype": (change(seq_lens=torch.zeros(2)), TypeError, r"seq_lens must be \[2\] int32 or int64"),
    "sinks": (change(sinks=torch.zeros(4)), ValueError, r"sinks must be \[3\] float32, got \[4\]"),
    "sinks_dtype": (change(sinks=torch.zeros(3).half()), TypeError, r"sinks must be \[3\] float32"),
    "window": (change(window=-2), ValueError, "window must be >= -1, got -2"),
    "num_splits": (change(num_splits=-1), ValueError, "num_splits must be >= 0, got -1"),
    "scale": (change(softmax_scale=0.0), ValueError, "softmax_scale must be positive"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_decode, torch.ops.tilefuse.mla_decode], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    arguments = {
        "q": Q,
        "cache": torch.zeros(4, 16, 192),
        "block_table": torch.zeros(2, 4).int(),
        "seq_lens": torch.ones(2).int(),
        "softmax_scale": 1.0,
        "kv_lora_rank": 128,
    }
    edit(arguments)
    with pytest.raises(error, match=f"^tilefuse.mla_decode: {message}"):
        call(**arguments)


def test_4_there_is_no_default_scale():
    with pytest.raises(TypeError, match="softmax_scale"):
        tilefuse.mla_decode(Q, torch.zeros(4, 16, 192), torch.zeros(2, 4).int(), torch.ones(2).int(), kv_lora_rank=128)


def test_errors_of_sparse():
    cache, indices = torch.zeros(4, 16, 192), torch.zeros(2, 1, 5).int()
    options = {"softmax_scale": 1.0, "kv_lora_rank": 128}
    for bad, error in ((indices[0], ValueError), (indices[:1], ValueError), (indices.float(), TypeError)):
        with pytest.raises(error, match=r"^tilefuse.mla_sparse_decode: indices must be"):
            tilefuse.mla_sparse_decode(Q, cache, bad, **options)
    with pytest.raises(ValueError, match=r"^tilefuse.mla_sparse_decode: q must be"):
        tilefuse.mla_sparse_decode(Q[..., :100], cache, indices, **options)


def test_18_no_gradient():
    """Instead of scattering a gradient to the rows that -1 stands for."""
    q = Q.clone().requires_grad_()
    cache, options = torch.zeros(4, 16, 192), {"softmax_scale": 1.0, "kv_lora_rank": 128}
    with pytest.raises(RuntimeError, match="decode has no backward, but q requires grad"):
        tilefuse.mla_decode(q, cache, torch.zeros(2, 4).int(), torch.ones(2).int(), **options)
    with pytest.raises(RuntimeError, match="decode has no backward, but q requires grad"):
        tilefuse.mla_sparse_decode(q, cache, torch.zeros(2, 1, 5).int(), **options)


def test_19_opcheck_and_compile():
    args, options = find(cases("cpu", torch.float32), "queries_bf16")
    rest = (options["softmax_scale"], options["kv_lora_rank"], True, -1, "bf16", 0)
    torch.library.opcheck(torch.ops.tilefuse.mla_decode_fwd.default, (*args, *rest))
    torch.library.opcheck(torch.ops.tilefuse.mla_decode.default, args, options)
    sparse, more = find(sparse_cases("cpu", torch.float32), "sparse_bf16")
    torch.library.opcheck(
        torch.ops.tilefuse.mla_sparse_decode_fwd.default, (*sparse, more["softmax_scale"], 128, "bf16")
    )
    torch.library.opcheck(torch.ops.tilefuse.mla_sparse_decode.default, sparse, more)
    for function, inputs, keywords in (
        (tilefuse.mla_decode, args, options),
        (tilefuse.mla_sparse_decode, sparse, more),
    ):
        step = torch.compile(lambda *a, f=function, k=keywords: f(*a, **k), fullgraph=True, backend="aot_eager")
        for a, b in zip(step(*inputs), function(*inputs, **keywords)):
            assert_bit_equal(a, b)


def test_latents_that_do_not_fit_a_gpu_are_refused():
    """More than 512 columns in float32 need 136 KiB of shared memory, more than 1024 never fit."""
    refuse = library.kernels()["mla_decode_fwd"].when["triton"]
    with FakeTensorMode():
        q = {dtype: torch.empty(2, 1, 16, 128, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float32)}

    def reason(dtype, rank, target):
        with arch.pretend(target):
            return refuse(q[dtype], None, None, None, None, 1.0, rank, True, -1, "bf16", 0)

    for target in arch.COMPILE_TARGETS:
        assert reason(torch.bfloat16, 1024, target) is None and reason(torch.float32, 512, target) is None
        assert "up to 1024, got 1025" in reason(torch.bfloat16, 1025, target)
    assert reason(torch.float32, 1024, "sm_90") is None
    assert reason(torch.float32, 513, "sm_89") == "takes kv_lora_rank up to 512 in float32 on sm_89, got 513"
