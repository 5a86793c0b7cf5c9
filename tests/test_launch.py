"""What Triton's launchers share: scratch memory, and constants from a tile configuration."""

from dataclasses import dataclass

import pytest
import torch

from tilefuse.backends import triton_missing

if triton_missing():
    pytest.skip(triton_missing(), allow_module_level=True)

import triton
from tilefuse.triton_kernels.common.launch import constants, scratch


def allocator():
    from triton.runtime import _allocation

    return _allocation._allocator.get()


def test_another_librarys_allocator_comes_back():
    """Also after a launch that failed."""

    def theirs(size, alignment, stream):
        raise AssertionError

    before = allocator()
    triton.set_allocator(theirs)
    try:
        with scratch(torch.device("cuda", 0)):
            assert allocator() is not theirs
        assert allocator() is theirs
        with pytest.raises(ValueError, match="a launch"), scratch(torch.device("cuda", 0)):
            raise ValueError("a launch")
        assert allocator() is theirs
        with scratch(torch.device("cuda", 0), needed=False):
            assert allocator() is theirs
    finally:
        triton.set_allocator(before)


def test_constants_of_a_configuration():
    @dataclass(frozen=True)
    class Config:
        block_m: int
        num_warps: int

    assert constants(Config(64, 4)) == {"BLOCK_M": 64, "num_warps": 4}
