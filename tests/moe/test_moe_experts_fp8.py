"""``moe_experts_fp8``. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.moe.moe_experts_fp8 import case

KERNEL = "fp8_grouped_matmul_fwd"


def dequantised(codes, scales):
    with tilefuse.backend("reference"):
        return torch.stack(
            [tilefuse.fp8_dequantize(c, s, block=(128, 128), out_dtype=torch.float32) for c, s in zip(codes, scales)]
        )


def rounded(x):
    """x as its codes see it."""
    with tilefuse.backend("reference"):
        q, scale = tilefuse.fp8_quantize(x)
        return tilefuse.fp8_dequantize(q, scale, out_dtype=torch.float32)


def loop(x, w_gate_up, w_down, weights, ids, activation, limit, requantise):
    """The expert loop on dequantised operands, in their dtype."""
    out = torch.zeros_like(x)
    for e in range(w_gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        gate, up = (x[token] @ w_gate_up[e].T).chunk(2, -1)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if activation == "silu":
            h = torch.nn.functional.silu(gate) * up
        else:
            h = torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu" else "none") * up
        h = requantise(h)
        out.index_add_(0, token, ((h @ w_down[e].T) * weights[token, slot, None]).to(x.dtype))
    return out


@pytest.mark.parametrize(("activation", "limit"), [("silu", 0.0), ("gelu", 0.0), ("gelu_erf", 0.0), ("silu", 0.3)])
@pytest.mark.parametrize("shape", [(9, 3, 2, 160, 96), (33, 4, 2, 128, 128)], ids=str)
def test_matches_oracle(shape, activation, limit, where):
    """As close to the layer on the exact codes as a loop in bf16 that also quantises the activation."""
    x, w, w_scale, d, d_scale, weights, ids = args = case(*shape, where)
    with poisoned():
        out = tilefuse.moe_experts_fp8(*args, activation=activation, limit=limit)
    assert out.dtype == torch.bfloat16
    operands = [t.cpu() for t in (rounded(x), dequantised(w, w_scale), dequantised(d, d_scale), weights)]
    exact = loop(*(t.double() for t in operands), ids.cpu(), activation, limit, lambda h: h)
    low = [t.bfloat16() for t in operands[:3]]
    plain = loop(*low, operands[3], ids.cpu(), activation, limit, lambda h: rounded(h).bfloat16())
    assert_close(out.cpu(), exact, plain)


def test_10_dropped_slots(where):
    args = list(case(9, 3, 2, 128, 64, where))
    args[6] = torch.full_like(args[6], -1)
    assert not tilefuse.moe_experts_fp8(*args).any()
    args = list(case(9, 3, 2, 128, 64, where))
    args[6][4] = 3
    clean = tilefuse.moe_experts_fp8(*args)
    args[0][4] = math.nan
    assert_bit_equal(tilefuse.moe_experts_fp8(*args), clean)
    assert not clean[4].any()


def test_1_no_tokens(where):
    assert tilefuse.moe_experts_fp8(*case(0, 2, 2, 128, 64, where)).shape == (0, 128)


def test_13_14_repeatable_and_batch_invariant(where, repeats):
    args = list(case(12, 3, 2, 160, 96, where))
    out = tilefuse.moe_experts_fp8(*args)
    for _ in range(repeats(where)):
        assert_bit_equal(tilefuse.moe_experts_fp8(*args), out)
    if where != "cuda":
        # there the number of rows chooses the tile
        part = (args[0][3:5], *args[1:5], args[5][3:5], args[6][3:5])
        assert_bit_equal(tilefuse.moe_experts_fp8(*part), out[3:5])
    # other batch mates, as many
    args[0], args[6] = args[0].clone(), args[6].clone()
    args[0][1:] = args[0][1:].flip(0) * 3
    args[6][1:] = args[6][1:].flip(0)
    assert_bit_equal(tilefuse.moe_experts_fp8(*args)[:1], out[:1])


def test_16_compile():
    args = case(6, 3, 2, 128, 64)
    compiled = torch.compile(tilefuse.moe_experts_fp8, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_bit_equal(compiled(*args), tilefuse.moe_experts_fp8(*args))


X, A = torch.zeros(4, 128), torch.zeros(3, 256, 128, dtype=torch.float8_e4m3fn)
D, S = torch.zeros(3, 128, 128, dtype=torch.float8_e4m3fn), torch.ones(3, 2, 1)
W, I = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"moe_experts_fp8: x must be \[T, H\]", (X[0], A, S, D, S[:, :1], W, I), {}),
        (TypeError, "x must be float32 or bfloat16 or float16", (X.double(), A, S, D, S[:, :1], W, I), {}),
        (TypeError, "w_gate_up must be float8_e4m3fn", (X, A.float(), S, D, S[:, :1], W, I), {}),
        (ValueError, r"up_scale must be \[3, 2, 1\] or \[3, 256, 1\] float32", (X, A, S[:, :1], D, S[:, :1], W, I), {}),
        (TypeError, "w_down_scale must be", (X, A, S, D, S[:, :1].double(), W, I), {}),
        (ValueError, "activation must be one of silu", (X, A, S, D, S[:, :1], W, I), {"activation": "swiglu_oai"}),
        (ValueError, "w_down_scale must be on the device of x", (X, A, S, D, S[:, :1].to("meta"), W, I), {}),
        (RuntimeError, "x requires grad", (X.clone().requires_grad_(), A, S, D, S[:, :1], W, I), {}),
    ],
)  # fmt: skip
def test_errors(error, match, args, options):
    for call in (tilefuse.moe_experts_fp8, torch.ops.tilefuse.moe_experts_fp8):
        with pytest.raises(error, match=match):
            call(*args, **options)
