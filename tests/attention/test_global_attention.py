"""``global_attention``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.attention.dense import dense_global, upstream
from tilefuse.testing.inputs.attention.global_attention import cases
from tilefuse.testing.inputs.attention.window_attention import normal, qkv

case = by_name(cases)
KERNEL = "global_attention_fwd"
# the same code paths run in the other tests
QUICK = pytest.mark.slow_in_interpreter
CASES = [case[0] for case in cases("cpu", torch.float32)]
GRADS = ("q", "k", "v", "q_global", "k_global", "v_global")


def compute(function, tensors, index, mask, options, dtype):
    """out, lse and the gradients of all tensors under random dout and dlse that all functions share."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse = function(*leaves[:3], index, *(leaves[3:] or [None] * 3), mask, **options)
    dout, dlse = upstream(out, lse, tensors[0].dtype)
    total = (out * dout).sum() + (lse.masked_fill(lse.isinf(), 0) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def oracle_of_backward(tensors, index, mask, options, out, lse):
    """float64 gradients from the backward's own operands, which hold the rounded out and lse."""
    dout, dlse = (x.double() for x in upstream(out, lse, tensors[0].dtype))
    wide = [x.double() for x in tensors]
    left, right = options["window"]
    causal = options.get("causal", False)
    plain = left, 0 if causal else right, options.get("dilation", 1), causal, tensors[0].shape[-1] ** -0.5
    with tilefuse.backend("reference"):
        return torch.ops.tilefuse.global_attention_bwd(
            dout, dlse, *wide[:3], out.double(), lse.double(), index, *(wide[3:] or [None] * 3), mask, *plain
        )


def check(tensors, index, mask, options):
    with poisoned():
        got = compute(tilefuse.global_attention, tensors, index, mask, options, tensors[0].dtype)
    clean = [torch.nan_to_num(x, nan=0.0) for x in tensors]
    exact = compute(dense_global, clean, index, mask, options, torch.float64)
    naive = compute(dense_global, clean, index, mask, options, tensors[0].dtype)
    on_operands = oracle_of_backward(clean, index, mask, options, *got[:2])
    for i, name in enumerate(("out", "lse")):
        assert_close(got[i], exact[i], naive[i], name=name)
    if tensors[0].numel() == 0:
        return
    # float32 noise of a gradient's terms (dout . v) * k: a row may cancel to nothing, its terms do not
    largest = max(float(x.float().abs().max()) for x in clean)
    dp = clean[2].shape[-1] ** 0.5 * max(float(x.float().norm(dim=-1).max()) for x in clean[2::3])
    terms = 4 * 2.0**-24 * dp * largest
    for name, x, y, z, w in zip(GRADS, got[2:], exact[2:], naive[2:], on_operands):
        assert x.is_contiguous()
        assert_close(x, y, z, name=name, tiny=terms, rows=False)
        assert_close(x, w, z, name=f"{name} on the backward's operands", tiny=terms)


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, device):
    """9: no globals, all, the last token, two in one block, inside of the band, per-batch counts, padded ones."""
    check(*case(name, device))


@QUICK
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["per_batch", "own_projections", "causal"])
def test_matches_oracle_in_half(name, dtype, device):
    check(*case(name, device, dtype))


