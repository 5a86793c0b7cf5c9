"""``block_sparse_attention`` and ``block_pattern``. Numbers in names: docs/known-bugs.md."""

import itertools

import pytest
import torch

import tilefuse
from tilefuse.reference.attention.window_attention import window_mask
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.attention.block_sparse_attention import cases, lists
from tilefuse.testing.inputs.attention.dense import dense_attention, dense_blocks, upstream
from tilefuse.testing.inputs.attention.window_attention import normal, qkv

case = by_name(cases)
KERNEL = "block_sparse_attention_fwd"
# the same code paths run in the other tests
QUICK = pytest.mark.slow_in_interpreter
CASES = [case[0] for case in cases("cpu", torch.float32)]
GRADS = ("q", "k", "v")


def compute(function, tensors, index, options, dtype):
    """out, lse, dq, dk, dv under random dout and dlse that all functions share."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse = function(*leaves, *index, **options)
    dout, dlse = upstream(out, lse, tensors[0].dtype)
    total = (out * dout).sum() + (lse.masked_fill(lse.isinf(), 0) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def oracle_of_backward(tensors, index, options, out, lse):
    """float64 gradients from the backward's own operands, which hold the rounded out and lse."""
    dout, dlse = (x.double() for x in upstream(out, lse, tensors[0].dtype))
    plain = options["block_size"], options.get("causal", False), options.get("scale", tensors[0].shape[-1] ** -0.5)
    with tilefuse.backend("reference"):
        return torch.ops.tilefuse.block_sparse_attention_bwd(
            dout, dlse, *(x.double() for x in tensors), out.double(), lse.double(), *index, *plain
        )


def check(tensors, index, options):
    with poisoned():
        got = compute(tilefuse.block_sparse_attention, tensors, index, options, tensors[0].dtype)
    if 0 in (tensors[0].numel(), tensors[1].numel()):
        assert all((x == 0).all() for i, x in enumerate(got) if i != 1) and (got[1] == float("-inf")).all()
        return
    exact = compute(dense_blocks, tensors, index, options, torch.float64)
    naive = compute(dense_blocks, tensors, index, options, tensors[0].dtype)
    on_operands = oracle_of_backward(tensors, index, options, *got[:2])
    for i, name in enumerate(("out", "lse")):
        assert_close(got[i], exact[i], naive[i], name=name)
    # float32 noise of a gradient's terms (dout . v) * k: a row may cancel to nothing, its terms do not
    q, k, v = (torch.nan_to_num(x.float(), nan=0.0, posinf=0.0) for x in tensors)
    dp = v.shape[-1] ** 0.5 * float(v.norm(dim=-1).max())
    terms = 4 * 2.0**-24 * dp * float(max(k.abs().max(), q.abs().max()))
    for name, x, y, z, w in zip(GRADS, got[2:], exact[2:], naive[2:], on_operands):
        assert x.is_contiguous()
        assert_close(x, y, z, name=name, tiny=terms, rows=False)
        assert_close(x, w, z, name=f"{name} on the backward's operands", tiny=terms)


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, device):
    check(*case(name, device))


@QUICK
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["per_head", "causal", "blocks_of_64", "wide_blocks"])
def test_matches_oracle_in_half(name, dtype, device):
    check(*case(name, device, dtype))


def test_half_in_triton(triton_backend):
    check(*case("per_head", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("no_")])
