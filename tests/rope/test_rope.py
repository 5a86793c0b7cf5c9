"""``rope`` and ``rope_qk``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.rope.rope import cases, in_place, normal, packed_qkv, tables

case = by_name(cases)
KERNEL = "rope_qk_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
# the two 16-bit types differ in the conversion only: one of them meets every case
CASES_AND_DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or name in ("batched", "packed", "factor", "dim96_30_66")
]


def oracle(x, cos, sin, positions=None, cu_seqlens=None, **options):
    """The formula in float64, token by token and pair by pair."""
    interleaved, offset = options.get("interleaved", False), options.get("rotary_offset", 0)
    section, alternate = options.get("mrope_section"), options.get("mrope_interleaved", False)
    out, half = x.double().clone(memory_format=torch.contiguous_format), cos.shape[1]
    tokens = out.flatten(0, -3)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    sequence = x.shape[-3]
    for t in range(tokens.shape[0]):
        if positions is not None:
            rows = positions.reshape(3, -1)[:, t].tolist() if section else [positions.reshape(-1)[t].item()]
        elif bounds is not None:
            rows = [t - max([b for b in bounds if b <= t], default=0)]
        else:
            rows = [t % sequence]
        for i in range(half):
            axis = 0
            if section and alternate:
                axis = i % 3 if i % 3 and i < 3 * section[i % 3] else 0
            elif section:
                axis = 0 if i < section[0] else 1 if i < section[0] + section[1] else 2
            c, s = cos[rows[axis], i].double(), sin[rows[axis], i].double()
            s = -s if options.get("conjugate") else s
            first = offset + (2 * i if interleaved else i)
            second = first + (1 if interleaved else half)
            a, b = tokens[t, :, first].clone(), tokens[t, :, second].clone()
            tokens[t, :, first], tokens[t, :, second] = a * c - b * s, b * c + a * s
    return out


def naive(x, rest, options):
    """The low-precision formula: everything in x's dtype, as models write it."""
    with tilefuse.backend("reference"):
        cos, sin, *index = rest
        low = tuple(t.to(x.dtype).float() for t in (cos, sin))
        return tilefuse.rope(x, *low, *index, **options)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    q, _, rest, options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        out = tilefuse.rope(q, *rest, **options)
    torch.testing.assert_close(out, oracle(q, *rest, **options), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name, dtype", CASES_AND_DTYPES, ids=str)
def test_matches_oracle(name, dtype, device):
    q, k, rest, options = case(name, device, dtype)
    with poisoned():
        q_out, k_out = tilefuse.rope_qk(q, k, *rest, **options)
        alone = tilefuse.rope(q, *rest, **options)
    for x, out in ((q, q_out), (k, k_out)):
        with tilefuse.backend("reference"):
            exact = tilefuse.rope(x.double(), *rest, **options)
        assert out.is_contiguous() and out.dtype == dtype
        assert_close(out, exact, naive(x, rest, options), name=name)
    assert_bit_equal(alone, q_out)


def test_4_gradient_is_the_conjugate(device):
    """Also where the tables carry a factor, so that the conjugate is not the inverse."""
    q, k, rest, options = case("factor", device)
    q, k = q.requires_grad_(), k.requires_grad_()
    out = tilefuse.rope_qk(q, k, *rest, **options)
    grads = [normal(*o.shape, device=device, dtype=o.dtype, seed=1) for o in out]
    dq, dk = torch.autograd.grad(out, (q, k), grads)
    expected = tilefuse.rope_qk(*grads, *rest, conjugate=True)
    assert_bit_equal(dq, expected[0])
    assert_bit_equal(dk, expected[1])
    (dq,) = torch.autograd.grad(tilefuse.rope(q, *rest).sum(), q)
    assert_bit_equal(dq, tilefuse.rope(torch.ones_like(q), *rest, conjugate=True))


@pytest.mark.parametrize("name", ["batched", "packed", "factor", "dim96_30_66_interleaved", "cu_seqlens", "mrope"])
def test_4_gradcheck(name):
    q, k, rest, options = case(name, dtype=torch.float64)
    q, k = (t[..., :2, :].clone().requires_grad_() for t in (q, k))
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(lambda q, k: tilefuse.rope_qk(q, k, *rest, **options), (q, k), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda q: tilefuse.rope(q, *rest, **options), (q,), fast_mode=True)


def test_4_frozen(device):
    q, k, rest, _ = case("batched", device)
    q_out, k_out = tilefuse.rope_qk(q.requires_grad_(), k, *rest)
    assert q_out.requires_grad and not k_out.requires_grad
    q_out.sum().backward()
    assert q.grad is not None and k.grad is None
    q_out, k_out = tilefuse.rope_qk(q, k.requires_grad_(), *rest)
    k_out.sum().backward()
    assert k.grad is not None


def test_5_nothing_is_mutated(device):
    q, k, rest, _ = case("packed_qkv", device)
    base = q._base.clone()
    grads = [normal(*t.shape, device=device, dtype=t.dtype) for t in (q, k)]
    kept = [g.clone() for g in grads]
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    torch.autograd.backward(tilefuse.rope_qk(*leaves, *rest), grads)
    assert_bit_equal(q._base, base)
    for grad, before in zip(grads, kept):
        assert_bit_equal(grad, before)


def test_7_other_dims_keep_their_bits(device):
    """NaN payloads too."""
    x = normal(6, 3, 96, device=device, dtype=torch.bfloat16)
    bits = x.view(torch.int16)
    bits[..., :40] = torch.arange(0x7F81, 0x7F81 + 40, dtype=torch.int16, device=device)
    out = tilefuse.rope(x, *tables(32, 8, device), rotary_offset=40).view(torch.int16)
    assert_bit_equal(out[..., :40], bits[..., :40])
    assert_bit_equal(out[..., 72:], bits[..., 72:])
    assert not torch.equal(out[..., 40:72], bits[..., 40:72])


@pytest.mark.parametrize("index", [[0, 1, 64], [0, -1, 3], [2**40, 0, 0]], ids=str)
def test_8_position_outside_of_the_table(index, device):
    q, k, rest, _ = case("positions_packed", device)
    cos, sin, positions = rest
    positions[:3] = torch.tensor(index, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"tilefuse.rope_qk: positions must be in \[0, 64\), got"):
            tilefuse.rope_qk(q, k, cos, sin, positions)
        with pytest.raises(ValueError, match=r"tilefuse.rope: cos must be a table that holds .* 10 too, got 8 rows"):
            bounds = torch.tensor([0, 1], dtype=torch.int32)
            tilefuse.rope(normal(12, 2, 64, dtype=torch.float32), cos[:8], sin[:8], None, bounds)
    else:
        out = tilefuse.rope(q, cos, sin, positions)
        assert_bit_equal(out, tilefuse.rope(q, cos, sin, positions.clamp(0, 63)))


def test_8_far_positions(device):
    """Rows past 2**20 of a table whose rows lie so far apart that their offsets need int64."""
    x = normal(3, 2, 4, device=device, dtype=torch.float32)
    far = torch.tensor([2**20 + 1, 2**20 + 7, 3], device=device)
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    # untouched pages of the allocation cost nothing
    memory = torch.empty(2112 * (2**20 + 8), device=device)
    cos, sin = (memory[i:].as_strided((2**20 + 8, 2), (2112, 1)) for i in (0, 2))
    assert cos.stride(0) * int(far[0]) > 2**31
    angles = normal(3, 2, device=device, dtype=torch.float32, seed=4)
    cos[far], sin[far] = angles.cos(), angles.sin()
    expected = tilefuse.rope(x, angles.cos(), angles.sin())
    assert_bit_equal(tilefuse.rope(x, cos, sin, far), expected)


def test_12_packed_equals_batched(device):
    q, k, rest, _ = case("batched", device)
    bounds = torch.arange(0, 15, 7, device=device, dtype=torch.int32)
    for x in (q, k):
        packed = tilefuse.rope(x.reshape(14, *x.shape[2:]), *rest, None, bounds)
        assert_bit_equal(packed.view(x.shape), tilefuse.rope(x, *rest))


@pytest.mark.parametrize("alternate", [False, True])
def test_13_mrope_of_equal_rows_is_rope(alternate, device):
    q, _k, rest, _ = case("positions_packed", device)
    cos, sin, positions = rest
    options = {"mrope_section": (12, 10, 10), "mrope_interleaved": alternate}
    out = tilefuse.rope(q, cos, sin, positions.expand(3, 7), **options)
    assert_bit_equal(out, tilefuse.rope(q, cos, sin, positions))


@pytest.mark.gpu
def test_15_graph_capture(device):
    """A captured call follows what its inputs hold at replay: no host read of positions, no host allocation."""
    q, k, (cos, sin, positions), _ = case("positions_packed", device, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tilefuse.rope_qk(q, k, cos, sin, positions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tilefuse.rope_qk(q, k, cos, sin, positions)
    q.normal_()
    positions.copy_(positions.flip(0))
    graph.replay()
    for captured, eager in zip(out, tilefuse.rope_qk(q, k, cos, sin, positions)):
        assert_bit_equal(captured, eager)


@pytest.mark.gpu
def test_15_launches_go_to_the_current_stream(device):
    q, k, rest, _ = case("packed_qkv", device, torch.bfloat16)
    expected = tilefuse.rope_qk(q, k, *rest)
    late = torch.zeros_like(q._base)
    late_q, late_k = (late.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (q, k))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # the inputs are written on this stream, long after a launch on another one would have read them
        torch.cuda._sleep(100_000_000)
        late.copy_(q._base)
        out = tilefuse.rope_qk(late_q, late_k, *rest)
    torch.cuda.synchronize()
    for a, b in zip(out, expected):
        assert_bit_equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_15_second_gpu(device):
    q, k, rest, _ = case("batched", "cuda:1", torch.bfloat16)
    assert torch.cuda.current_device() == 0
    out = tilefuse.rope_qk(q, k, *rest)
    expected = tilefuse.rope_qk(*(t.to("cuda:0") for t in (q, k, *rest)))
    assert torch.cuda.current_device() == 0
    for a, b in zip(out, expected):
        assert a.device == q.device
        assert_bit_equal(a, b)


def test_many_heads(device):
    """More heads than a power of two of them, in both, and a head dim that is none."""
    q, k = normal(1, 73, 92, device=device), normal(1, 213, 92, device=device)
    cos, sin = tables(92, 1, device)
    q_out, k_out = tilefuse.rope_qk(q, k, cos, sin)
    with tilefuse.backend("reference"):
        exact = tilefuse.rope_qk(q.double(), k.double(), cos, sin)
    for x, out, e in zip((q, k), (q_out, k_out), exact):
        assert_close(out, e, naive(x, (cos, sin), {}))


def test_a_row_does_not_depend_on_its_batch(device):
    q, k, rest, _ = case("batched", device, torch.bfloat16)
    whole = tilefuse.rope_qk(q, k, *rest)
    again = tilefuse.rope_qk(q, k, *rest)
    one = tilefuse.rope_qk(q[1:], k[1:], *rest)
    for i in range(2):
        assert_bit_equal(whole[i], again[i])
        assert_bit_equal(whole[i][1:], one[i])


def x3(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


COS, SIN = tables(64, 8)
ERRORS = {
    "rank": ({"x": x3(5, 64)}, ValueError, r"x must be \[B, S, H, D\] or \[T, H, D\], got \[5, 64\]"),
    "dtype": ({"x": x3(5, 2, 64, dtype=torch.int32)}, TypeError, "x must be float32 or .*int32"),
    "cos_dtype": ({"cos": COS.bfloat16()}, TypeError, r"cos must be .* float32, got \[8, 32\] bf"),
    "sin_dtype": ({"sin": SIN.double()}, TypeError, "sin must be .* float32, got .*float64"),
    "cos_rank": ({"cos": COS[None]}, ValueError, "cos must be"),
    "sin_shape": ({"sin": SIN[:4]}, ValueError, r"sin must be of cos's shape \[8, 32\]"),
    "no_pairs": ({"cos": COS[:, :0]}, ValueError, "cos must be"),
    "too_wide": ({"x": x3(5, 2, 32)}, ValueError, "rotary_offset must be in .*D = 32, rotary_dim = 64"),
    "offset": ({"rotary_offset": 1}, ValueError, "rotary_offset must be"),
    "offset_sign": ({"rotary_offset": -1}, ValueError, "rotary_offset must be"),
    "short_table": ({"x": x3(9, 2, 64)}, ValueError, "cos must be a table of at least 9 rows"),
    "no_rows": (
        {"cos": COS[:0], "sin": SIN[:0], "positions": ints(5)},
        ValueError,
        r"cos must be a table of at least one row, got \[0, 32\] float32",
    ),
    "device": ({"cos": COS.to("meta")}, ValueError, "cos must be on the device of x"),
    "sin_device": ({"sin": SIN.to("meta")}, ValueError, "sin must be on the device of x"),
    "positions_shape": ({"positions": ints(4)}, ValueError, r"positions must be \[5\]"),
    "positions_dtype": ({"positions": x3(5)}, TypeError, "positions must be .*int32 or int64"),
    "positions_device": ({"positions": ints(5).to("meta")}, ValueError, "positions must be on the device of x"),
    "both": (
        {"positions": ints(5), "cu_seqlens": ints(2)},
        ValueError,
        "cu_seqlens must be None when positions is given",
    ),
    "batched_cu_seqlens": (
        {"x": x3(1, 5, 2, 64), "cu_seqlens": ints(2)},
        ValueError,
        "cu_seqlens must be None unless x is packed",
    ),
    "cu_seqlens_dtype": ({"cu_seqlens": x3(2)}, TypeError, "cu_seqlens must be .*int32 or int64"),
    "cu_seqlens_shape": ({"cu_seqlens": ints(0)}, ValueError, r"cu_seqlens must be \[B \+ 1\]"),
    "cu_seqlens_rank": ({"cu_seqlens": ints(1, 2)}, ValueError, r"cu_seqlens must be \[B \+ 1\]"),
    "cu_seqlens_device": ({"cu_seqlens": ints(2).to("meta")}, ValueError, "cu_seqlens must be on the device of x"),
    "mrope_alone": ({"mrope_section": (8, 12, 12)}, ValueError, "positions must be given with mrope"),
    "mrope_shape": ({"mrope_section": (8, 12, 12), "positions": ints(5)}, ValueError, r"positions must be \[3, 5\]"),
    "mrope_sum": (
        {"mrope_section": (8, 12, 11), "positions": ints(3, 5)},
        ValueError,
        "mrope_section must be 3 sections that sum to 32",
    ),
    "mrope_count": (
        {"mrope_section": (16, 16), "positions": ints(3, 5)},
        ValueError,
        "mrope_section must be 3 sections that sum to 32",
    ),
    "mrope_sign": (
        {"mrope_section": (40, -4, -4), "positions": ints(3, 5)},
        ValueError,
        "mrope_section must be 3 sections that sum to 32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("op", ["rope", "rope_", "rope_qk", "rope_qk_"])
@pytest.mark.parametrize("where", [tilefuse, torch.ops.tilefuse], ids=["function", "op"])
def test_errors(name, op, where):
    changes, error, message = ERRORS[name]
    arguments = {"x": x3(5, 2, 64), "cos": COS, "sin": SIN} | changes
    if "qk" in op:
        arguments["q"] = arguments.pop("x")
        arguments["k"] = arguments["q"].clone()
        message = (
            message.replace("x must", "q must").replace("device of x", "device of q").replace("unless x", "unless q")
        )
    with pytest.raises(error, match=f"^tilefuse.{op}: {message}"):
        getattr(where, op)(**arguments)


def test_errors_of_k_and_tables():
    cos, sin = tables(64, 8)
    q = x3(5, 2, 64)
    for k, error in ((x3(4, 2, 64), ValueError), (x3(5, 2, 32), ValueError), (q.bfloat16(), TypeError)):
        with pytest.raises(error, match=r"^tilefuse.rope_qk: k must be of q's"):
            tilefuse.rope_qk(q, k, cos, sin)
    four = x3(2, 5, 2, 64)
    for k in (four[:1], four[:, :4], four[0], x3(2, 5, 2, 32)):
        with pytest.raises(ValueError, match=r"^tilefuse.rope_qk: k must be of q's shape but for the number of heads"):
            tilefuse.rope_qk(four, k, cos, sin)
    with pytest.raises(ValueError, match="k must be on the device of q"):
        tilefuse.rope_qk(q, q.to("meta"), cos, sin)
    for i, name in enumerate(("cos", "sin")):
        both = [t.clone().requires_grad_(i == j) for j, t in enumerate((cos, sin))]
        with pytest.raises(RuntimeError, match=f"tables get no gradient, but {name} requires grad"):
            tilefuse.rope(q, *both)


def test_sections_without_positions():
    """The kernel refuses what the op would have refused before it, and an empty list of sections is none."""
    q, _, (cos, sin, *_), _ = case("batched")
    rotated = tilefuse.rope(q, cos, sin)
    assert_bit_equal(torch.ops.tilefuse.rope_fwd(q, cos, sin, None, None, False, 0, False, [], False), rotated)
    with pytest.raises(ValueError, match=r"^tilefuse.rope: positions must be given with mrope_section"):
        torch.ops.tilefuse.rope_fwd(q, cos, sin, None, None, False, 0, False, [8, 12, 12], False)


@pytest.mark.parametrize("name", ["batched", "dim96_30_66_interleaved", "cu_seqlens", "mrope", "packed_qkv"])
def test_17_opcheck(name):
    q, k, rest, options = case(name)
    index = (*rest, *[None] * (4 - len(rest)))
    full = {
        "interleaved": False,
        "rotary_offset": 0,
        "conjugate": False,
        "mrope_section": (),
        "mrope_interleaved": False,
    }
    values = (full | options).values()
    torch.library.opcheck(torch.ops.tilefuse.rope_fwd.default, (q, *index, *values))
    torch.library.opcheck(torch.ops.tilefuse.rope_qk_fwd.default, (q, k, *index, *values))
    leaf = q.detach().requires_grad_()
    torch.library.opcheck(torch.ops.tilefuse.rope.default, (leaf, *rest), options)
    torch.library.opcheck(torch.ops.tilefuse.rope_qk.default, (leaf, k.detach().requires_grad_(), *rest), options)


def test_11_compile_fullgraph_without_recompiling():
    cos, sin = tables(64, 64)
    compiles = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=compiles, dynamic=True)
    def step(q, k):
        return tilefuse.rope_qk(q, k, cos, sin)

    for tokens in (5, 9, 33):
        q, k = (normal(tokens, h, 64, dtype=torch.float32).requires_grad_() for h in (4, 2))
        out = step(q, k)
        expected = tilefuse.rope_qk(q, k, cos, sin)
        for i in range(2):
            assert_bit_equal(out[i], expected[i])
        grads = torch.autograd.grad([o.square().sum() for o in out], (q, k))
        for grad, eager in zip(grads, torch.autograd.grad([o.square().sum() for o in expected], (q, k))):
            assert_bit_equal(grad, eager)
    assert compiles.frame_count == 1


def test_11_export_keeps_one_node():
    class Rotate(torch.nn.Module):
        def forward(self, q, k, cos, sin):
            return torch.ops.tilefuse.rope_qk(q, k, cos, sin)

    q, k, rest, _ = case("batched")
    program = torch.export.export(Rotate(), (q, k, *rest)).run_decompositions({})
    nodes = [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "tilefuse" in str(n.target)]
    assert nodes == ["tilefuse.rope_qk.default"]
    for out, expected in zip(program.module()(q, k, *rest), tilefuse.rope_qk(q, k, *rest)):
        assert_bit_equal(out, expected)


def test_no_tokens_need_no_table(device):
    cos, sin = (t[:0] for t in tables(64, 8, device))
    x = normal(0, 2, 64, device=device)
    assert tilefuse.rope(x, cos, sin).shape == x.shape


def test_autocast_changes_nothing():
    q, _k, rest, _ = case("batched")
    with torch.autocast("cpu", torch.bfloat16):
        out = tilefuse.rope(q, *rest)
    assert_bit_equal(out, tilefuse.rope(q, *rest))


@pytest.mark.cpu_library
def test_subnormals_round_like_other_numbers():
    # the instruction that rounds to bfloat16 makes them 0
    cos = torch.linspace(1e-40, 3e-38, 32)[None]
    with tilefuse.backend("cpu"):
        out = tilefuse.rope(torch.ones(1, 1, 64).bfloat16(), cos, torch.zeros_like(cos))
    assert_bit_equal(out[0, 0], cos[0].bfloat16().repeat(2))


def test_packed_qkv_is_read_in_place():
    q, _k = packed_qkv(9, 4, 2, 64, "cpu", torch.bfloat16)
    assert not q.is_contiguous() and q.stride(-1) == 1
    with tilefuse.backend("reference"):
        expected = tilefuse.rope(q.contiguous(), *tables(64, 9))
    assert_bit_equal(tilefuse.rope(q, *tables(64, 9)), expected)


@pytest.mark.parametrize("name", CASES)
def test_in_place_equals_functional(name, device):
    q, k, rest, options = case(name, device, torch.bfloat16)
    q_out, k_out = tilefuse.rope_qk(q, k, *rest, **options)
    q, k = in_place(q), in_place(k)
    alone = in_place(q)
    assert tilefuse.rope_(alone, *rest, **options) is alone
    assert_bit_equal(alone, q_out)
    result = tilefuse.rope_qk_(q, k, *rest, **options)
    assert result[0] is q and result[1] is k
    assert_bit_equal(q, q_out)
    assert_bit_equal(k, k_out)


def test_5_in_place_touches_nothing_else(device):
    """q and k inside one packed projection; v, and the dims that do not turn, keep their bits."""
    qkv = normal(9, 8, 96, device=device)
    before = qkv.clone()
    cos, sin = tables(32, 9, device)
    expected = tilefuse.rope_qk(qkv[:, :4], qkv[:, 4:6], cos, sin, rotary_offset=40)
    tilefuse.rope_qk_(qkv[:, :4], qkv[:, 4:6], cos, sin, rotary_offset=40)
    assert_bit_equal(qkv[:, :4], expected[0])
    assert_bit_equal(qkv[:, 4:6], expected[1])
    assert_bit_equal(qkv[:, 6:], before[:, 6:])
    assert_bit_equal(qkv[..., 72:], before[..., 72:])


def test_5_in_place_bumps_the_version():
    x = normal(5, 2, 64, dtype=torch.float32)
    cos, sin = tables(64, 5)
    version = x._version
    tilefuse.rope_(x, cos, sin)
    assert x._version > version
    torch.ops.tilefuse.rope_qk_(x, x[:, :1].clone(), cos, sin)
    assert x._version > version + 1
    # a tensor that autograd saved must not change behind its back
    weight = normal(5, 2, 64, dtype=torch.float32).requires_grad_()
    y = (weight * x).sum()
    with torch.no_grad():
        tilefuse.rope_(x, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_5_in_place_refuses_gradients():
    cos, sin = tables(64, 5)
    leaf = normal(5, 2, 64, dtype=torch.float32).requires_grad_()
    for x in (leaf, leaf * 1):
        with pytest.raises(RuntimeError, match=r"tilefuse.rope_: works in place and has no gradient, but x requires"):
            tilefuse.rope_(x, cos, sin)
        with pytest.raises(RuntimeError, match=r"tilefuse.rope_qk_: works in place .* but k requires"):
            tilefuse.rope_qk_(x.detach().clone(), x, cos, sin)
    with torch.no_grad():
        tilefuse.rope_(leaf, cos, sin)


def test_5_activation_checkpoint_with_in_place():
    """The in-place form on a fresh tensor inside a checkpointed region, gradients through what follows."""
    cos, sin = tables(64, 5)
    weight = normal(2, 64, dtype=torch.float32).requires_grad_()
    data = normal(5, 2, 64, dtype=torch.float32)

    def block(weight):
        return (tilefuse.rope_(data.clone(), cos, sin) * tilefuse.rope((weight * data), cos, sin)).sum()

    (expected,) = torch.autograd.grad(block(weight), weight)
    out = torch.utils.checkpoint.checkpoint(block, weight, use_reentrant=False)
    assert_bit_equal(torch.autograd.grad(out, weight)[0], expected)


def test_in_place_errors_write_nothing(device):
    x = normal(5, 2, 64, device=device, dtype=torch.float32)
    before = x.clone()
    cos, sin = tables(64, 5, device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"tilefuse.rope_: positions must be in \[0, 5\), got 5"):
            tilefuse.rope_(x, cos, sin, torch.tensor([0, 1, 2, 3, 5]))
    with pytest.raises(ValueError, match=r"tilefuse.rope_: x must be a tensor without overlapping elements"):
        tilefuse.rope_(x[:, :1].expand(5, 4, 64), cos, sin)
    with pytest.raises(ValueError, match=r"tilefuse.rope_qk_: k must be a tensor without overlapping elements"):
        tilefuse.rope_qk_(x, x[:, :1].expand(5, 4, 64), cos, sin)
    assert_bit_equal(x, before)


@pytest.mark.parametrize("name", ["batched", "packed_qkv", "cu_seqlens", "dim96_30_66_interleaved"])
def test_17_opcheck_in_place(name):
    q, k, rest, options = case(name)
    torch.library.opcheck(torch.ops.tilefuse.rope_.default, (in_place(q), *rest), options)
    torch.library.opcheck(torch.ops.tilefuse.rope_qk_.default, (in_place(q), in_place(k), *rest), options)


def test_11_compile_in_place_views_of_one_tensor():
    cos, sin = tables(64, 9)

    def step(qkv):
        tilefuse.rope_qk_(qkv[:, :4], qkv[:, 4:6], cos, sin)
        return qkv * 2

    qkv = normal(9, 8, 64, dtype=torch.float32)
    expected, compiled = qkv.clone(), qkv.clone()
    step(expected)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert_bit_equal(compiled, expected)
    assert_bit_equal(out, expected * 2)


def test_9_offsets_past_int32(device):
    """Batches 2**30 elements apart: an odd stride, which allows no vectors, that fits int32; its multiple does not."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    storage = torch.empty(2**31 + 130, dtype=torch.bfloat16, device=device)
    q, k = (storage[64 * i :].as_strided((3, 1, 1, 64), (2**30 + 1, 64, 64, 1)) for i in (0, 1))
    q.copy_(normal(3, 1, 1, 64))
    k.copy_(normal(3, 1, 1, 64, seed=1))
    cos, sin = tables(64, 4, device)
    positions = torch.tensor([[3], [2], [1]], device=device)
    expected = tilefuse.rope_qk(q.contiguous(), k.contiguous(), cos, sin, positions)
    for out, e in zip(tilefuse.rope_qk(q, k, cos, sin, positions), expected):
        assert_bit_equal(out, e)
    tilefuse.rope_qk_(q, k, cos, sin, positions)
    for out, e in zip((q, k), expected):
        assert_bit_equal(out, e)