def test_half_in_triton(triton_backend):
    check(*case("own_projections", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    tensors, index, mask, options = case(name, dtype=torch.float64)
    tensors = [torch.nan_to_num(x, nan=0.0) for x in tensors]
    with tilefuse.backend("reference"):
        got = compute(tilefuse.global_attention, tensors, index, mask, options, torch.float64)
    for x, y in zip(got, compute(dense_global, tensors, index, mask, options, torch.float64)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["own_projections", "causal"])
def test_gradcheck(name):
    tensors, index, mask, options = case(name, dtype=torch.float64)
    leaves = [torch.nan_to_num(x, nan=0.0).requires_grad_() for x in tensors]

    def call(q, k, v, *own):
        out, lse = tilefuse.global_attention(q, k, v, index, *(own or [None] * 3), mask, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@QUICK
def test_9_repeats_order_and_padding_of_the_list(device):
    q, k, v = qkv(1, 60, 60, 2, 1, 16, device=device)
    results = [
        tilefuse.global_attention(q, k, v, torch.tensor([x], device=device), window=(4, 4))
        for x in ([3, 40], [40, 3, 3, 40], [-1, 40, 100, 3], [3, -7, 40])
    ]
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-6)


def test_9_without_globals_is_window_attention(device):
    q, k, v = qkv(2, 60, 60, 2, 1, 16, device=device)
    none = torch.full((2, 3), -1, dtype=torch.int32, device=device)
    for a, b in zip(
        tilefuse.global_attention(q, k, v, none, window=(7, 2)), tilefuse.window_attention(q, k, v, window=(7, 2))
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@QUICK
@pytest.mark.parametrize("some", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_some_projections(some, device):
    """Each projection may be missing on its own; gradients of a shared tensor add up before they are rounded."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 40, 40, 2, 1, 16, device=device))
    own = [
        normal(*x.shape, device=device, seed=21).requires_grad_() if i in some else None
        for i, x in enumerate((q, k, v))
    ]
    index = torch.tensor([[2, 30]], device=device)
    leaves = [q, k, v, *(x for x in own if x is not None)]
    got = torch.autograd.grad(tilefuse.global_attention(q, k, v, index, *own, window=(4, 4))[0].square().sum(), leaves)
    exact = torch.autograd.grad(dense_global(q, k, v, index, *own, window=(4, 4))[0].square().sum(), leaves)
    for a, b in zip(got, exact):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@QUICK
def test_16_nan_in_padding(device):
    """NaN in padded queries, keys and values reaches no other row and no gradient."""
    tensors, index, mask, options = case("padded_global", device)
    got = compute(tilefuse.global_attention, tensors, index, mask, options, torch.float32)
    clean = [torch.nan_to_num(x, nan=0.0) for x in tensors]
    expected = compute(tilefuse.global_attention, clean, index, mask, options, torch.float32)
    for a, b in zip(got, expected):
        assert_bit_equal(a, b)
    assert (got[0][~mask] == 0).all() and (got[1].transpose(1, 2)[~mask] == float("-inf")).all()


def test_20_25_deterministic_and_batch_invariant(device):
    tensors, index, mask, options = case("per_batch", device, torch.bfloat16)
    first = compute(tilefuse.global_attention, tensors, index, mask, options, torch.bfloat16)
    for a, b in zip(first, compute(tilefuse.global_attention, tensors, index, mask, options, torch.bfloat16)):
        assert_bit_equal(a, b)
    alone, _ = tilefuse.global_attention(*(x[1:] for x in tensors), index[1:], **options)
    assert_bit_equal(alone, first[0][1:])


@QUICK
@pytest.mark.parametrize(("dim", "group"), [(40, 3), (80, 7), (112, 8), (192, 1), (256, 2)])
def test_12_13_head_dims_and_group_sizes(dim, group, device):
    tensors = qkv(1, 20, 20, group, 1, dim, 48, device=device, dtype=torch.bfloat16)
    check(list(tensors), torch.tensor([[2, 17]], device=device), None, {"window": (6, 3)})


def test_14_offsets_past_int32(device):
    """Tokens 2**30 elements apart, in the inputs and in the gradient that comes in; untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    memory = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=device)
    near = [normal(3, 1, 16, device=device, dtype=torch.bfloat16, seed=i) for i in range(7)]
    far = [memory[16 * i :].as_strided((3, 1, 16), (2**30, 16, 1)).copy_(x) for i, x in enumerate(near)]
    index = torch.tensor([[2]], device=device)
    results = []
    for tensors in (near, far):
        *leaves, dout = (x[None] for x in tensors)
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, lse = tilefuse.global_attention(*leaves[:3], index, *leaves[3:], window=(1, 0))
        results.append([out, lse, *torch.autograd.grad(out, leaves, dout)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)


def test_15_strides(device):
    """Transposed heads, an expanded key, a value that is not contiguous; dout and dlse of any strides."""
    q, k, v = qkv(2, 33, 33, 2, 2, 16, device=device)
    index = torch.tensor([[0, 30], [7, -1]], device=device).t().contiguous().t()
    k = k[:1]
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.expand(2, -1, -1, -1),
        v.transpose(2, 3).contiguous().transpose(2, 3),
    )
    dout = normal(2, 2, 33, 16, device=device, seed=1).transpose(1, 2)
    dlse = normal(2, 33, 2, device=device, seed=2).transpose(1, 2)
    results = []
    for tensors, grads in (
        (views, (dout, dlse)),
        ((q, k.repeat(2, 1, 1, 1), v), (dout.contiguous(), dlse.contiguous())),
    ):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = tilefuse.global_attention(*leaves, index, window=(8, 2))
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, grads)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)


def test_grids_fit(record_launches):
    """A grid's second axis ends at 65,535; the first is for what grows with batch, heads and global rows."""
    launches = record_launches("global_attention")
    from tilefuse.triton_kernels.attention import global_attention

    q = torch.empty(1024, 4096, 32, 64, dtype=torch.bfloat16, device="meta")
    index = torch.empty(1024, 256, dtype=torch.int64, device="meta")
    options = (index, None, None, None, None, 256, 256, 1, False, 0.1)
    out, lse = global_attention.global_attention_fwd(q, q, q, *options)
    global_attention.global_attention_bwd(out, lse, q, q, q, out, lse, *options)
    assert {"global_attention_fwd_kernel", "global_attention_bwd_q_kernel"} <= {name for name, _, _ in launches}
    assert all(n <= 65535 for _, grid, _ in launches for n in grid[1:])


@pytest.mark.gpu
def test_23_graph_capture(assert_replays):
    """Forward and backward follow what their inputs hold at replay, the list of globals included."""
    leaves = [x.requires_grad_() for x in qkv(2, 256, 256, 4, 2, 64, device="cuda", dtype=torch.bfloat16)]
    index = torch.tensor([[0, 100], [7, -1]], device="cuda")

    def step():
        out, lse = tilefuse.global_attention(*leaves, index, window=(63, 0))
        return [out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), leaves)]

    with tilefuse.backend("triton"):
        assert_replays(step, index, (torch.tensor([[200, -1], [3, 9]]),))


