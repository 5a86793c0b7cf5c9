"""``qk_norm_rope``, forward and backward. A number in a test's name is that of the edge case in ``test_rope``."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.rope.qk_norm_rope import cases
from tilefuse.testing.inputs.rope.rope import normal, tables

case = by_name(cases)
KERNEL = "qk_norm_rope_fwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
# the two 16-bit types differ in the conversion only: one of them meets every case
CASES_AND_DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or name in ("batched", "packed", "dim96_30_66")
]


def separate(q, k, q_weight, k_weight, *rest, eps=1e-6, weight_offset=0.0, **options):
    """RMSNorm modules, then ``rope_qk``, in the dtype of the operands."""
    q, k = (
        (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()) * (weight + weight_offset).to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    with tilefuse.backend("reference"):
        return tilefuse.rope_qk(q, k, *rest, **options)


def run(function, tensors, rest, options, dtype=None):
    """Outputs and gradients for fixed upstream gradients."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves, *rest, **options)
    upstream = [
        normal(*t.shape, device=t.device, dtype=tensors[0].dtype, seed=7).to(o.dtype) for t, o in zip(tensors, out)
    ]
    return out, torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("name", ["batched", "packed", "dim96_30_66", "cu_seqlens", "dim192_64_128_interleaved"])
def test_reference_is_the_formula(name):
    """Forward against separate ops in float64, backward against autograd through them and finite differences."""
    tensors, rest, options = case(name, dtype=torch.float64)
    with tilefuse.backend("reference"):
        out, grads = run(tilefuse.qk_norm_rope, tensors, rest, options)
        expected, expected_grads = run(separate, tensors, rest, options)
        for a, b in zip((*out, *grads), (*expected, *expected_grads)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        small = [t[..., :2, :].clone().requires_grad_() for t in tensors[:2]] + [
            t.clone().requires_grad_() for t in tensors[2:]
        ]
        function = lambda *leaves: tilefuse.qk_norm_rope(*leaves, *rest, **options)  # noqa: E731
        assert torch.autograd.gradcheck(function, small, fast_mode=True)


@pytest.mark.parametrize("name, dtype", CASES_AND_DTYPES, ids=str)
def test_16_matches_oracle(name, dtype, device):
    tensors, rest, options = case(name, device, dtype)
    with poisoned():
        out, grads = run(tilefuse.qk_norm_rope, tensors, rest, options)
    with tilefuse.backend("reference"):
        exact, exact_grads = run(tilefuse.qk_norm_rope, tensors, rest, options, torch.float64)
    plain, plain_grads = run(separate, tensors, rest, options)
    for a, b, c in zip((*out, *grads), (*exact, *exact_grads), (*plain, *plain_grads)):
        assert a.dtype == c.dtype and a.is_contiguous()
        assert_close(a, b, c, name=name)


def test_frozen_weights(device):
    tensors, rest, _ = case("batched", device)
    q, k, q_weight, k_weight = tensors
    q = q.detach().requires_grad_()
    out = tilefuse.qk_norm_rope(q, k, q_weight, k_weight, *rest)
    (dq,) = torch.autograd.grad(out[0].square().sum(), q)
    _, everything = run(tilefuse.qk_norm_rope, tensors, rest, {})
    assert dq.shape == everything[0].shape and not tilefuse.qk_norm_rope(*tensors, *rest)[0].requires_grad


def test_runs_are_bit_equal_and_rows_independent(device):
    tensors, rest, options = case("packed_qkv", device, torch.bfloat16)
    first, again = (run(tilefuse.qk_norm_rope, tensors, rest, options) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*again[0], *again[1])):
        assert_bit_equal(a, b)
    q, k, *weights = tensors
    alone = tilefuse.qk_norm_rope(q[:3], k[:3], *weights, *rest, **options)
    assert_bit_equal(alone[0], first[0][0][:3])
    assert_bit_equal(alone[1], first[0][1][:3])


def test_weight_gradient_of_many_tokens(device):
    """More tokens than one partial sum holds, a length that no block divides."""
    q, k = normal(2, 67, 3, 16, device=device), normal(2, 67, 1, 16, device=device)
    weights = [normal(16, device=device, seed=s) for s in (1, 2)]
    rest = tables(16, 67, device)
    _, grads = run(tilefuse.qk_norm_rope, (q, k, *weights), rest, {})
    with tilefuse.backend("reference"):
        _, exact = run(tilefuse.qk_norm_rope, (q, k, *weights), rest, {}, torch.float64)
    _, plain = run(separate, (q, k, *weights), rest, {})
    for a, b, c in zip(grads, exact, plain):
        assert_close(a, b, c)


