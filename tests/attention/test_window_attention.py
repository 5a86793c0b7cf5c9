"""``window_attention``. Numbers in names: docs/known-bugs.md."""

import itertools

import pytest
import torch

import tilefuse
from tilefuse.reference.attention.window_attention import window_mask
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.attention.dense import dense_attention, dense_window, upstream
from tilefuse.testing.inputs.attention.window_attention import cases, normal, qkv

case = by_name(cases)
KERNEL = "window_attention_fwd"
# the same code paths run in the other tests
QUICK = pytest.mark.slow_in_interpreter
CASES = [case[0] for case in cases("cpu", torch.float32)]
HALF = [torch.bfloat16, torch.float16]
# gradients that are sums over all rows
SUMMED = ("sinks", "distance_bias")


def compute(function, tensors, others, options, dtype, wide=None):
    """out, lse and the gradients of q, k, v (sinks, bias) under random dout and dlse that all functions share."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    others = dict(others)
    if wide is not None:
        others |= {n: t.to(wide) for n, t in others.items() if t.is_floating_point()}
    for name in SUMMED:
        if name in others:
            others[name] = others[name].detach().clone().requires_grad_()
            leaves.append(others[name])
    out, lse = function(*leaves[:3], **others, **options)
    dout, dlse = upstream(out, lse, tensors[0].dtype)
    grads = torch.autograd.grad((out * dout).sum() + (lse.masked_fill(lse.isinf(), 0) * dlse).sum(), leaves)
    return [out.detach(), lse.detach(), *grads]


def check(tensors, others, options):
    """A call on the current backend against the dense oracle, with the dense low-precision result as the measure."""
    with poisoned():
        got = compute(tilefuse.window_attention, tensors, others, options, tensors[0].dtype)
    exact = compute(dense_window, tensors, others, options, torch.float64, torch.float64)
    naive = compute(dense_window, tensors, others, options, tensors[0].dtype)
    on_operands = backward_oracle(tensors, others, options, *got[:2])
    names = "out", "lse", "q", "k", "v", *(name for name in SUMMED if name in others)
    assert len(names) == len(got)
    for name, x, y, z in zip(names, got, exact, naive):
        assert x.is_contiguous()
        if name in ("out", "lse"):
            assert_close(x, y, z, name=name)
            continue
        terms = noise(*tensors) if y.numel() else None
        # a handful of sums over all rows: how out was rounded decides them, so only the operands' own oracle is fair
        if name not in SUMMED:
            assert_close(x, y, z, name=name, tiny=terms, rows=False)
        assert_close(x, on_operands[name], z, name=f"{name} on the backward's operands", tiny=terms)
    return got


def noise(q, k, v):
    """float32 noise of a gradient's terms (dout . v) * k: a row may cancel to nothing, its terms do not."""
    if min(q.numel(), k.numel()) == 0:
        return None
    dp = v.shape[-1] ** 0.5 * float(v.float().norm(dim=-1).max())
    return 4 * 2.0**-24 * dp * float(max(k.float().abs().max(), q.float().abs().max()))


def backward_oracle(tensors, others, options, out, lse):
    """float64 gradients from the backward's own operands, which hold the rounded out and lse."""
    q, k, v = (x.double() for x in tensors)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in others.items()}
    dout, dlse = (x.double() for x in upstream(out, lse, tensors[0].dtype))
    cu_q = others.get("cu_seqlens_q")
    args = (
        *(dout, dlse, q, k, v, out.double(), lse.double(), wide.get("sinks"), wide.get("alibi_slopes")),
        *(cu_q, others.get("cu_seqlens_k", cu_q), wide.get("distance_bias"), *options.get("window", (-1, -1))),
        *(options.get("dilation", 1), options.get("scale", q.shape[-1] ** -0.5), options.get("softcap", 0.0)),
        options.get("sink_tokens", 0),
    )
    with tilefuse.backend("reference"):
        grads = dict(zip(("q", "k", "v", "sinks"), torch.ops.tilefuse.window_attention_bwd(*args)))
        if "distance_bias" in others:
            grads["distance_bias"] = torch.ops.tilefuse.window_attention_bwd_bias(*args)
    return grads


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, device):
    check(*case(name, device))


@QUICK
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "name", ["window", "two_sided", "fewer_keys", "sinks", "everything", "packed_all", "fused_qkv"]
)
def test_matches_oracle_in_half(name, dtype, device):
    check(*case(name, device, dtype))