def test_reference_is_the_formula(name):
    tensors, index, options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        got = compute(tilefuse.block_sparse_attention, tensors, index, options, torch.float64)
    for x, y in zip(got, compute(dense_blocks, tensors, index, options, torch.float64)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def test_gradcheck():
    tensors, index, options = case("causal", dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors]

    def call(*leaves):
        out, lse = tilefuse.block_sparse_attention(*leaves, *index, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_11_repeats_count_twice(device):
    q, k, v = qkv(1, 16, 32, 1, 1, 16, device=device)
    offsets = torch.tensor([[[0, 3]]], dtype=torch.int32, device=device)
    index = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    out, lse = tilefuse.block_sparse_attention(q, k, v, offsets, index, block_size=16)
    twice = [torch.cat([x, x[:, 16:]], 1) for x in (k, v)]
    expected, expected_lse = dense_attention(q, *twice, torch.ones(16, 48, dtype=torch.bool, device=device))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_11_empty_rows_and_columns(device):
    """A row without blocks gives 0 and -inf, a column without rows zero gradients; neither poisons the others."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 48, 48, 1, 1, 16, device=device))
    offsets = torch.tensor([[[0, 0, 2, 2]]], dtype=torch.int32, device=device)
    index = torch.tensor([0, 2], dtype=torch.int32, device=device)
    out, lse = tilefuse.block_sparse_attention(q, k, v, offsets, index, block_size=16)
    assert (out[:, :16] == 0).all() and (out[:, 32:] == 0).all() and (lse[..., :16] == float("-inf")).all()
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert grad.isfinite().all() and (grad[:, 16:32] == 0).all()


@QUICK
def test_11_order_of_a_list_does_not_matter(device):
    q, k, v = qkv(1, 16, 96, 1, 1, 16, device=device)
    offsets = torch.tensor([[[0, 4]]], dtype=torch.int32, device=device)
    results = [
        tilefuse.block_sparse_attention(q, k, v, offsets, torch.tensor(x, device=device), block_size=16)[0]
        for x in ([0, 2, 3, 5], [5, 0, 3, 2])
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_16_nan_in_unlisted_blocks(device):
    (q, k, v), (offsets, index, _), options = case("shared", device)
    seen = torch.zeros(4, dtype=torch.bool, device=device)
    listed = index[(index >= 0) & (index < 4) & (index != 1)].long()
    seen[listed] = True
    index = torch.where(index == 1, torch.full_like(index, -1), index)
    hidden = ~seen.repeat_interleave(16)[:50]
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[:, hidden] = float("nan")
    assert hidden.any()
    for a, b in zip(
        tilefuse.block_sparse_attention(q, *bad, offsets, index, **options),
        tilefuse.block_sparse_attention(q, k, v, offsets, index, **options),
    ):
        assert_bit_equal(a, b)


def test_hostile_lists(device):
    """Offsets past the index are clamped, blocks that do not exist skipped."""
    q, k, v = qkv(1, 32, 32, 1, 1, 16, device=device)
    offsets = torch.tensor([[[-5, 1, 1000]]], device=device)
    index = torch.tensor([0, 10**6, 1, -7], device=device)
    clean = torch.tensor([[[0, 1, 2]]], device=device), torch.tensor([0, 1], device=device)
    for a, b in zip(
        tilefuse.block_sparse_attention(q, k, v, offsets, index, block_size=16),
        tilefuse.block_sparse_attention(q, k, v, *clean, block_size=16),
    ):
        assert_bit_equal(a, b)


def test_20_25_deterministic_and_batch_invariant(device):
    tensors, index, options = case("shared", device, torch.bfloat16)
    first = compute(tilefuse.block_sparse_attention, tensors, index, options, torch.bfloat16)
    for a, b in zip(first, compute(tilefuse.block_sparse_attention, tensors, index, options, torch.bfloat16)):
        assert_bit_equal(a, b)
    alone, _ = tilefuse.block_sparse_attention(*(x[1:] for x in tensors), *index, **options)
    assert_bit_equal(alone, first[0][1:])


@QUICK
@pytest.mark.parametrize(("dim", "group"), [(40, 3), (80, 7), (112, 1), (192, 1), (256, 2)])
def test_12_13_head_dims_and_group_sizes(dim, group, device):
    tensors = qkv(1, 40, 40, group, 1, dim, 48, device=device, dtype=torch.bfloat16)
    check(tensors, (*lists(1, group, 3, 3, device=device), None), {"block_size": 16})


def test_14_offsets_past_int32(device):
    """Tokens 2**30 elements apart, in the inputs and in the gradient that comes in; untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    near = [normal(3, 1, 16, device=device, dtype=torch.bfloat16, seed=i) for i in range(4)]
    far = [memory[16 * i :].as_strided((3, 1, 16), (2**30, 16, 1)).copy_(x) for i, x in enumerate(near)]
    index = torch.tensor([[[0, 1, 3]]], device=device), torch.tensor([0, 0, 1], device=device)
    results = []
    for tensors in (near, far):
        *leaves, dout = (x[None] for x in tensors)
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, lse = tilefuse.block_sparse_attention(*leaves, *index, block_size=2)
        results.append([out, lse, *torch.autograd.grad(out, leaves, dout)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)


def test_15_strides(device):
    """Transposed heads, an expanded key, a value that is not contiguous, strided lists; dout and dlse alike."""
    q, k, v = qkv(2, 33, 33, 2, 2, 16, device=device)
    k = k[:1]
    offsets, index = lists(1, 2, 3, 3, device=device)
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.expand(2, -1, -1, -1),
        v.transpose(2, 3).contiguous().transpose(2, 3),
        offsets.transpose(1, 2).contiguous().transpose(1, 2),
        index.repeat_interleave(2)[::2],
    )
    dout = normal(2, 2, 33, 16, device=device, seed=1).transpose(1, 2)
    dlse = normal(2, 33, 2, device=device, seed=2).transpose(1, 2)
    results = []
    for tensors, grads in (
        (views, (dout, dlse)),
        ((q, k.repeat(2, 1, 1, 1), v, offsets, index), (dout.contiguous(), dlse.contiguous())),
    ):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out, lse = tilefuse.block_sparse_attention(*leaves, *tensors[3:], block_size=16)
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, grads)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)


