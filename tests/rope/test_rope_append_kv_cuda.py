"""The CUDA C++ kernel of ``rope_append_kv``, run on the CPU by the emulation."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, canary, emulation
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.rope.rope_append_kv import cases

E4M3 = torch.float8_e4m3fn
case = by_name(cases)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, E4M3: 3}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, E4M3),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, E4M3),
]
CASES = [case[0] for case in cases("cpu", torch.float32, torch.bfloat16)]


@pytest.fixture(scope="module")
def kernels():
    return emulation.load_or_skip("rope", "rope_append_kv")


def rows(x):
    """Address, three strides, heads; strides of dims of size 1 are 0, as the host passes them."""
    strides = [0 if size <= 1 else stride for size, stride in zip(x.shape, x.stride())]
    strides = [0, *strides] if x.ndim == 3 else strides
    return [x.data_ptr(), *strides[:3], x.shape[-2]]


def emulated(kernels, out, q, k, v, cos, sin, positions, k_cache, v_cache, slots, **options):
    """What csrc/rope/rope_append_kv.cu does, then the launch."""
    index = [
        [t.data_ptr(), int(t.dtype == torch.int64), *([0] if t.ndim == 1 else []), *t.stride()]
        for t in (positions, slots)
    ]
    kernels.run(
        CODES[q.dtype],
        CODES[k_cache.dtype],
        rows(q),
        rows(out),
        rows(k),
        rows(v),
        [rows(k_cache), rows(v_cache)],
        [
            q.shape[:-2].numel(),
            q.shape[-3],
            cos.shape[0],
            q.shape[-1],
            cos.shape[1],
            options.get("rotary_offset", 0),
            v.shape[-1],
            k_cache.shape[:2].numel(),
            k_cache.shape[1],
        ],
        [cos.data_ptr(), cos.stride(0)],
        [sin.data_ptr(), sin.stride(0)],
        *index,
        options.get("interleaved", False),
        options.get("k_scale", 1.0),
        options.get("v_scale", 1.0),
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "_".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("name", [c for c in CASES if c != "no_tokens"])
def test_equals_reference(name, dtypes, kernels):
    """Bit for bit: the emulation contracts no products."""
    args, options = case(name, "cpu", *dtypes)

    def run():
        out = canary(args[0].shape, args[0].dtype)
        fresh = case(name, "cpu", *dtypes)[0]
        emulated(kernels, out.tensor, *fresh, **options)
        out.check()
        return [out.tensor, *(c.view(torch.uint8) if c.dtype == E4M3 else c for c in fresh[6:8])]

    result = emulation.in_every_order(kernels, run)
    with tilefuse.backend("reference"):
        expected = tilefuse.rope_append_kv(*args, **options)
    assert_bit_equal(result[0], expected)
    for got, cache in zip(result[1:], args[6:8]):
        assert_bit_equal(got.view(cache.dtype) if cache.dtype == E4M3 else got, cache)


@pytest.mark.parametrize("slot", [64, 2**31 - 1, -1])
def test_8_slots_outside_of_the_cache_are_skipped(slot, kernels):
    args, options = case("plain", "cpu", *DTYPES[2])
    args[8].fill_(slot)
    caches = [canary(c.shape, c.dtype) for c in args[6:8]]
    before = [c.tensor.clone() for c in caches]
    out = torch.empty_like(args[0])
    emulated(kernels, out, *args[:6], caches[0].tensor, caches[1].tensor, args[8], **options)
    for c, b in zip(caches, before):
        c.check()
        assert_bit_equal(c.tensor, b)
    with tilefuse.backend("reference"):
        assert_bit_equal(out, tilefuse.rope(args[0], *args[3:6]))