def test_half_in_triton(triton_backend):
    check(*case("everything", dtype=torch.bfloat16))
    check(*case("bias", dtype=torch.bfloat16))
    check(*case("two_sided", dtype=torch.float16))
    check(qkv(1, 35, 35, 1, 1, 96, 48, dtype=torch.bfloat16), {}, {"window": (10, 3)})


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 32), (37, 21), (192, 128)])
@pytest.mark.parametrize(
    "window", [(0, 0), (15, 0), (16, 16), (100, 7), (-1, 0), (-1, -1), (0, -1), (200, 100)], ids=str
)
def test_tiles_on_the_cpu(window, dim, dim_v, dtype):
    """Bands that begin and end anywhere in a tile: what no lane of a register sees is not computed."""
    q, k, v = (
        normal(1, n, 2, w, seed=i, dtype=dtype) for i, (n, w) in enumerate([(203, dim), (331, dim), (331, dim_v)])
    )
    # later keys have larger logits, then smaller ones
    k = k * (1 + torch.linspace(0, 3.14159, 331).sin())[:, None, None].to(dtype)
    with tilefuse.backend("cpu"), poisoned():
        out, lse = tilefuse.window_attention(q, k, v, window=window)
    exact, exact_lse = dense_window(q.double(), k.double(), v.double(), window=window)
    naive, naive_lse = dense_window(q, k, v, window=window)
    assert_close(out, exact, naive, name="out")
    assert_close(lse, exact_lse.double(), naive_lse, name="lse")


@pytest.mark.cpu_library
@pytest.mark.parametrize(
    ("length", "window", "dilation", "dtype"),
    [
        (1, (100, 7), 1, torch.float32),
        (17, (-1, -1), 1, torch.float32),
        (63, (-1, 0), 1, torch.bfloat16),
        (129, (100, 40), 1, torch.float32),
        (401, (-1, -1), 1, torch.float32),
        (33, (30, 30), 2, torch.float32),
    ],
)
def test_bias_on_the_cpu(length, window, dilation, dtype):
    """Registers of neighbouring distances, of distances past an end, and of some of both; several tiles and parts."""
    q, k, v = qkv(1, 203, 161, 4, 2, 24, dtype=dtype)
    with tilefuse.backend("cpu"):
        check((q, k, v), {"distance_bias": normal(4, length)}, {"window": window, "dilation": dilation})


@QUICK
@pytest.mark.parametrize("bidirectional", [True, False])
def test_bias_of_t5(bidirectional, device):
    """Every bucket's weight has its gradient; distances past the last bucket's first need no entries of their own."""
    q, k, v = qkv(1, 140, 140, 1, 1, 8, device=device)
    weight = normal(32, 1, device=device).requires_grad_()
    options = {"window": (-1, -1 if bidirectional else 0), "scale": 1.0}
    got = []
    for function, wide, length in (
        (tilefuse.window_attention, torch.float32, 140),
        (tilefuse.window_attention, torch.float32, 129),
        (dense_window, torch.float64, 140),
        (dense_window, torch.float32, 140),
    ):
        bias = tilefuse.t5_distance_bias(weight.to(wide), length, bidirectional=bidirectional)
        out, _ = function(*(x.to(wide) for x in (q, k, v)), distance_bias=bias, **options)
        got.append((out, *torch.autograd.grad(out.square().sum(), weight)))
    (out, dweight), (shorter, dweight_shorter), (exact, dweight_exact), (naive, dweight_naive) = got
    assert_bit_equal(out, shorter)
    assert_close(out, exact, naive, name="out")
    for x in (dweight, dweight_shorter):
        assert_close(x, dweight_exact.double(), dweight_naive, name="weight", tiny=noise(q, k, v), rows=False)
    used = torch.ones(32, dtype=torch.bool, device=device)
    # of the later keys' half, that of distance 0 has no distance
    used[16] = not bidirectional
    assert torch.equal((dweight != 0).all(1), used)


def test_bias_that_nobody_sees(device):
    """NaN and inf at distances outside of the window reach nothing, and have a gradient of 0."""
    tensors = qkv(1, 20, 25, 2, 1, 16, device=device)
    hostile = normal(2, 13, device=device)
    hostile[0, :4], hostile[1, :4], hostile[:, 10:] = float("nan"), float("inf"), float("nan")
    results = []
    for bias in (hostile, hostile.nan_to_num(0.0, 0.0)):
        leaves = [x.detach().requires_grad_() for x in (*tensors, bias)]
        out, lse = tilefuse.window_attention(*leaves[:3], distance_bias=leaves[3], window=(3, 2))
        results.append([out, lse, *torch.autograd.grad((out.square().sum(), lse.sum()), leaves)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)
    dbias = results[0][-1]
    assert (dbias[:, :4] == 0).all() and (dbias[:, 10:] == 0).all() and (dbias[:, 4:10] != 0).all()


def test_bias_of_minus_infinity_hides(device):
    """Later keys by their bias are later keys out of the window; a head without any has empty rows."""
    tensors = qkv(1, 20, 20, 2, 1, 16, device=device)
    bias = torch.zeros(2, 39, device=device)
    bias[:, :19] = float("-inf")
    causal, causal_lse = tilefuse.window_attention(*tensors, window=(-1, 0))
    out, lse = tilefuse.window_attention(*tensors, distance_bias=bias)
    torch.testing.assert_close(out, causal)
    torch.testing.assert_close(lse, causal_lse)
    bias[1] = float("-inf")
    leaves = [x.detach().requires_grad_() for x in (*tensors, bias)]
    out, lse = tilefuse.window_attention(*leaves[:3], distance_bias=leaves[3])
    assert (out[:, :, 1] == 0).all() and (lse[:, 1] == float("-inf")).all()
    *grads, dbias = torch.autograd.grad(out.square().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 1] == 0).all() and (dbias[1] == 0).all() and dbias[0].isfinite().all()


