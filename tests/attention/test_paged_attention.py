"""``paged_attention``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.reference.attention.window_attention import window_mask
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.attention.dense import dense_attention
from tilefuse.testing.inputs.attention.paged_attention import FP8, cases, paged
from tilefuse.testing.inputs.attention.window_attention import normal

case = by_name(cases)
KERNEL = "paged_attention_fwd"
# the same code paths run in the other tests
QUICK = pytest.mark.slow_in_interpreter
CASES = [case[0] for case in cases("cpu", torch.float32)]


def small_chunks(monkeypatch, keys=32):
    """Several chunks in a small case."""
    from tilefuse.triton_kernels.attention import paged_attention

    monkeypatch.setattr(paged_attention, "CHUNK", keys)


def dense(tensors, others, options, dtype):
    """Gathers each sequence's keys and attends densely, in the given dtype."""
    q, k_cache, v_cache, table, lengths = tensors
    window = options.get("window", (-1, 0))
    outs, lses = [], []
    for b, n in enumerate(lengths.tolist()):
        t = torch.arange(n, device=q.device)
        page = table[b].long()[t // k_cache.shape[1]]
        k = k_cache[page, t % k_cache.shape[1]].to(dtype) * options.get("k_scale", 1.0)
        v = v_cache[page, t % k_cache.shape[1]].to(dtype) * options.get("v_scale", 1.0)
        mask = window_mask(q.shape[1], n, window, device=q.device)
        more = {name: x.to(torch.float64) if dtype == torch.float64 else x for name, x in others.items()}
        out, lse = dense_attention(
            q[b : b + 1].to(dtype),
            k[None],
            v[None],
            mask,
            scale=options.get("scale"),
            softcap=options.get("softcap", 0.0),
            **more,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        return q.new_zeros(*q.shape[:3], v_cache.shape[-1], dtype=dtype), q.new_zeros(
            0, q.shape[2], q.shape[1], dtype=dtype
        )
    return torch.cat(outs), torch.cat(lses)


def check(tensors, others, options, *, batch_last=False):
    with poisoned():
        out, lse = tilefuse.paged_attention(*tensors, **others, **options)
    exact, exact_lse = dense(tensors, others, options, torch.float64)
    naive, naive_lse = dense(tensors, others, options, tensors[0].dtype)
    assert out.dtype == tensors[0].dtype and lse.dtype == torch.float32
    assert_close(out, exact, naive, name="out")
    # the lse of a single key may be next to 0, which a softcap's rounding is not relative to
    lses = (x.movedim(0, -1) if batch_last else x for x in (lse, exact_lse.double(), naive_lse))
    assert_close(*lses, name="lse")


@pytest.mark.parametrize("chunk", [32, 512])
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, chunk, device, monkeypatch):
    small_chunks(monkeypatch, chunk)
    check(*case(name, device))


@QUICK
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["decode", "odd_pages", "several_queries", "fp8", "sinks"])
def test_matches_oracle_in_half(name, dtype, device, monkeypatch):
    small_chunks(monkeypatch)
    check(*case(name, device, dtype))