def test_15_expanded_lists(device):
    """Lists that ``expand`` repeats over batch and heads are the shared ones, in both directions."""
    tensors = qkv(2, 33, 33, 2, 2, 16, device=device)
    offsets, index = lists(1, 1, 3, 3, device=device)
    shared, *expanded = (
        compute(tilefuse.block_sparse_attention, tensors, (o, index), {"block_size": 16}, torch.float32)
        for o in (offsets, offsets.expand(2, 2, -1), offsets.expand(2, 1, -1), offsets.expand(1, 2, -1))
    )
    for results in expanded:
        for a, b in zip(results, shared):
            assert_bit_equal(a, b)


@pytest.mark.gpu
def test_23_graph_capture(assert_replays):
    """Forward and backward, whose lists are transposed on the device, follow what the lists hold at replay."""
    leaves = [x.requires_grad_() for x in qkv(2, 256, 256, 4, 2, 64, device="cuda", dtype=torch.bfloat16)]
    p = tilefuse.block_pattern("strided", 256, 256, stride=2, device="cuda")
    columns = p.col_index.clone()

    def step():
        out, lse = tilefuse.block_sparse_attention(*leaves, p.row_offsets, columns)
        return [out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), leaves)]

    with tilefuse.backend("triton"):
        assert_replays(step, columns, (3 - columns,))


def test_second_derivatives_are_refused():
    tensors, index, options = case("shared")
    q = tensors[0].requires_grad_()
    out, _ = tilefuse.block_sparse_attention(*tensors, *index, **options)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


@QUICK
def test_equals_window_attention(device):
    """Lists of a window pattern with the window's mask are that window: with the causal flag, of whole blocks."""
    q, k, v = qkv(1, 96, 96, 2, 1, 16, device=device)
    pattern = tilefuse.block_pattern("window", 96, 96, block_size=16, window=(-1, 0), device=device)
    out, lse = tilefuse.block_sparse_attention(
        q, k, v, pattern.row_offsets, pattern.col_index, block_size=16, causal=True
    )
    expected, expected_lse = tilefuse.window_attention(q, k, v, window=(-1, 0))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


@QUICK
def test_21_lists_of_another_length(device):
    """Lists made for a longer sequence are refused, not read askew."""
    q, k, v = qkv(1, 64, 64, 2, 1, 16, device=device)
    long = tilefuse.block_pattern("window", 96, 96, block_size=16, window=(20, 0), device=device)
    with pytest.raises(ValueError, match="row_offsets must be"):
        tilefuse.block_sparse_attention(q, k, v, long.row_offsets, long.col_index, block_size=16)


@QUICK
def test_22_merged_by_lse(device):
    """Two disjoint lists, merged by their log-sum-exp, are the attention over both; gradients included."""
    leaves = [x.requires_grad_() for x in qkv(1, 64, 64, 2, 1, 16, device=device)]
    near = torch.eye(4, dtype=torch.bool, device=device)
    far = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)).to(device) > 0.5
    results = []
    for masks in ([near | far], [near, far & ~near]):
        parts = []
        for mask in masks:
            p = tilefuse.block_pattern("from_mask", 64, 64, block_size=16, mask=mask)
            parts.append(tilefuse.block_sparse_attention(*leaves, p.row_offsets, p.col_index, block_size=16))
        lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
        out = sum(o * torch.exp(part_lse - lse).transpose(1, 2)[..., None] for o, part_lse in parts)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@QUICK