def test_second_derivatives_are_refused():
    tensors, index, _, options = case("per_batch")
    q = tensors[0].requires_grad_()
    out, _ = tilefuse.global_attention(*tensors, index, **options)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


@QUICK
def test_compiled_training_step(device):
    tensors, index, _, options = case("per_batch", device)
    leaves = [x.requires_grad_() for x in tensors]

    def step(*leaves):
        return tilefuse.global_attention(*leaves, index, **options)[0].square().sum()

    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, compiled):
        assert_bit_equal(a, b)


@QUICK
def test_opcheck(device):
    tensors, index, _, options = case("dilated", device)
    args = (*tensors[:3], index, *tensors[3:], None, *options["window"], options["dilation"], False, 0.25)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.tilefuse.global_attention_fwd.default, args, test_utils=tests)
    out, lse = torch.ops.tilefuse.global_attention_fwd(*args)
    back = (torch.ones_like(out), None, *tensors[:3], out, lse, *args[3:])
    torch.library.opcheck(torch.ops.tilefuse.global_attention_bwd.default, back, test_utils=tests)


def _errors():
    """name, the argument that the message names, kind, arguments and options."""
    q, k, v = qkv(2, 32, 32, 4, 2, 8)
    index = torch.tensor([[0], [1]])
    none, mask = (None,) * 3, torch.ones(2, 32, dtype=torch.bool)
    yield "q", "q", ValueError, (q[0], k, v, index), {}
    yield "q_dtype", "q", TypeError, (q.int(), k, v, index), {}
    yield "k", "k", ValueError, (q, k[:, :9], v[:, :9], index), {}
    yield "k_dtype", "k", TypeError, (q, k.half(), v, index), {}
    yield "v", "v", ValueError, (q, k, v[:, :9], index), {}
    yield "v_device", "v", ValueError, (q, k, v.to("meta"), index), {}
    yield "index", "global_index", ValueError, (q, k, v, index[:, 0]), {}
    yield "index_batch", "global_index", ValueError, (q, k, v, index[:1]), {}
    yield "index_dtype", "global_index", TypeError, (q, k, v, index.float()), {}
    yield "index_device", "global_index", ValueError, (q, k, v, index.to("meta")), {}
    for i, x in enumerate((q, k, v)):
        name = ("q_global", "k_global", "v_global")[i]
        before = (None,) * i
        yield name, name, ValueError, (q, k, v, index, *before, x[:, :3]), {}
        yield f"{name}_dtype", name, TypeError, (q, k, v, index, *before, x.half()), {}
        yield f"{name}_device", name, ValueError, (q, k, v, index, *before, x.to("meta")), {}
    yield "mask", "key_mask", ValueError, (q, k, v, index, *none, mask[:, :3]), {}
    yield "mask_dtype", "key_mask", TypeError, (q, k, v, index, *none, mask.float()), {}
    yield "mask_device", "key_mask", ValueError, (q, k, v, index, *none, mask.to("meta")), {}
    for options in ({"window": (-2, 0)}, {"window": (1, 2, 3)}, {"dilation": 0}, {"scale": float("inf")}):
        yield str(options), next(iter(options)), ValueError, (q, k, v, index), options


@pytest.mark.parametrize(("arg", "kind", "args", "options"), [pytest.param(*e[1:], id=e[0]) for e in _errors()])
def test_errors(arg, kind, args, options):
    for call in (tilefuse.global_attention, torch.ops.tilefuse.global_attention):
        with pytest.raises(kind, match=rf"^tilefuse\.global_attention: {arg} must be "):
            call(*args, **{"window": (3, 3), **options})


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.cpu_library)])
def test_memory_is_linear(backend, check_memory):
    prepare = """
index = torch.arange(0, 65536, 4096)[None]
call = lambda q, k, v: tilefuse.global_attention(q, k, v, index, window=(64, 64))
"""
    check_memory(backend, prepare)