def test_9_offsets_past_int32(device):
    """Tokens 2**30 elements apart, an odd stride that fits int32; gradients too. Untouched pages cost nothing."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    storage = torch.empty(2**31 + 130, dtype=torch.bfloat16, device=device)
    far = [storage[64 * i :].as_strided((3, 1, 64), (2**30 + 1, 64, 1)) for i in (0, 1)]
    for i, x in enumerate(far):
        x.copy_(normal(3, 1, 64, seed=i))
    weights = [normal(64, device=device, seed=i) for i in (2, 3)]
    rest = tables(64, 4, device)
    near = [x.contiguous() for x in far]
    for a, b in zip(*(run(tilefuse.qk_norm_rope, (*qk, *weights), rest, {}) for qk in (far, near))):
        for x, y in zip(a, b):
            assert_bit_equal(x, y)


def test_nan_stays_in_its_row(device):
    tensors, rest, options = case("batched", device)
    q, *others = tensors
    clean, _ = tilefuse.qk_norm_rope(q, *others, *rest, **options)
    q = q.clone()
    q[1, 2, 0, 5] = float("nan")
    out, _ = tilefuse.qk_norm_rope(q, *others, *rest, **options)
    assert out[1, 2, 0].isnan().all()
    out[1, 2, 0] = clean[1, 2, 0]
    assert_bit_equal(out, clean)


def test_8_position_outside_of_the_table(device):
    tensors, (cos, sin, positions), _ = case("positions_packed", device)
    positions[2] = 64
    if device == "cpu":
        with pytest.raises(ValueError, match=r"tilefuse.qk_norm_rope: positions must be in \[0, 64\), got 64"):
            tilefuse.qk_norm_rope(*tensors, cos, sin, positions)
    else:
        out = tilefuse.qk_norm_rope(*tensors, cos, sin, positions)
        assert_bit_equal(out[0], tilefuse.qk_norm_rope(*tensors, cos, sin, positions.clamp(0, 63))[0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({2: torch.zeros(32)}, ValueError, r"q_weight must be \[D\] with D = 64, got \[32\] float32"),
        ({3: torch.zeros(1, 64)}, ValueError, r"k_weight must be \[D\]"),
        ({2: torch.zeros(64, dtype=torch.float64)}, TypeError, "q_weight must be float32, bfloat16 or float16"),
        ({3: torch.zeros(64, dtype=torch.int32)}, TypeError, "k_weight must be float32, bfloat16 or float16"),
        ({3: torch.zeros(64, dtype=torch.bfloat16)}, TypeError, "k_weight must be of q_weight's dtype float32"),
        ({2: torch.zeros(64, device="meta")}, ValueError, "q_weight must be on the device of q"),
        ({3: torch.zeros(64, device="meta")}, ValueError, "k_weight must be on the device of q"),
        ({1: torch.zeros(4, 2, 64)}, ValueError, "k must be of q's shape"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
        ({"rotary_offset": 2}, ValueError, "rotary_offset must be"),
    ],
)
def test_errors(change, error, message):
    args = [torch.zeros(5, 2, 64), torch.zeros(5, 1, 64), torch.zeros(64), torch.zeros(64), *tables(64, 8)]
    options = {}
    for key, value in change.items():
        if isinstance(key, int):
            args[key] = value
        else:
            options[key] = value
    for call in (tilefuse.qk_norm_rope, torch.ops.tilefuse.qk_norm_rope):
        with pytest.raises(error, match=f"^tilefuse.qk_norm_rope: {message}"):
            call(*args, **options)


def test_second_derivatives_are_refused():
    tensors, rest, options = case("batched")
    q = tensors[0].requires_grad_()
    out, _ = tilefuse.qk_norm_rope(q, *tensors[1:], *rest, **options)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["batched", "cu_seqlens", "dim96_30_66_interleaved", "packed_qkv"])
def test_17_opcheck(name):
    tensors, rest, options = case(name)
    full = {"eps": 1e-6, "weight_offset": 0.0, "interleaved": False, "rotary_offset": 0} | options
    index = (*rest, *[None] * (4 - len(rest)))
    args = (*tensors, *index, *full.values())
    torch.library.opcheck(torch.ops.tilefuse.qk_norm_rope_fwd.default, args)
    grads = [t.contiguous() for t in tensors[:2]]
    torch.library.opcheck(torch.ops.tilefuse.qk_norm_rope_bwd.default, (*grads, *args))
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.tilefuse.qk_norm_rope.default, (*leaves, *rest), options)


def test_11_compile_fullgraph_without_recompiling():
    cos, sin = tables(64, 64)
    compiles, frames = CompileCounterWithBackend("aot_eager"), 0
    step = torch.compile(tilefuse.qk_norm_rope, fullgraph=True, backend=compiles, dynamic=True)
    weights = [normal(64, dtype=torch.float32, seed=s) for s in (1, 2)]
    for tokens in (5, 9, 33):
        tensors = (*(normal(tokens, h, 64, dtype=torch.float32) for h in (4, 2)), *weights)
        out, grads = run(step, tensors, (cos, sin), {"eps": 1e-5})
        expected, expected_grads = run(tilefuse.qk_norm_rope, tensors, (cos, sin), {"eps": 1e-5})
        for a, b in zip((*out, *grads), (*expected, *expected_grads)):
            assert_bit_equal(a, b)
        # Dynamo counts an empty frame beside the one graph; later lengths add none
        frames = frames or compiles.frame_count
        assert compiles.frame_count == frames <= 2