def test_bias_gradient_costs_only_who_asks(monkeypatch):
    from tilefuse.ops.attention import window_attention as module

    def refused(*_):
        raise AssertionError("the bias's gradient was computed")

    monkeypatch.setattr(module, "window_attention_bwd_bias", refused)
    q, k, v = qkv(1, 20, 20, 2, 1, 16)
    bias = normal(2, 39)
    out, _ = tilefuse.window_attention(q.requires_grad_(), k, v, distance_bias=bias)
    torch.autograd.grad(out.sum(), q)
    out, _ = tilefuse.window_attention(q.detach(), k, v, distance_bias=bias.requires_grad_())
    with pytest.raises(AssertionError, match="was computed"):
        torch.autograd.grad(out.sum(), bias)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    tensors, others, options = case(name, dtype=torch.float64)
    others = {n: t.double() if t.is_floating_point() else t for n, t in others.items()}
    with tilefuse.backend("reference"):
        got = compute(tilefuse.window_attention, tensors, others, options, torch.float64)
    exact = compute(dense_window, tensors, others, options, torch.float64)
    for x, y in zip(got, exact):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["two_sided", "everything", "packed_all", "sinks_no_keys", "bias", "bias_everything", "bias_packed"]
)
def test_gradcheck(name):
    tensors, others, options = case(name, dtype=torch.float64)
    others = {n: t.double() if t.is_floating_point() else t for n, t in others.items()}
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    names = [name for name in SUMMED if name in others]
    leaves += [others.pop(name).requires_grad_() for name in names]

    def call(q, k, v, *given):
        out, lse = tilefuse.window_attention(q, k, v, **dict(zip(names, given)), **others, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def sees(offset, j, left, right, d, n):
    """The window rule for one query and key, ``offset`` tokens apart."""
    if 0 <= right * d < offset:
        return False
    return j < n or (offset % d == 0 and (left < 0 or offset >= -left * d))


def semantics(device, lengths, windows, dilations, sinks):
    """The set of keys each row sees, read off one-hot values, against the rule in plain integers."""
    for (sq, sk), (left, right), d, n in itertools.product(lengths, windows, dilations, sinks):
        q, k = torch.zeros(1, sq, 1, 16, device=device), torch.zeros(1, sk, 1, 16, device=device)
        v = torch.eye(sk, device=device)[None, :, None]
        out, lse = tilefuse.window_attention(q, k, v, window=(left, right), dilation=d, sink_tokens=n)
        expected = torch.tensor([[sees(j - (i + sk - sq), j, left, right, d, n) for j in range(sk)] for i in range(sq)])
        expected = expected.double()
        assert torch.equal(window_mask(sq, sk, (left, right), dilation=d, sink_tokens=n), expected.bool())
        count = expected.sum(1)
        torch.testing.assert_close(out[0, :, 0].cpu().double(), expected / count.clamp(min=1)[:, None])
        torch.testing.assert_close(lse[0, 0].cpu().double(), count.log(), rtol=1e-6, atol=1e-6)


SIDES = [-1, 0, 1, 2, 5]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.cpu_library)])
def test_4_window_semantics_exhaustively(backend):
    lengths = [(1, 1), (1, 5), (5, 2), (4, 7), (6, 6)]
    with tilefuse.backend(backend):
        semantics("cpu", lengths, list(itertools.product(SIDES, SIDES)), [1, 2, 3], [0, 2])


@pytest.mark.parametrize(
    "backend", [pytest.param("reference", marks=pytest.mark.slow), pytest.param("cpu", marks=pytest.mark.cpu_library)]
)
def test_4_window_semantics_across_tiles(backend):
    """Edges of the window at, just before and just after the edges of tiles."""
    windows = list(itertools.product([-1, 0, 1, 31, 32, 63, 64, 65], [-1, 0, 1, 64]))
    with tilefuse.backend(backend):
        semantics("cpu", [(129, 131), (131, 66)], windows, [1], [0])
        semantics("cpu", [(129, 131)], [(-1, 0), (0, 0), (21, 1), (32, 0), (1, 22)], [2, 3], [0, 2])


