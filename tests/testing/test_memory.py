"""Poisoned memory and canaries show what a kernel left out or wrote beside."""

import pytest
import torch

from tilefuse.testing import canary, poisoned, samples
from tilefuse.testing.memory import GUARD_BYTES

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def allocations(dtype):
    like = torch.zeros(4, 8, dtype=dtype)
    yield torch.empty(4, 8, dtype=dtype)
    yield torch.empty_like(like)
    yield like.new_empty(4, 8)
    yield torch.empty_strided((4, 8), (1, 4), dtype=dtype)
    yield torch.empty(0, dtype=dtype).resize_(4, 8)
    # what C++ on the stable ABI calls
    yield torch.ops.aten.new_empty(like, (4, 8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_nan(dtype):
    with poisoned():
        for x in allocations(dtype):
            assert x.float().isnan().all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_the_largest(dtype):
    with poisoned():
        for x in allocations(dtype):
            assert (x == torch.iinfo(dtype).max).all()


def test_settings_are_restored():
    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = state()
    with pytest.raises(KeyError), poisoned():
        assert state()[0] and state()[2]
        raise KeyError
    assert state() == before
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with poisoned():
            assert state() == (True, False, True)
        assert state() == (True, False, False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), ()])
def test_canary(dtype, shape):
    guarded = canary(shape, dtype)
    x = guarded.tensor
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
    assert x.data_ptr() % GUARD_BYTES == 0
    if dtype.is_floating_point:
        assert x.float().isnan().all()
    x.zero_()
    guarded.check()


@pytest.mark.parametrize("offset, where", [(-1, "from byte -1 to byte -1"), (60, "from byte 60 to byte 60")])
def test_a_write_beside_the_tensor_is_found(offset, where):
    guarded = canary((3, 5), torch.float32)
    guarded.memory[GUARD_BYTES + offset] += 1
    with pytest.raises(AssertionError, match=f"1 guard bytes were overwritten, {where}"):
        guarded.check()


def test_samples_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"tilefuse.testing.samples: op_name must be one of"):
        list(samples("no_such_op"))