def test_compiled_training_step(device):
    tensors, index, options = case("per_head", device)
    leaves = [x.requires_grad_() for x in tensors]

    def step(*leaves):
        return tilefuse.block_sparse_attention(*leaves, *index, **options)[0].square().sum()

    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, compiled):
        assert_bit_equal(a, b)


@QUICK
def test_opcheck(device):
    tensors, index, options = case("per_batch_masked", device)
    clean = [torch.nan_to_num(x, nan=0.0, posinf=0.0) for x in tensors]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    plain = (*index, options["block_size"], False, 0.25)
    torch.library.opcheck(torch.ops.tilefuse.block_sparse_attention_fwd.default, (*clean, *plain), test_utils=tests)
    out, lse = torch.ops.tilefuse.block_sparse_attention_fwd(*clean, *plain)
    back = (torch.ones_like(out), None, *clean, out, lse, *plain)
    torch.library.opcheck(torch.ops.tilefuse.block_sparse_attention_bwd.default, back, test_utils=tests)


def _errors():
    """name, the argument that the message names, kind, arguments and options."""
    q, k, v = qkv(1, 32, 32, 4, 2, 8)
    offsets, index = lists(1, 1, 2, 2)
    mask = torch.ones(1, 32, dtype=torch.bool)
    yield "q", "q", ValueError, (q[0], k, v, offsets, index), {}
    yield "q_dtype", "q", TypeError, (q.int(), k, v, offsets, index), {}
    yield "k", "k", TypeError, (q, k.half(), v, offsets, index), {}
    yield "k_device", "k", ValueError, (q, k.to("meta"), v, offsets, index), {}
    yield "k_heads", "k", ValueError, (q[:, :, :3], k, v, offsets, index), {}
    yield "v", "v", ValueError, (q, k, v[:, :3], offsets, index), {}
    yield "offsets_dim", "row_offsets", ValueError, (q, k, v, offsets[0], index), {}
    yield "offsets_rows", "row_offsets", ValueError, (q, k, v, offsets[..., :2], index), {}
    yield "offsets_heads", "row_offsets", ValueError, (q, k, v, offsets.repeat(1, 2, 1), index), {}
    yield "offsets_batch", "row_offsets", ValueError, (q, k, v, offsets.repeat(2, 1, 1), index), {}
    yield "offsets_dtype", "row_offsets", TypeError, (q, k, v, offsets.float(), index), {}
    yield "offsets_device", "row_offsets", ValueError, (q, k, v, offsets.to("meta"), index), {}
    yield "index", "col_index", ValueError, (q, k, v, offsets, index[None]), {}
    yield "index_dtype", "col_index", TypeError, (q, k, v, offsets, index.float()), {}
    yield "index_device", "col_index", ValueError, (q, k, v, offsets, index.to("meta")), {}
    yield "mask", "key_mask", ValueError, (q, k, v, offsets, index, mask[:, :31]), {}
    yield "mask_dtype", "key_mask", TypeError, (q, k, v, offsets, index, mask.float()), {}
    yield "mask_device", "key_mask", ValueError, (q, k, v, offsets, index, mask.to("meta")), {}
    yield "block_size", "block_size", ValueError, (q, k, v, offsets, index), {"block_size": 0}
    yield "scale", "scale", ValueError, (q, k, v, offsets, index), {"scale": float("nan")}


@pytest.mark.parametrize(("arg", "kind", "args", "options"), [pytest.param(*e[1:], id=e[0]) for e in _errors()])
def test_errors(arg, kind, args, options):
    for call in (tilefuse.block_sparse_attention, torch.ops.tilefuse.block_sparse_attention):
        with pytest.raises(kind, match=rf"^tilefuse\.block_sparse_attention: {arg} must be "):
            call(*args, **{"block_size": 16, **options})


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.cpu_library)])
def test_memory_is_linear(backend, check_memory):
    prepare = """
def call(q, k, v):
    n = q.shape[1]
    p = tilefuse.block_pattern("longformer", n, n, window=(127, 0), global_blocks=(0,))
    return tilefuse.block_sparse_attention(q, k, v, p.row_offsets, p.col_index)
"""
    check_memory(backend, prepare)


