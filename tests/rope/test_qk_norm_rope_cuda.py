"""The CUDA C++ kernels of ``qk_norm_rope``, run on the CPU by the emulation."""

import pytest
import torch

import tilefuse
from tilefuse.reference.rope import qk_norm_rope as reference
from tilefuse.testing import assert_close, canary, emulation
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.rope.qk_norm_rope import cases
from tilefuse.testing.inputs.rope.rope import normal, tables

case = by_name(cases)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [case[0] for case in cases("cpu", torch.float32) if "last_dim" not in case[0]]


@pytest.fixture(scope="module")
def kernels():
    return emulation.load_or_skip("rope", "qk_norm_rope")


def rows(x):
    """Address, batch, sequence and head stride, heads; strides of dims of size 1 are 0, as the host passes them."""
    strides = [0 if size <= 1 else stride for size, stride in zip(x.shape, x.stride())]
    strides = [0, *strides] if x.ndim == 3 else strides
    return [x.data_ptr(), *strides[:3], x.shape[-2]]


def emulated(kernels, tensors, rest, grads=(), *, eps=1e-6, weight_offset=0.0, interleaved=False, rotary_offset=0):
    """What csrc/rope/qk_norm_rope.cu does, then the launches; the outputs of the forward or of the backward."""
    q, k, q_weight, k_weight = tensors
    cos, sin, positions, cu_seqlens = (*rest, None, None)[:4]
    outs = [canary(t.shape, t.dtype) for t in (q, k)]
    weight_outs = [canary(t.shape, t.dtype) for t in (q_weight, k_weight)] if grads else []
    place = [0]
    if positions is not None:
        strides = [0, *([0] if q.ndim == 3 else []), *positions.stride()]
        place = [1, positions.data_ptr(), int(positions.dtype == torch.int64), *strides]
    elif cu_seqlens is not None:
        place = [2, cu_seqlens.data_ptr(), int(cu_seqlens.dtype == torch.int64), cu_seqlens.shape[0]]
    tokens = q.shape[:-2].numel()
    blocks = kernels.blocks(tokens * (q.shape[-2] + k.shape[-2]))
    partial = canary((blocks, 2, q.shape[-1]), torch.float32)
    kernels.run(
        DTYPES.index(q.dtype),
        [rows(q), rows(outs[0].tensor), rows(k), rows(outs[1].tensor)],
        [rows(g) for g in grads],
        [tokens, q.shape[-3], cos.shape[0], q.shape[-1], cos.shape[1], rotary_offset],
        [cos.data_ptr(), cos.stride(0)],
        [sin.data_ptr(), sin.stride(0)],
        place,
        [q_weight.data_ptr(), k_weight.data_ptr()],
        DTYPES.index(q_weight.dtype),
        eps,
        weight_offset,
        interleaved,
        partial.tensor.data_ptr(),
        [w.tensor.data_ptr() for w in weight_outs],
    )
    for out in [*outs, *weight_outs, partial]:
        out.check()
    return [out.tensor for out in [*outs, *weight_outs]]


def arguments(tensors, rest, options, cast=lambda t: t):
    """Of the reference kernels, in their order."""
    rest = (*rest, None, None)[:4]
    return (
        *(cast(t) for t in tensors),
        *rest,
        options.get("eps", 1e-6),
        options.get("weight_offset", 0.0),
        options.get("interleaved", False),
        options.get("rotary_offset", 0),
    )


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, kernels):
    # the three dtypes share all but the conversion, so they take turns
    dtype = DTYPES[CASES.index(name) % 3]
    tensors, rest, options = case(name, dtype=dtype)
    outs = emulation.in_every_order(kernels, lambda: emulated(kernels, tensors, rest, **options))
    exact = reference.qk_norm_rope_fwd(*arguments(tensors, rest, options, torch.Tensor.double))
    naive = reference.qk_norm_rope_fwd(*arguments(tensors, rest, options))
    for out, a, b in zip(outs, exact, naive, strict=True):
        # the naive form computes in float32 too, so both may be off by the last rounding
        torch.testing.assert_close(out.double(), a, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert out.shape == b.shape


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_oracle(name, kernels):
    dtype = DTYPES[CASES.index(name) % 3]
    tensors, rest, options = case(name, dtype=dtype)
    grads = [normal(*t.shape, dtype=dtype, seed=seed) for seed, t in enumerate(tensors[:2], start=5)]
    outs = emulation.in_every_order(kernels, lambda: emulated(kernels, tensors, rest, grads, **options))
    exact = reference.qk_norm_rope_bwd(
        *(g.double() for g in grads), *arguments(tensors, rest, options, torch.Tensor.double)
    )
    naive = reference.qk_norm_rope_bwd(*grads, *arguments(tensors, rest, options))
    for out, a, b in zip(outs, exact, naive, strict=True):
        assert_close(out, a, b, name=name)


def test_many_rows_per_block(kernels):
    """More rows than blocks times warps, so that a warp takes several and the blocks' sums have two stages."""
    tensors = [normal(450, h, 16, dtype=torch.float32, seed=h) for h in (9, 2)]
    tensors += [normal(16, dtype=torch.float32, seed=s) for s in (3, 4)]
    grads = [normal(*t.shape, dtype=torch.float32, seed=7) for t in tensors[:2]]
    rest = tables(16, 450)
    outs = emulated(kernels, tensors, rest, grads)
    exact = reference.qk_norm_rope_bwd(*(g.double() for g in grads), *arguments(tensors, rest, {}, torch.Tensor.double))
    for out, a in zip(outs, exact, strict=True):
        torch.testing.assert_close(out.double(), a, rtol=1e-5, atol=1e-4)


def test_no_tokens_give_zero_weight_gradients(kernels):
    tensors = [torch.empty(0, h, 16) for h in (2, 1)] + [torch.ones(16), torch.ones(16)]
    outs = emulated(kernels, tensors, tables(16, 4), [t.clone() for t in tensors[:2]])
    assert outs[2].eq(0).all() and outs[3].eq(0).all()
    with tilefuse.backend("reference"):
        assert [t.shape for t in tilefuse.qk_norm_rope(*tensors, *tables(16, 4))] == [t.shape for t in outs[:2]]
