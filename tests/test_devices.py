"""Tensors on another GPU than the current one."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tilefuse
from tilefuse.testing import assert_bit_equal, samples


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(tilefuse.ops()))
def test_the_second_of_two_gpus(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):
        sample = next(iter(samples(name, device)))
        with torch.cuda.device(0):
            out = getattr(tilefuse, name)(*sample.args, **sample.kwargs)
        results.append([t for t in tree_leaves((out, sample.args)) if isinstance(t, Tensor)])
    for a, b in zip(*results, strict=True):
        assert b.device == torch.device("cuda:1")
        assert_bit_equal(a.cpu(), b.cpu())