def sparse_transformer(kind, n, stride, summary):
    """The masks of the paper, in plain integers."""
    dense = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            if kind == "strided":
                dense[i, j] = i - j < stride or (i - j) % stride == 0
            else:
                dense[i, j] = i // stride == j // stride or j % stride >= stride - summary
    return dense


@pytest.mark.parametrize(("stride", "summary"), [(1, 1), (3, 1), (4, 2), (20, 3)])
@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_sparse_transformer_patterns(kind, stride, summary):
    p = tilefuse.block_pattern(
        kind, 11 * 16 - 3, 11 * 16 - 3, block_size=16, stride=stride, summary=summary, causal=True
    )
    assert torch.equal(p.to_dense()[0, 0], sparse_transformer(kind, 11, stride, summary))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("strided", {"stride": 3}),
        ("fixed", {"stride": 3, "summary": 2}),
        ("longformer", {"window": (40, 40), "global_blocks": (0, 5, 5, 10)}),
        ("window", {"window": (40, 20)}),
    ],
)
def test_11_parts_that_overlap_are_listed_once(kind, options, causal):
    """In ascending order; with causal, no block after all tokens of its row."""
    for sq, sk in ((173, 173), (100, 173), (173, 100)):
        p = tilefuse.block_pattern(kind, sq, sk, block_size=16, causal=causal, **options)
        dense = p.to_dense()[0, 0]
        assert torch.equal(p.row_offsets.diff()[0, 0].long(), dense.sum(-1))
        rows = p.row_offsets[0, 0].tolist()
        assert all(p.col_index[a:b].diff().gt(0).all() for a, b in itertools.pairwise(rows))
        if causal:
            visible = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
            reach = tilefuse.block_pattern("from_mask", sq, sk, block_size=16, mask=visible).to_dense()[0, 0]
            full = tilefuse.block_pattern(kind, sq, sk, block_size=16, **options).to_dense()[0, 0]
            assert not (dense & ~reach).any()
            if kind != "strided":
                # its look-ahead differs, not only what causal drops
                assert torch.equal(dense, full & reach)


@pytest.mark.parametrize("window", [(0, 0), (20, 0), (31, 17), (-1, 0), (0, -1), (-1, -1)])
@pytest.mark.parametrize(("sq", "sk"), [(96, 96), (50, 90), (90, 50), (33, 1), (0, 20), (20, 0)])
def test_window_pattern(window, sq, sk):
    p = tilefuse.block_pattern("window", sq, sk, block_size=16, window=window)
    mask = window_mask(sq, sk, window)
    assert torch.equal(p.to_dense(), tilefuse.block_pattern("from_mask", sq, sk, block_size=16, mask=mask).to_dense())
    # a block is listed exactly if one of its tokens is in the window
    for i in range(p.rows):
        for j in range(p.columns):
            assert p.to_dense()[0, 0, i, j] == mask[i * 16 : (i + 1) * 16, j * 16 : (j + 1) * 16].any()


def test_longformer_pattern():
    p = tilefuse.block_pattern("longformer", 160, 160, block_size=16, window=(16, 16), global_blocks=(0, 7))
    dense = p.to_dense()[0, 0]
    assert dense[7].all() and dense[:, 7].all() and dense[0].all() and dense[:, 0].all()
    near = (torch.arange(10)[:, None] - torch.arange(10)).abs() <= 1
    assert torch.equal(dense[1:7, 1:7], near[1:7, 1:7])


@pytest.mark.parametrize("blocks", [8, 9, 20])
def test_bigbird_pattern(blocks):
    p = tilefuse.block_pattern("bigbird", blocks * 16, blocks * 16, block_size=16, num_heads=3, num_random=2, seed=5)
    dense, counts = p.to_dense()[0], p.row_offsets.diff()[0]
    assert torch.equal(dense.sum(-1), counts.long()), "no block may be listed twice"
    assert (counts[:, [0, -1]] == blocks).all() and (counts[:, 2:-2] == 7).all() and (counts[:, [1, -2]] == 6).all()
    again = tilefuse.block_pattern(
        "bigbird", blocks * 16, blocks * 16, block_size=16, num_heads=3, num_random=2, seed=5
    )
    assert torch.equal(again.col_index, p.col_index)
    other = tilefuse.block_pattern(
        "bigbird", blocks * 16, blocks * 16, block_size=16, num_heads=3, num_random=2, seed=6
    )
    assert not torch.equal(other.col_index, p.col_index)