def test_4_window_semantics_in_triton(triton_backend, device="cpu"):
    semantics(device, [(5, 7), (7, 4)], [(-1, -1), (-1, 0), (0, -1), (2, 1), (0, 0), (1, 5)], [1, 3], [0, 2])


@pytest.mark.gpu
def test_4_window_semantics_on_gpu():
    lengths = list(itertools.product([1, 5, 7, 70], [1, 4, 7, 75]))
    with tilefuse.backend("triton"):
        semantics("cuda", lengths, list(itertools.product(SIDES, SIDES)), [1, 3], [0, 2])


@QUICK
def test_1_ragged_tail_with_bias(device):
    q, k, v = qkv(1, 67, 67, 2, 1, 16, device=device)
    got = check((q, k, v), {"alibi_slopes": torch.tensor([0.3, 0.1], device=device)}, {"window": (10, 0)})
    assert all(x.isfinite().all() for x in got)


def test_2_window_as_wide_as_the_sequence(device):
    q, k, v = qkv(1, 45, 45, 2, 1, 16, device=device)
    for bounded, unbounded in (
        ((44, 0), (-1, 0)),
        ((100, 0), (-1, 0)),
        ((44, 44), (-1, -1)),
        ((2**40, 2**40), (-1, -1)),
    ):
        for a, b in zip(
            tilefuse.window_attention(q, k, v, window=bounded), tilefuse.window_attention(q, k, v, window=unbounded)
        ):
            assert_bit_equal(a, b)


def test_3_window_of_one(device):
    q, k, v = qkv(1, 35, 35, 2, 1, 16, device=device)
    out, _ = tilefuse.window_attention(q, k, v, window=(0, 0))
    torch.testing.assert_close(out, v.repeat_interleave(2, 2))