def test_half_in_triton(triton_backend, monkeypatch):
    small_chunks(monkeypatch)
    check(*case("odd_pages", dtype=torch.bfloat16))
    check(*case("fp8", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    tensors, others, options = case(name, dtype=torch.float64)
    others = {n: t.double() for n, t in others.items()}
    with tilefuse.backend("reference"):
        out, lse = tilefuse.paged_attention(*tensors, **others, **options)
    exact, exact_lse = dense(tensors, others, options, torch.float64)
    torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse.double(), rtol=1e-11, atol=1e-12)


def test_12_every_float8_value(device):
    """A cache of all 256 codes: a single visible key hands its values through, NaN in its own column only."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    v = codes.view(1, 1, 1, 256)
    k = torch.zeros(1, 1, 1, 16, device=device).to(FP8)
    q = torch.ones(1, 1, 1, 16, device=device, dtype=torch.bfloat16)
    table, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0]], [1]))
    out, _ = tilefuse.paged_attention(q, k, v, table, lengths)
    torch.testing.assert_close(out[0, 0, 0].float(), codes.float(), rtol=0, atol=0, equal_nan=True)


def test_16_stale_pages(device, monkeypatch):
    """NaN and inf in unused slots, in pages of nobody and behind entries past the end never reach an output."""
    small_chunks(monkeypatch)
    q, k, v, table, lengths = case("decode", device)[0]
    out, lse = tilefuse.paged_attention(q, k, v, table, lengths)
    clean_k, clean_v = (torch.nan_to_num(x, nan=0.0) for x in (k, v))
    same, same_lse = tilefuse.paged_attention(
        q, clean_k, clean_v, table.clamp(max=0) * 0 + table.where(table < k.shape[0], 0), lengths
    )
    assert out.isfinite().all()
    assert_bit_equal(out, same)
    assert_bit_equal(lse, same_lse)


def test_16_hostile_table(device):
    """Pages that do not exist hide their keys; lengths past the table are clamped."""
    q, k, v, table, lengths = case("decode", device)[0]
    k, v = torch.nan_to_num(k), torch.nan_to_num(v)
    bad = table.clone()
    bad[0, 1], bad[1, 0] = -3, 10**6
    out, lse = tilefuse.paged_attention(q, k, v, bad, lengths)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all() and out.isfinite().all()
    tilefuse.paged_attention(q, k, v, table.clamp(max=k.shape[0] - 1), lengths + 10**6)
    out, lse = tilefuse.paged_attention(q, k, v, table, lengths - 10**6)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_17_window_spans_the_whole_tile(device, monkeypatch):
    """Every query of a tile needs its own window, also across chunks."""
    small_chunks(monkeypatch, 16)
    tensors = paged([100, 64], 20, 4, 1, 16, 16, 16, device=device)
    check(tensors, {}, {"window": (16, 0)})
    check(tensors, {}, {"window": (3, 2)})


@QUICK
def test_18_equals_window_attention(device):
    """A decode step over pages is the last row of the sequence's own attention."""
    n, page_size = 50, 8
    q, k, v = (
        normal(1, n, 4, 16, device=device),
        normal(1, n, 2, 16, device=device, seed=1),
        normal(1, n, 2, 16, device=device, seed=2),
    )
    pages = -(-n // page_size)
    caches = [
        torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, pages * page_size - n)).unflatten(0, (pages, page_size))
        for x in (k, v)
    ]
    table = torch.arange(pages, dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([n], dtype=torch.int32, device=device)
    sinks = normal(4, device=device)
    expected, expected_lse = tilefuse.window_attention(q, k, v, sinks, window=(15, 0))
    for sq in (1, 3):
        out, lse = tilefuse.paged_attention(q[:, -sq:], *caches, table, lengths, sinks, window=(15, 0))
        torch.testing.assert_close(out, expected[:, -sq:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected_lse[..., -sq:], rtol=1e-5, atol=1e-6)


def test_20_25_deterministic_and_batch_invariant(device, monkeypatch):
    small_chunks(monkeypatch)
    q, k, v, table, lengths = case("several_queries", device, torch.bfloat16)[0]
    out, lse = tilefuse.paged_attention(q, k, v, table, lengths, window=(10, 0))
    again, _ = tilefuse.paged_attention(q, k, v, table, lengths, window=(10, 0))
    assert_bit_equal(out, again)
    for b in range(3):
        alone, alone_lse = tilefuse.paged_attention(
            q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1], window=(10, 0)
        )
        assert_bit_equal(alone, out[b : b + 1])
        assert_bit_equal(alone_lse, lse[b : b + 1])


@QUICK
def test_15_strides(device):
    """Caches with heads before slots, int64 indices with strides, q from a fused projection."""
    q, k, v, table, lengths = case("decode", device)[0]
    expected = tilefuse.paged_attention(q, k, v, table, lengths)
    k2, v2 = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    fused = torch.cat([q, q], 2)[:, :, : q.shape[2]]
    wide = torch.stack([table, table], -1).long()[..., 0]
    for a, b in zip(tilefuse.paged_attention(fused, k2, v2, wide, lengths.long()), expected):
        assert_bit_equal(a, b)


@QUICK
@pytest.mark.parametrize(("dim", "group"), [(40, 3), (80, 7), (112, 8), (192, 1), (256, 16)])
def test_12_13_head_dims_and_group_sizes(dim, group, device, monkeypatch):
    small_chunks(monkeypatch)
    check(paged([40, 7], 2, group, 1, dim, 48, 16, device=device, dtype=torch.bfloat16), {}, {"window": (20, 0)})


def test_14_offsets_past_int32(device):
    """Pages 2**30 elements apart; untouched pages of the allocation cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    memory = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    near = [normal(3, 4, 1, 16, device=device, dtype=torch.bfloat16, seed=i) for i in (1, 2)]
    far = [memory[64 * i :].as_strided((3, 4, 1, 16), (2**30, 16, 16, 1)).copy_(x) for i, x in enumerate(near)]
    q = normal(1, 1, 1, 16, device=device, dtype=torch.bfloat16)
    table, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[2, 0, 1]], [12]))
    for a, b in zip(*(tilefuse.paged_attention(q, *caches, table, lengths) for caches in (near, far))):
        assert_bit_equal(a, b)


def meta(batch, sq, heads, kv_heads, dim, width, page_size=64):
    """A call of any size that holds no memory."""
    q = torch.empty(batch, sq, heads, dim, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(batch * width, page_size, kv_heads, dim, dtype=torch.bfloat16, device="meta")
    table, lengths = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((batch, width), (batch,)))
    return q, cache, cache, table, lengths, None, None, -1, 0, 0.1, 0.0, 1.0, 1.0


@pytest.mark.parametrize("sizes", [(32, 4096, 32, 8, 128, 64), (2048, 1, 32, 32, 128, 64), (1, 1, 8, 8, 64, 10**5)])
def test_grids_fit(sizes, record_launches):
    """A grid's second axis ends at 65,535; the first is for what grows with batch, heads and queries."""
    launches = record_launches("paged_attention")
    from tilefuse.triton_kernels.attention import paged_attention

    paged_attention.paged_attention_fwd(*meta(*sizes))
    assert launches and all(n <= 65535 for _, grid, _ in launches for n in grid[1:])


def test_prefill_is_not_split(record_launches):
    """Tiles of many queries fill a GPU: their keys are one chunk, and no partial results exist."""
    launches = record_launches("paged_attention")
    from tilefuse.triton_kernels.attention import paged_attention

    out, lse = paged_attention.paged_attention_fwd(*meta(1, 1024, 32, 8, 128, 2048))
    ((_, grid, args),) = launches
    assert grid[1] == 1 and args[3] is out and args[4] is lse


@pytest.mark.parametrize("sq", [1, 4, 16, 64, 127, 128])
def test_parts_are_smaller_than_keys(sq, record_launches):
    """Partial results, float32 for each chunk, are bounded by the keys and values that the table has room for."""
    launches = record_launches("paged_attention")
    from tilefuse.triton_kernels.attention import paged_attention

    call = meta(1, sq, 32, 2, 128, 2048)
    paged_attention.paged_attention_fwd(*call)
    parts = launches[0][2][3]
    assert parts.nbytes <= call[1].nbytes + call[2].nbytes


def test_chunks_do_not_depend_on_the_batch(record_launches):
    launches = record_launches("paged_attention")
    from tilefuse.triton_kernels.attention import paged_attention

    for batch in (1, 2, 64):
        paged_attention.paged_attention_fwd(*meta(batch, 3, 32, 8, 128, 512))
    assert len({grid[1] for name, grid, _ in launches if name == "paged_attention_fwd_kernel"}) == 1


def test_chunks_past_a_sequence_are_neither_written_nor_read(record_launches, triton_backend, monkeypatch):
    """A long table costs what its lengths need: the parts of chunks past them stay as they were allocated."""
    small_chunks(monkeypatch, 16)
    q, k, v, table, lengths = paged([40, 7, 0], 1, 4, 2, 16, 16, 8)
    # 16 pages of 8 slots, 8 chunks
    table = torch.nn.functional.pad(table, (0, 16 - table.shape[1]), value=2**31 - 1)
    launches = record_launches("paged_attention", run=True)
    with poisoned():
        out, lse = tilefuse.paged_attention(q, k, v, table, lengths)
    (_, grid, args), (merge, _, _) = launches
    assert grid[1] == 8 and merge == "paged_attention_fwd_merge_kernel"
    parts, part_lse = args[3], args[4]
    # a sequence without keys has one chunk, which is empty
    for b, written in enumerate((3, 1, 1)):
        assert parts[b, ..., :written, :].isfinite().all() and parts[b, ..., written:, :].isnan().all()
        assert not part_lse[b, ..., :written].isnan().any() and part_lse[b, ..., written:].isnan().all()
    assert out.isfinite().all() and not lse.isnan().any()
    exact, exact_lse = dense((q, k, v, table, lengths), {}, {}, torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-6)


# a span of the CPU kernel is 512 keys, a block of it 64
LENGTHS = [0, 1, 63, 64, 65, 511, 512, 513, 1100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize(
    ("sq", "group", "dim", "dim_v", "page_size", "more"),
    [
        (1, 1, 64, 64, 16, {}),
        (1, 4, 128, 96, 16, {"softcap": 5.0}),
        (1, 7, 40, 24, 7, {"window": (600, 0)}),
        (1, 16, 32, 80, 1, {"window": (127, 0)}),
        (3, 5, 64, 32, 64, {"window": (700, 1)}),
        (4, 3, 24, 64, 512, {"window": (-1, -1)}),
        (17, 1, 64, 64, 16, {"window": (80, 0)}),
    ],
)
def test_spans_on_the_cpu(sq, group, dim, dim_v, page_size, more, cache_dtype, dtype):
    """Sequences of several spans, at the edges of blocks, pages and windows, each with its sinks and slopes."""
    tensors = paged(LENGTHS, sq, 2 * group, 2, dim, dim_v, page_size, dtype=dtype, cache_dtype=cache_dtype)
    heads = {"sinks": normal(2 * group, seed=5), "alibi_slopes": normal(2 * group, seed=6).abs() / 50}
    options = more if cache_dtype is None else {**more, "k_scale": 0.5, "v_scale": 2.0}
    with tilefuse.backend("cpu"):
        check(tensors, {}, options, batch_last=True)
        check(tensors, heads, options, batch_last=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spans_on_the_cpu_keep_their_bits(dtype):
    """Whatever the number of threads, the batch, and which kv heads share an item of work."""
    q, k, v, table, lengths = paged([1100, 3, 600, 0], 2, 12, 4, 64, 40, 16, dtype=dtype)
    threads = torch.get_num_threads()
    with tilefuse.backend("cpu"), poisoned():
        out, lse = tilefuse.paged_attention(q, k, v, table, lengths)
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                for again, first in zip(tilefuse.paged_attention(q, k, v, table, lengths), (out, lse)):
                    assert_bit_equal(again, first)
        finally:
            torch.set_num_threads(threads)
        for b in range(len(lengths)):
            alone = tilefuse.paged_attention(q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1])
            for one, all_of_them in zip(alone, (out, lse)):
                assert_bit_equal(one, all_of_them[b : b + 1])
        for h in range(4):
            alone = tilefuse.paged_attention(
                q[:, :, 3 * h : 3 * h + 3], k[:, :, h : h + 1], v[:, :, h : h + 1], table, lengths
            )
            assert_bit_equal(alone[0], out[:, :, 3 * h : 3 * h + 3])
            assert_bit_equal(alone[1], lse[:, 3 * h : 3 * h + 3])


def test_missing_pages_of_long_sequences_on_the_cpu():
    """A span without a page that exists has no part in the sum; a sequence of none is empty, its lse its sink."""
    q, k, v, table, lengths = paged([1100, 1100], 1, 4, 2, 32, 32, 16, dtype=torch.bfloat16)
    sinks = normal(4, seed=5)
    gone = table.clone()
    gone[0, 32:64], gone[1] = -1, 2**31 - 1
    k, v = torch.nan_to_num(k), torch.nan_to_num(v)
    with tilefuse.backend("cpu"), poisoned():
        out, lse = tilefuse.paged_attention(q, k, v, gone, lengths, sinks)
    with tilefuse.backend("reference"):
        exact, exact_lse = tilefuse.paged_attention(q, k, v, gone, lengths, sinks)
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)
    assert (out[1] == 0).all() and torch.equal(lse[1, :, 0], sinks)


@pytest.mark.gpu
def test_23_graph_capture():
    with tilefuse.backend("triton"):
        tensors = paged([900, 33], 1, 8, 2, 64, 64, 16, device="cuda", dtype=torch.bfloat16)
        expected = tilefuse.paged_attention(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = tilefuse.paged_attention(*tensors)
        graph.replay()
        assert_bit_equal(out, expected[0])
        assert_bit_equal(lse, expected[1])


@QUICK
def test_opcheck_and_compile(device):
    tensors, others, options = case("sinks", device)
    args = (*tensors, others["sinks"], None, *options["window"], 0.25, 0.0, 1.0, 1.0)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.tilefuse.paged_attention_fwd.default, args, test_utils=tests)
    compiled = torch.compile(tilefuse.paged_attention, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for a, b in zip(compiled(*tensors, window=(15, 0)), tilefuse.paged_attention(*tensors, window=(15, 0))):
            assert_bit_equal(a, b)


def _errors():
    """name, the argument that the message names, kind, arguments and options."""
    q, k, v, table, lengths = paged([9], 1, 4, 2, 8, 8, 4)
    rest = (table, lengths)
    yield "q", "q", ValueError, (q[0], k, v, *rest), {}
    yield "q_dtype", "q", TypeError, (q.int(), k, v, *rest), {}
    yield "head_dim", "q", ValueError, (q[..., :0], k, v, *rest), {}
    yield "k_dim", "k_cache", ValueError, (q, k[0], v, *rest), {}
    yield "k_page_size", "k_cache", ValueError, (q, k[:, :0], v[:, :0], *rest), {}
    yield "k_no_heads", "k_cache", ValueError, (q, k[:, :, :0], v[:, :, :0], *rest), {}
    yield "k_dtype", "k_cache", TypeError, (q, k.half(), v, *rest), {}
    yield "k_device", "k_cache", ValueError, (q, k.to("meta"), v, *rest), {}
    yield "k_width", "k_cache", ValueError, (q, k[..., :4], v, *rest), {}
    yield "k_heads", "k_cache", ValueError, (q[:, :, :3], k, v, *rest), {}
    yield "v_dim", "v_cache", ValueError, (q, k, v[0], *rest), {}
    yield "v_width", "v_cache", ValueError, (q, k, v[..., :0], *rest), {}
    yield "v_shape", "v_cache", ValueError, (q, k, v[:1], *rest), {}
    yield "v_dtype", "v_cache", TypeError, (q, k, v.to(FP8), *rest), {}
    yield "v_device", "v_cache", ValueError, (q, k, v.to("meta"), *rest), {}
    yield "table", "block_table", ValueError, (q, k, v, table[0], lengths), {}
    yield "table_batch", "block_table", ValueError, (q, k, v, table.repeat(2, 1), lengths), {}
    yield "table_dtype", "block_table", TypeError, (q, k, v, table.float(), lengths), {}
    yield "table_device", "block_table", ValueError, (q, k, v, table.to("meta"), lengths), {}
    yield "lengths", "seq_lens", ValueError, (q, k, v, table, lengths[:0]), {}
    yield "lengths_dim", "seq_lens", ValueError, (q, k, v, table, lengths[None]), {}
    yield "lengths_dtype", "seq_lens", TypeError, (q, k, v, table, lengths.float()), {}
    yield "lengths_device", "seq_lens", ValueError, (q, k, v, table, lengths.to("meta")), {}
    yield "sinks", "sinks", ValueError, (q, k, v, *rest, torch.zeros(2)), {}
    yield "sinks_dtype", "sinks", TypeError, (q, k, v, *rest, torch.zeros(4).int()), {}
    yield "sinks_device", "sinks", ValueError, (q, k, v, *rest, torch.zeros(4, device="meta")), {}
    yield "alibi", "alibi_slopes", ValueError, (q, k, v, *rest, None, torch.zeros(2)), {}
    yield "alibi_dtype", "alibi_slopes", TypeError, (q, k, v, *rest, None, torch.zeros(4).half()), {}
    yield "alibi_device", "alibi_slopes", ValueError, (q, k, v, *rest, None, torch.zeros(4, device="meta")), {}
    wanted = [x.clone().requires_grad_() for x in (q, k, v, torch.zeros(4), torch.zeros(4))]
    yield "q_grad", "q", RuntimeError, (wanted[0], k, v, *rest), {}
    yield "k_grad", "k_cache", RuntimeError, (q, wanted[1], v, *rest), {}
    yield "v_grad", "v_cache", RuntimeError, (q, k, wanted[2], *rest), {}
    yield "sinks_grad", "sinks", RuntimeError, (q, k, v, *rest, wanted[3]), {}
    yield "alibi_grad", "alibi_slopes", RuntimeError, (q, k, v, *rest, None, wanted[4]), {}
    for options in (
        {"window": (-2, 0)},
        {"scale": float("inf")},
        {"softcap": -1.0},
        {"k_scale": 2.0},
        {"v_scale": 0.5},
        {"k_scale": float("nan")},
        {"v_scale": 0.0},
    ):
        yield str(options), next(iter(options)), ValueError, (q, k, v, *rest), options


@pytest.mark.parametrize(("arg", "kind", "args", "options"), [pytest.param(*e[1:], id=e[0]) for e in _errors()])
def test_errors(arg, kind, args, options):
    message = f".* but {arg} requires grad" if kind is RuntimeError else f"{arg} must be "
    for call in (tilefuse.paged_attention, torch.ops.tilefuse.paged_attention):
        with pytest.raises(kind, match=rf"^tilefuse\.paged_attention: {message}"):
            call(*args, **options)