def test_bigbird_evaluation_mode():
    p = tilefuse.block_pattern("bigbird", 160, 160, block_size=16, seed=None)
    for i in range(1, 9):
        row = p.col_index[p.row_offsets[0, 0, i] : p.row_offsets[0, 0, i + 1]]
        assert (row == 0).sum() == 4


def test_from_mask_of_blocks_and_tokens():
    blocks = torch.rand(2, 3, 4, 5) > 0.5
    p = tilefuse.block_pattern("from_mask", 60, 75, block_size=16, mask=blocks)
    assert torch.equal(p.to_dense(), blocks)
    assert p.density == pytest.approx(float(blocks.float().mean()))
    q, k, v = qkv(2, 60, 75, 3, 3, 16)
    visible = blocks.repeat_interleave(16, -2)[..., :60, :].repeat_interleave(16, -1)[..., :75]
    out, _ = tilefuse.block_sparse_attention(q, k, v, p.row_offsets, p.col_index, block_size=16)
    torch.testing.assert_close(out, dense_attention(q, k, v, visible)[0], rtol=1e-5, atol=1e-6)


def test_transpose():
    blocks = torch.rand(2, 3, 4, 5) > 0.5
    p = tilefuse.block_pattern("from_mask", 60, 75, block_size=16, mask=blocks)
    t = p.transpose()
    assert torch.equal(t.to_dense(), blocks.mT) and t.row_offsets.dtype == t.col_index.dtype == torch.int32
    assert torch.equal(t.transpose().col_index, p.col_index) and torch.equal(t.transpose().row_offsets, p.row_offsets)
    twice = tilefuse.block_pattern("bigbird", 96, 96, block_size=16, seed=None)
    assert twice.transpose().col_index.numel() == twice.col_index.numel()


def test_pattern_costs_its_blocks():
    """A million tokens: all pairs of blocks would be 2.7e8, the list is a thousandth of it."""
    p = tilefuse.block_pattern("window", 2**20, 2**20, block_size=64, window=(512, 0))
    assert p.col_index.numel() < 10 * 2**14 and p.density < 1e-3


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = tilefuse.block_pattern("bigbird", 512, 512, num_heads=2).plot(head=1)
    assert "% of all blocks" in ax.get_title() and ax.images[0].get_array().shape == (8, 8)
    matplotlib.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("arg", "args", "options"),
    [
        ("kind", ("circles", 64, 64), {}),
        ("seq_len_q", ("window", -1, 64), {"window": (0, 0)}),
        ("seq_len_k", ("window", 64, -1), {"window": (0, 0)}),
        ("window", ("window", 64, 64), {}),
        ("window", ("window", 64, 64), {"window": (-2, 0)}),
        ("window", ("longformer", 64, 64), {"window": (1, 2, 3)}),
        ("block_size", ("window", 64, 64), {"window": (0, 0), "block_size": 0}),
        ("num_heads", ("window", 64, 64), {"window": (0, 0), "num_heads": 0}),
        ("stride", ("strided", 64, 64), {}),
        ("stride", ("strided", 64, 64), {"stride": 0}),
        ("stride", ("fixed", 64, 64), {}),
        ("summary", ("fixed", 64, 64), {"stride": 2, "summary": 3}),
        ("summary", ("fixed", 64, 64), {"stride": 2, "summary": 0}),
        ("seq_len_q", ("bigbird", 640, 64), {}),
        ("seq_len_q", ("bigbird", 256, 256), {}),
        ("num_random", ("bigbird", 640, 640), {"num_random": -1}),
        ("num_random", ("bigbird", 384, 384), {"num_random": 4}),
        ("mask", ("from_mask", 64, 64), {}),
        ("mask", ("from_mask", 64, 64), {"mask": torch.ones(3, 3, dtype=torch.bool)}),
        ("mask", ("from_mask", 64, 64), {"mask": torch.ones(1, 1)}),
        ("mask", ("from_mask", 64, 64), {"mask": torch.ones(1, dtype=torch.bool)}),
        ("mask", ("from_mask", 64, 64), {"mask": torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)}),
        ("global_blocks", ("longformer", 640, 640), {"window": (9, 9), "global_blocks": (10,)}),
    ],
)
def test_pattern_errors(arg, args, options):
    with pytest.raises(ValueError, match=rf"^tilefuse\.block_pattern: {arg} must be"):
        tilefuse.block_pattern(*args, **options)