def test_5_rows_without_keys(device):
    """Also: such a row does not poison the others."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 50, 20, 2, 1, 16, device=device))
    out, lse = tilefuse.window_attention(q, k, v, window=(3, 0))
    assert (out[:, :30] == 0).all() and (lse[..., :30] == float("-inf")).all() and lse[..., 30:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[..., 30:].sum(), (q, k, v))
    assert (dq[:, :30] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@QUICK
def test_6_very_negative_logits(device):
    """No finite sentinel: logits below -5e4 still make a softmax."""
    q, k, v = qkv(1, 40, 40, 1, 1, 16, device=device)
    q, k = q.abs() * 300, -k.abs() * 300
    check((q, k, v), {}, {"window": (9, 0)})


@pytest.mark.parametrize("name", ["empty_batch", "no_queries", "no_keys"])
def test_7_empty(name, device):
    (q, k, v), others, options = case(name, device)
    out, lse = tilefuse.window_attention(q, k, v, **others, **options)
    assert out.shape == (*q.shape[:-1], v.shape[-1]) and (out == 0).all() and (lse == float("-inf")).all()


def test_7_empty_packed(device):
    q, k, v = (x[:0] for x in qkv(0, 1, 1, 2, 1, 16, device=device))
    for bounds in ([0], [0, 0, 0]):
        cu = torch.tensor(bounds, dtype=torch.int32, device=device)
        out, lse = tilefuse.window_attention(q, k, v, cu_seqlens_q=cu)
        assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_7_hostile_offsets(device):
    """Offsets outside of the tensors are clamped, never followed."""
    q, k, v = qkv(0, 20, 20, 2, 1, 16, device=device)
    cu = torch.tensor([-5, 7, 400], dtype=torch.int32, device=device)
    safe = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    for a, b in zip(
        tilefuse.window_attention(q, k, v, cu_seqlens_q=cu, window=(5, 0)),
        tilefuse.window_attention(q, k, v, cu_seqlens_q=safe, window=(5, 0)),
    ):
        assert_bit_equal(a, b)


def test_8_sink_without_keys(device):
    q, k, v = qkv(1, 30, 10, 2, 1, 16, device=device)
    sinks = torch.tensor([0.5, -2.0], device=device)
    _, lse = tilefuse.window_attention(q, k, v, sinks, window=(2, 0))
    torch.testing.assert_close(lse[0, :, :20], sinks[:, None].expand(2, 20))
    off = torch.full((2,), float("-inf"), device=device)
    for a, b in zip(
        tilefuse.window_attention(q, k, v, off, window=(2, 0)), tilefuse.window_attention(q, k, v, window=(2, 0))
    ):
        torch.testing.assert_close(a, b)


@QUICK
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_8_sink_of_another_dtype(dtype, device):
    q, k, v = qkv(1, 40, 40, 2, 1, 16, device=device, dtype=torch.bfloat16)
    sinks = normal(2, device=device, dtype=dtype).requires_grad_()
    out, _ = tilefuse.window_attention(q, k, v, sinks, window=(9, 0))
    (grad,) = torch.autograd.grad(out.float().square().sum(), sinks)
    assert grad.dtype == dtype and grad.isfinite().all() and (grad != 0).all()


def test_10_dilation_one_is_plain(device):
    q, k, v = qkv(1, 61, 61, 2, 1, 16, device=device)
    for a, b in zip(
        tilefuse.window_attention(q, k, v, window=(7, 2), dilation=1), tilefuse.window_attention(q, k, v, window=(7, 2))
    ):
        assert_bit_equal(a, b)


@QUICK
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 80, 96, 112, 128, 192, 256])
def test_12_head_dims(dim, device):
    check(qkv(1, 35, 35, 1, 1, dim, 48, device=device, dtype=torch.bfloat16), {}, {"window": (10, 3)})


def test_12_odd_head_dims(device):
    check(qkv(1, 20, 20, 1, 1, 1, 3, device=device), {}, {"window": (10, 3)})
    check(qkv(1, 20, 20, 1, 1, 33, 7, device=device, dtype=torch.bfloat16), {}, {"window": (10, 3)})


@QUICK
@pytest.mark.parametrize("group", [3, 7, 8, 16])
def test_13_group_sizes(group, device):
    check(qkv(1, 20, 20, 2 * group, 2, 16, device=device), {}, {"window": (6, 0)})


def test_14_offsets_past_int32(device):
    """Tokens 2**30 elements apart, in the inputs and in the gradient that comes in; untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    near = [x[0] for x in qkv(1, 3, 3, 1, 1, 16, device=device, dtype=torch.bfloat16)]
    near.append(normal(3, 1, 16, device=device, dtype=torch.bfloat16, seed=5))
    far = [memory[16 * i :].as_strided((3, 1, 16), (2**30, 16, 1)).copy_(x) for i, x in enumerate(near)]
    results = []
    for tensors in (near, far):
        *leaves, dout = (x[None] for x in tensors)
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, lse = tilefuse.window_attention(*leaves, window=(1, 0))
        results.append([out, lse, *torch.autograd.grad(out, leaves, dout)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)


def test_15_gradients_of_any_strides(device):
    """dout as a transposed view, as one with a last dim that is not contiguous, and a transposed dlse."""
    leaves = [x.requires_grad_() for x in qkv(2, 33, 33, 2, 1, 16, device=device)]
    out, lse = tilefuse.window_attention(*leaves, window=(8, 0))
    dlse = normal(2, 33, 2, device=device, seed=2).transpose(1, 2)
    for dout in (
        normal(2, 2, 33, 16, device=device, seed=1).transpose(1, 2),
        normal(2, 33, 16, 2, device=device, seed=1).transpose(2, 3),
    ):
        got, expected = (
            torch.autograd.grad((out, lse), leaves, grads, retain_graph=True)
            for grads in ((dout, dlse), (dout.contiguous(), dlse.contiguous()))
        )
        for a, b in zip(got, expected):
            assert_bit_equal(a, b)


@QUICK
def test_15_strides(device):
    """Transposed heads and batch, an expanded dout, a last dim that is not contiguous, a misaligned start."""
    q, k, v = qkv(2, 33, 33, 2, 2, 16, device=device)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k2 = k.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).requires_grad_()
    flat = torch.zeros(v.numel() + 1, device=device)
    flat[1:] = v.flatten()
    v2 = flat[1:].view(v.shape).requires_grad_()
    plain = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    results = []
    for leaves in ((q2, k2, v2), plain):
        out, lse = tilefuse.window_attention(*leaves, window=(8, 0))
        results.append([out, lse, *torch.autograd.grad((out.sum(), lse.sum()), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_16_nan_past_the_end(device):
    """Keys and values of other sequences and past the last one never matter, NaN and inf included."""
    q, k, v = qkv(0, 40, 40, 2, 1, 16, device=device)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[30:], bad_v[30:] = float("nan"), float("inf")
    cu = torch.tensor([0, 13, 30], dtype=torch.int32, device=device)
    for a, b in zip(
        tilefuse.window_attention(q, bad_k, bad_v, cu_seqlens_q=cu, window=(50, 50)),
        tilefuse.window_attention(q, k, v, cu_seqlens_q=cu, window=(50, 50)),
    ):
        assert_bit_equal(a, b)


@QUICK
def test_18_decode_step_equals_prefill(device):
    """A cache rolled to the window's keys gives the row that the whole sequence gives."""
    q, k, v = qkv(1, 60, 60, 4, 2, 16, device=device)
    whole, whole_lse = tilefuse.window_attention(q, k, v, window=(15, 0))
    step, step_lse = tilefuse.window_attention(q[:, -1:], k[:, -16:], v[:, -16:], window=(15, 0))
    torch.testing.assert_close(step, whole[:, -1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step_lse, whole_lse[..., -1:], rtol=1e-5, atol=1e-6)


@QUICK
def test_19_backward_sees_the_forward_mask(device):
    """A gradient reaches exactly the keys that the forward reads."""
    q, k, v = qkv(1, 50, 70, 1, 1, 16, device=device)
    for window, d, n in (((9, 4), 1, 0), ((3, 0), 3, 2), ((-1, 2), 2, 0)):
        leaf = v.clone().requires_grad_()
        out, _ = tilefuse.window_attention(q, k, leaf, window=window, dilation=d, sink_tokens=n)
        mask = window_mask(50, 70, window, dilation=d, sink_tokens=n)
        for i in (0, 17, 49):
            (grad,) = torch.autograd.grad(out[0, i].sum(), leaf, retain_graph=True)
            assert torch.equal(grad[0].abs().sum((1, 2)).cpu() > 0, mask[i])


def test_20_deterministic(device):
    tensors, others, options = case("everything", device, torch.bfloat16)
    first = compute(tilefuse.window_attention, tensors, others, options, torch.bfloat16)
    for _ in range(9 if device == "cuda" else 2):
        for a, b in zip(first, compute(tilefuse.window_attention, tensors, others, options, torch.bfloat16)):
            assert_bit_equal(a, b)


@QUICK
def test_22_lse_gradient(device):
    q, k, v = (x.requires_grad_() for x in qkv(1, 40, 40, 2, 1, 16, device=device))
    _, lse = tilefuse.window_attention(q, k, v, window=(9, 0))
    got = torch.autograd.grad(lse.square().sum(), (q, k, v), allow_unused=True)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    _, lse = dense_attention(*leaves, window_mask(40, 40, (9, 0), device=device))
    exact = torch.autograd.grad(lse.square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-4, atol=1e-5)
    assert (got[2] == 0).all()


def test_23_compiles_once_for_every_window():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    call = torch.compile(
        lambda q, k, v, w: tilefuse.window_attention(q, k, v, window=(w, 0))[0], backend=counter, fullgraph=True
    )
    q, k, v = qkv(1, 40, 40, 2, 1, 16)
    for w in (7, 9, 11, 13):
        assert_bit_equal(call(q, k, v, w), tilefuse.window_attention(q, k, v, window=(w, 0))[0])
    # one more than the first: an int becomes dynamic when it first changes
    assert counter.frame_count <= 2


def test_23_compiles_once_for_every_length():
    """With scale and soft cap, which dynamic shapes turn into inputs of the graph."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    call = torch.compile(tilefuse.window_attention, backend=counter, fullgraph=True, dynamic=True)
    for length in (40, 56, 70):
        tensors = qkv(2, length, length, 2, 1, 16)
        options = {"window": (9, 0), "scale": 0.4, "softcap": 3.0}
        assert_bit_equal(call(*tensors, **options)[0], tilefuse.window_attention(*tensors, **options)[0])
    assert counter.frame_count == 1


def test_a_bias_compiles_once_for_every_length():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def attend(q, k, v, weight):
        bias = tilefuse.t5_distance_bias(weight, q.shape[1])
        return tilefuse.window_attention(q, k, v, distance_bias=bias, window=(9, 4))[0]

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for length in (40, 56, 70):
        leaves = [x.requires_grad_() for x in (*qkv(2, length, length, 2, 1, 16), normal(32, 2))]
        for a, b in zip(*(torch.autograd.grad(call(*leaves).square().sum(), leaves) for call in (compiled, attend))):
            assert_bit_equal(a, b)
    assert counter.frame_count == 1


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in qkv(1, 20, 20, 2, 1, 16))
    out, lse = tilefuse.window_attention(q, k, v, window=(9, 0))
    (grad,) = torch.autograd.grad(out.square().sum() + lse.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


def test_23_compiled_training_step():
    q, k, v = (x.requires_grad_() for x in qkv(1, 40, 40, 2, 1, 16))
    leaves = q, k, v, normal(2).requires_grad_(), normal(2, 15).requires_grad_()

    def step(q, k, v, sinks, bias):
        out, lse = tilefuse.window_attention(q, k, v, sinks, distance_bias=bias, window=(9, 0))
        return out.square().sum() + lse.sum()

    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), eager):
        assert_bit_equal(a, b)


@pytest.mark.gpu
def test_23_graph_capture():
    q, k, v = qkv(1, 256, 256, 4, 2, 64, device="cuda", dtype=torch.bfloat16)
    expected = tilefuse.window_attention(q, k, v, window=(63, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = tilefuse.window_attention(q, k, v, window=(63, 0))
    graph.replay()
    assert_bit_equal(out, expected[0])
    assert_bit_equal(lse, expected[1])


@QUICK
def test_24_softcap_and_scale(device):
    check(qkv(1, 60, 60, 2, 1, 16, device=device), {}, {"window": (20, 0), "softcap": 2.0, "scale": 1.3})


def test_25_batch_invariant(device):
    q, k, v = qkv(3, 70, 70, 4, 2, 16, device=device, dtype=torch.bfloat16)
    out, lse = tilefuse.window_attention(q, k, v, window=(20, 5), sink_tokens=2)
    for b in range(3):
        alone, alone_lse = tilefuse.window_attention(*(x[b : b + 1] for x in (q, k, v)), window=(20, 5), sink_tokens=2)
        assert_bit_equal(alone, out[b : b + 1])
        assert_bit_equal(alone_lse, lse[b : b + 1])


@pytest.mark.gpu
def test_14_more_than_two_to_the_31_elements():
    q = torch.randn(1, 2**17 + 64, 130, 128, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    out, _ = tilefuse.window_attention(q, q[:, :, :1], q[:, :, :1], window=(31, 0))
    tail, _ = tilefuse.window_attention(q[:, -64:, -2:], q[:, -96:, :1], q[:, -96:, :1], window=(31, 0))
    torch.testing.assert_close(out[:, -64:, -2:], tail)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.cpu_library)])
def test_memory_is_linear(backend, check_memory):
    check_memory(backend, "call = lambda q, k, v: tilefuse.window_attention(q, k, v, window=(127, 0), sink_tokens=4)")


@QUICK
def test_opcheck(device):
    for name in ("everything", "packed_all", "no_keys", "bias_everything"):
        (q, k, v), others, options = case(name, device)
        optional = ("sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "distance_bias")
        args = [q, k, v, *(others.get(n) for n in optional)]
        if args[5] is not None and args[6] is None:
            args[6] = args[5]
        plain = (
            *options["window"],
            options.get("dilation", 1),
            0.25,
            options.get("softcap", 0.0),
            options.get("sink_tokens", 0),
        )
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.tilefuse.window_attention_fwd.default, (*args, *plain), test_utils=tests)
        out, lse = torch.ops.tilefuse.window_attention_fwd(*args, *plain)
        back = (torch.ones_like(out), None, q, k, v, out, lse, *args[3:], *plain)
        torch.library.opcheck(torch.ops.tilefuse.window_attention_bwd.default, back, test_utils=tests)
        if args[7] is not None:
            torch.library.opcheck(torch.ops.tilefuse.window_attention_bwd_bias.default, back, test_utils=tests)


def test_both_paths_are_one_op():
    (q, k, v), others, options = case("sinks")
    for a, b in zip(
        tilefuse.window_attention(q, k, v, **others, **options),
        torch.ops.tilefuse.window_attention(q, k, v, others["sinks"], **{**options, "window": list(options["window"])}),
    ):
        assert_bit_equal(a, b)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return tilefuse.window_attention(q, k, v, window=(9, 0))

    q, k, v = qkv(1, 40, 40, 2, 1, 16)
    program = torch.export.export(Module(), (q, k, v))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("window_attention" in name for name in names)
    assert_bit_equal(program.module()(q, k, v)[0], tilefuse.window_attention(q, k, v, window=(9, 0))[0])


def _errors():
    """name, the argument that the message names, kind, arguments and options."""
    q, k, v = qkv(1, 5, 5, 4, 2, 8)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    p = tuple(x[0] for x in (q, k, v))
    yield "q", "q", ValueError, (q[0, 0], k, v), {}
    yield "q_dtype", "q", TypeError, (q.int(), k, v), {}
    yield "k_rank", "k", ValueError, (q, k[0], v), {}
    yield "k_dtype", "k", TypeError, (q, k.half(), v), {}
    yield "k_dim", "k", ValueError, (q, k[..., :4], v), {}
    yield "k_batch", "k", ValueError, (q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), {}
    yield "k_device", "k", ValueError, (q, k.to("meta"), v), {}
    yield "v_rank", "v", ValueError, (q, k, v[0]), {}
    yield "v_dtype", "v", TypeError, (q, k, v.half()), {}
    yield "v_length", "v", ValueError, (q, k, v[:, :3]), {}
    yield "v_dim", "v", ValueError, (q, k, v[..., :0]), {}
    yield "v_device", "v", ValueError, (q, k, v.to("meta")), {}
    yield "heads", "k", ValueError, (q[:, :, :3], k, v), {}
    yield "no_heads", "k", ValueError, (q, k[:, :, :0], v[:, :, :0]), {}
    yield "head_dim", "q", ValueError, (q[..., :0], k[..., :0], v), {}
    yield "sinks", "sinks", ValueError, (q, k, v, torch.zeros(3)), {}
    yield "sinks_dtype", "sinks", TypeError, (q, k, v, torch.zeros(4, dtype=torch.int32)), {}
    yield "sinks_device", "sinks", ValueError, (q, k, v, torch.zeros(4, device="meta")), {}
    yield "alibi", "alibi_slopes", ValueError, (q, k, v, None, torch.zeros(4, 1)), {}
    yield "alibi_dtype", "alibi_slopes", TypeError, (q, k, v, None, torch.zeros(4).half()), {}
    yield "alibi_device", "alibi_slopes", ValueError, (q, k, v, None, torch.zeros(4, device="meta")), {}
    yield "alibi_grad", "alibi_slopes", RuntimeError, (q, k, v, None, torch.zeros(4, requires_grad=True)), {}
    bias = (q, k, v, None, None, None, None)
    yield "bias_rank", "distance_bias", ValueError, (*bias, torch.zeros(7)), {}
    yield "bias_heads", "distance_bias", ValueError, (*bias, torch.zeros(2, 7)), {}
    yield "bias_even", "distance_bias", ValueError, (*bias, torch.zeros(4, 8)), {}
    yield "bias_empty", "distance_bias", ValueError, (*bias, torch.zeros(4, 0)), {}
    yield "bias_dtype", "distance_bias", TypeError, (*bias, torch.zeros(4, 7).bfloat16()), {}
    yield "bias_device", "distance_bias", ValueError, (*bias, torch.zeros(4, 7, device="meta")), {}
    yield "packed_without", "cu_seqlens_q", ValueError, p, {}
    yield "cu_with_batch", "cu_seqlens_q", ValueError, (q, k, v, None, None, cu), {}
    yield "cu_k_with_batch", "cu_seqlens_k", ValueError, (q, k, v, None, None, None, cu), {}
    yield "cu_dim", "cu_seqlens_q", ValueError, (*p, None, None, cu[None]), {}
    yield "cu_dtype", "cu_seqlens_q", TypeError, (*p, None, None, cu.float()), {}
    yield "cu_device", "cu_seqlens_q", ValueError, (*p, None, None, cu.to("meta")), {}
    yield "cu_empty", "cu_seqlens_q", ValueError, (*p, None, None, cu[:0]), {}
    yield "cu_k", "cu_seqlens_k", ValueError, (*p, None, None, cu, cu[:1]), {}
    yield "cu_k_dim", "cu_seqlens_k", ValueError, (*p, None, None, cu, cu[None]), {}
    yield "cu_k_dtype", "cu_seqlens_k", TypeError, (*p, None, None, cu, cu.float()), {}
    yield "cu_k_device", "cu_seqlens_k", ValueError, (*p, None, None, cu, cu.to("meta")), {}
    for options in (
        {"window": (-2, 0)},
        {"window": (0, -2)},
        {"window": (1, 2, 3)},
        {"dilation": 0},
        {"sink_tokens": -1},
        {"softcap": -1.0},
        {"softcap": float("inf")},
        {"scale": float("nan")},
        {"max_seqlen_q": -1},
        {"max_seqlen_k": -1},
    ):
        yield str(options), next(iter(options)), ValueError, (q, k, v), options


@pytest.mark.parametrize(("arg", "kind", "args", "options"), [pytest.param(*e[1:], id=e[0]) for e in _errors()])
def test_errors(arg, kind, args, options):
    message = f".* but {arg} requires grad" if kind is RuntimeError else f"{arg} must be "
    with pytest.raises(kind, match=rf"^tilefuse\.window_attention: {message}") as caught:
        tilefuse.window_attention(*args, **options)
    # the fake kernel's users see the same
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(kind) as faked:
        tilefuse.window_attention(*args, **options)
    assert str(faked.value).split(",")[0] == str(caught.value).split(",")[0]


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ("flash_attention", (5, 2), (5, 2)),
        ("flash_attention", (-1, 0), (-1, 0)),
        ("hf", 4096, (4095, 0)),
        ("hf", 1, (0, 0)),
        ("hf", -1, (-1, 0)),
        ("gpt_oss", 128, (127, 0)),
        ("mistral", 8, (7, 0)),
        ("xformers", 8, (7, 0)),
        ("hf_bidirectional", 8, (8, 8)),
        ("hf_bidirectional_flash", 8, (7, 7)),
        ("gemma3_bidirectional", 9, (4, 4)),
        ("longformer", 512, (256, 256)),
        ("longformer_one_sided", 256, (256, 256)),
        ("attention_gym", 8, (8, 0)),
        ("flashinfer", 8, (8, 0)),
        ("longformer", -1, (-1, -1)),
    ],
)
def test_window_from(source, size, expected):
    assert tilefuse.window_from(source, size) == expected


@pytest.mark.parametrize(
    ("source", "size", "kind"),
    [
        ("nobody", 3, ValueError),
        ("hf", 0, ValueError),
        ("hf", -2, ValueError),
        ("hf", 2.0, TypeError),
        ("flash_attention", 3, ValueError),
        ("flash_attention", (1, -2), ValueError),
        ("longformer", -4, ValueError),
        ("hf_bidirectional_flash", 0, ValueError),
        ("hf", True, TypeError),
    ],
)
def test_window_from_errors(source, size, kind):
    with pytest.raises(kind, match=r"tilefuse\.window_from: "):
        tilefuse.window_from(source, size)
