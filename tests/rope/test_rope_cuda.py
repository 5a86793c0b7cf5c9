"""The CUDA C++ kernels of ``rope`` and ``rope_qk``, run on the CPU by the emulation."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_close, canary, emulation
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.rope.rope import cases, in_place, normal, packed_qkv, tables

case = by_name(cases)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [case[0] for case in cases("cpu", torch.float32) if "last_dim" not in case[0]]


@pytest.fixture(scope="module")
def kernels():
    return emulation.load_or_skip("rope", "rope")


def rows(x):
    """Address, batch, sequence and head stride, heads; strides of dims of size 1 are 0, as the host passes them."""
    strides = [0 if size <= 1 else stride for size, stride in zip(x.shape, x.stride())]
    strides = [0, *strides] if x.ndim == 3 else strides
    return [x.data_ptr(), *strides[:3], x.shape[-2]]


def index(x):
    return [x.data_ptr(), int(x.dtype == torch.int64)]


def emulated(kernels, q, k, outs, cos, sin, positions=None, cu_seqlens=None, **options):
    """What csrc/rope/rope_host.h does, then the launch."""
    section = list(options.get("mrope_section", ()))
    tokens = q.shape[:-2].numel()
    if tokens == 0:
        return
    tensors = [rows(q), rows(outs[0])] + ([rows(k), rows(outs[1])] if k is not None else [])
    place = []
    if positions is not None:
        strides = list(positions.stride())
        axis = strides.pop(0) if section else 0
        place = [*index(positions), axis, *([0] if q.ndim == 3 else []), *strides]
    bounds = [] if cu_seqlens is None else [*index(cu_seqlens), cu_seqlens.shape[0]]
    kernels.run(
        DTYPES.index(q.dtype),
        tensors,
        [tokens, q.shape[-3], cos.shape[0], q.shape[-1], cos.shape[1], options.get("rotary_offset", 0)],
        [cos.data_ptr(), cos.stride(0)],
        [sin.data_ptr(), sin.stride(0)],
        place,
        bounds,
        options.get("interleaved", False),
        options.get("conjugate", False),
        outs[0] is not q,
        section,
        options.get("mrope_interleaved", False),
    )


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, kernels):
    # the three dtypes share all but the conversion, so they take turns
    dtype = DTYPES[CASES.index(name) % 3]
    q, k, rest, options = case(name, dtype=dtype)

    def run():
        outs = [canary(t.shape, dtype) for t in (q, k)]
        emulated(kernels, q, k, [o.tensor for o in outs], *rest, **options)
        for out in outs:
            out.check()
        changed = in_place(q), in_place(k)
        emulated(kernels, *changed, changed, *rest, **options)
        return [o.tensor for o in outs], changed

    outs, changed = emulation.in_every_order(kernels, run)
    with tilefuse.backend("reference"):
        exact = tilefuse.rope_qk(q.double(), k.double(), *rest, **options)
        cos, sin, *places = rest
        low = (t.to(dtype).float() for t in (cos, sin))
        naive = tilefuse.rope_qk(q, k, *low, *places, **options)
    for out, same, a, b in zip(outs, changed, exact, naive):
        assert_close(out, a, b, name=name)
        assert_close(same, a, b, name=name)


@pytest.mark.parametrize("positions", [[0, 64, 2**40], [-1, -(2**50), 63]], ids=str)
def test_8_positions_are_clamped(positions, kernels):
    x = normal(3, 2, 64, dtype=torch.float32)
    cos, sin = tables(64, 64)
    positions = torch.tensor(positions)
    out = canary(x.shape, x.dtype)
    emulated(kernels, x, None, [out.tensor], cos, sin, positions)
    out.check()
    with tilefuse.backend("reference"):
        expected = tilefuse.rope(x, cos, sin, positions.clamp(0, 63))
    torch.testing.assert_close(out.tensor, expected, rtol=0, atol=1e-6)


def test_8_hostile_boundaries_stay_in_the_table(kernels):
    x = normal(6, 2, 64, dtype=torch.float32)
    out = canary(x.shape, x.dtype)
    emulated(kernels, x, None, [out.tensor], *tables(64, 4), None, torch.tensor([5, -(2**31), 2**31 - 1, 1]).int())
    out.check()
    assert out.tensor.isfinite().all()


@pytest.mark.parametrize("dim, interleaved", [(64, False), (72, True)])
def test_2_heads_that_share_a_thread(dim, interleaved, kernels):
    """Enough tokens that a thread walks over several heads, with a last group that is not full."""
    q, k = packed_qkv(1300, 37, 3, dim, "cpu", torch.bfloat16)
    cos, sin = tables(dim, 1300)
    outs = [canary(t.shape, t.dtype) for t in (q, k)]
    emulated(kernels, q, k, [out.tensor for out in outs], cos, sin, interleaved=interleaved)
    with tilefuse.backend("reference"):
        expected = tilefuse.rope_qk(q, k, cos, sin, interleaved=interleaved)
    for out, e in zip(outs, expected):
        out.check()
        torch.testing.assert_close(out.tensor, e, rtol=0.008, atol=1e-6)
