"""Whether tensors share memory, against the set of all addresses."""

import itertools
import random

import pytest
import torch

import tilefuse
from tilefuse.overlap import _is_sum, check_in_place, overlap, overlaps_itself


def addresses(tensor):
    size = tensor.element_size()
    return [
        tensor.data_ptr() + size * sum(i * s for i, s in zip(index, tensor.stride()))
        for index in itertools.product(*map(range, tensor.shape))
    ]


def some_view(base, choose):
    dims = choose.randint(1, 4)
    shape = [choose.choice([0, 1, 2, 2, 3, 3, 4, 4, 4, 4]) for _ in range(dims)]
    strides = [choose.choice([0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 20, 27]) for _ in range(dims)]
    return base.as_strided(shape, strides, choose.randint(0, 60))


@pytest.mark.parametrize("seed", range(4))
def test_every_address(seed):
    choose, seen = random.Random(seed), set()
    for _ in range(500):
        base = torch.zeros(400, dtype=choose.choice([torch.float32, torch.float16, torch.uint8]))
        a = some_view(base, choose)
        b = some_view(choose.choice([base, base.view(torch.uint8)]), choose)
        own = addresses(a)
        assert overlaps_itself(a) == (len(set(own)) < len(own)), (a.shape, a.stride())
        bytes_a, bytes_b = ({p + i for p in addresses(t) for i in range(t.element_size())} for t in (a, b))
        shared = bool(bytes_a & bytes_b)
        assert overlap(a, b) == shared, (a.shape, a.stride(), a.storage_offset(), b.shape, b.stride())
        seen.add((overlaps_itself(a), shared))
    assert len(seen) == 4


def test_views_of_one_projection_are_apart():
    qkv = torch.zeros(4, 100, 3 * 8, 64)
    q, k, v = qkv.split(8, 2)
    check_in_place("test", q=q, k=k, v=v, heads_first=torch.zeros(8, 100, 4, 64).transpose(0, 2))
    with pytest.raises(ValueError, match=r"tilefuse.test: v must be a tensor that shares no memory with k, got \[4,"):
        check_in_place("test", q=q, k=k, v=qkv[:, :, 15:])
    # the same bytes as another dtype
    with pytest.raises(ValueError, match="b must be a tensor that shares no memory with a"):
        check_in_place("test", a=q, b=qkv.view(torch.uint8)[:, :, 7])


def test_a_search_without_end_counts_as_overlap():
    """Strides that nest in nothing, of many dims: refused, never slow."""
    generator = random.Random(0)
    strides = [generator.randint(10**6, 10**7) for _ in range(16)]
    assert _is_sum(sum(strides) * 7 + 1, *((s, 15) for s in strides))


def tables(positions=8):
    return tilefuse.rope_tables(64, positions)


@pytest.mark.parametrize("cause", ["same", "view", "heads"])
@pytest.mark.parametrize("op", ["function", "op"])
def test_rope_qk_of_one_tensor(cause, op):
    """It would rotate twice."""
    x = torch.randn(5, 4, 64)
    other = {"same": x, "view": x[:, :, :], "heads": x[:, 1:]}[cause]
    before = x.clone()
    call = tilefuse.rope_qk_ if op == "function" else torch.ops.tilefuse.rope_qk_
    with pytest.raises(ValueError, match=r"tilefuse.rope_qk_: k must be a tensor that shares no memory with q"):
        call(x, other, *tables())
    assert torch.equal(x, before)
    # neighbours are fine
    want = tilefuse.rope_qk(x[:, :3], x[:, 3:], *tables())
    call(x[:, :3], x[:, 3:], *tables())
    torch.testing.assert_close(x, torch.cat(want, 1), rtol=0, atol=0)


def test_compiled_rope_qk_of_one_tensor():
    def step(x):
        return tilefuse.rope_qk_(x, x, *tables())

    with pytest.raises(Exception, match="k must be a tensor that shares no memory with q"):
        torch.compile(step, backend="aot_eager")(torch.randn(5, 4, 64))


def test_rope_of_a_sliding_window():
    """Strides that are not 0, and rows that overlap all the same."""
    memory = torch.randn(5 * 64)
    before = memory.clone()
    with pytest.raises(
        ValueError, match=r"tilefuse.rope_: x must be a tensor without overlapping elements, got .strid"
    ):
        tilefuse.rope_(memory.as_strided((5, 2, 64), (32, 64, 1)), *tables())
    assert torch.equal(memory, before)


def test_caches_that_share_memory():
    q, k = torch.randn(5, 4, 64), torch.randn(5, 2, 64)
    index = torch.arange(5)
    memory = torch.zeros(4, 16, 3, 64)
    for v_cache in (memory[:, :, :2], memory[:, :, 1:]):
        with pytest.raises(
            ValueError, match=r"tilefuse.rope_append_kv: v_cache must be a tensor that shares no memory"
        ):
            tilefuse.rope_append_kv(q, k, k, *tables(), index, memory[:, :, :2], v_cache, index)
    with pytest.raises(ValueError, match=r"tilefuse.rope_append_kv: k_cache must be a tensor without overlapping"):
        pages = torch.zeros(1, 16, 2, 64).expand(4, -1, -1, -1)
        tilefuse.rope_append_kv(q, k, k, *tables(), index, pages, memory[:, :, :2], index)
    assert not memory.any()
    # keys and values of a head side by side
    both = torch.zeros(4, 16, 2, 128)
    tilefuse.rope_append_kv(q, k, k, *tables(), index, both[..., :64], both[..., 64:], index)
    assert torch.equal(both[0, :5, :, 64:], k)


def test_latent_pages_that_overlap():
    cache = torch.zeros(1, 4, 576).expand(2, -1, -1)
    arguments = (torch.zeros(5, 576), torch.ones(512), *tables(), torch.arange(5), cache, torch.arange(5))
    with pytest.raises(ValueError, match=r"tilefuse.mla_append_kv: cache must be a tensor without overlapping"):
        tilefuse.mla_append_kv(*arguments)
