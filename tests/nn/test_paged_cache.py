import pytest
import torch

from tilefuse.nn import PagedKVCache, PagedLatentCache


def make(**kwargs):
    options = {"batch_size": 3, "max_length": 20, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "page_size": 4}
    return PagedLatentCache(**options | {"dtype": torch.float32} | kwargs)


def slots(cache):
    return cache._step.slots.tolist()


def test_pages_slots_and_lengths():
    cache = make(num_pages=7)
    cache.extend(5)
    assert cache.seq_lens.tolist() == [5, 5, 5] and cache.free_pages == 1
    table = cache.block_table.tolist()
    assert table[0][:2] == [0, 1] and table[2][2:] == [-1, -1, -1]
    for b, row in enumerate(slots(cache)):
        assert row == [table[b][p // 4] * 4 + p % 4 for p in range(5)]
    assert cache._step.positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    cache.extend(3, [3, 1, 0])
    assert cache.seq_lens.tolist() == [8, 6, 5] and cache.free_pages == 1
    assert slots(cache)[1][1:] == [-1, -1] and slots(cache)[2] == [-1, -1, -1]
    assert cache._step.ends.tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="PagedLatentCache: num_pages must be at least 8 for these tokens, got 7"):
        cache.extend(3, [1, 3, 0])
    # nothing changed
    assert cache.seq_lens.tolist() == [8, 6, 5] and cache._bounds == [8, 6, 5] and cache._prefix_bound == 5
    cache.extend(1, [1, 0, 0])
    assert cache.free_pages == 0
    assert slots(cache) == [[cache.block_table[0, 2].item() * 4], [-1], [-1]]
    used = [page for row in cache.block_table.tolist() for page in row if page >= 0]
    assert sorted(used) == list(range(7))


def test_reset_returns_pages():
    cache = make(num_pages=6)
    cache.extend(8)
    cache.reset([1])
    assert cache.free_pages == 2 and cache.seq_lens.tolist() == [8, 0, 8]
    assert cache.block_table[1].eq(-1).all()
    cache.extend(8, [0, 8, 0])
    assert cache.seq_lens.tolist() == [8, 8, 8] and cache.free_pages == 0
    cache.reset()
    assert cache.free_pages == 6 and not cache.seq_lens.any() and cache.block_table.eq(-1).all()
    with pytest.raises(ValueError, match=r"sequences must be in \[0, 3\), got 3"):
        cache.reset([3])


def test_lengths_on_the_device():
    """A tensor of lengths is not read by the host: the bounds grow as if all tokens were real."""
    cache = make()
    cache.extend(4, torch.tensor([4, 2, 9]))
    assert cache.seq_lens.tolist() == [4, 2, 4]
    cache.extend(2, torch.tensor([0, 2, 1], dtype=torch.int32))
    assert cache.seq_lens.tolist() == [4, 4, 5]
    assert cache._bounds == [6, 6, 6]
    assert cache._step.positions.tolist() == [[0, 0], [2, 3], [4, 0]]


def test_addresses_stay():
    """A captured decode step reads the same tensors at every step."""
    cache = make()
    cache.extend(5)
    cache.extend(1)
    before = [t.data_ptr() for t in (*vars(cache._step).values(), cache.block_table, cache.seq_lens)]
    cache.extend(1)
    assert before == [t.data_ptr() for t in (*vars(cache._step).values(), cache.block_table, cache.seq_lens)]
    # prefills of many lengths leave nothing behind
    cache = make(max_length=60)
    cache.extend(20)
    cache.extend(21)
    assert not cache._steps


def test_storage_and_repr():
    cache = make(kv_lora_rank=512, qk_rope_head_dim=64, layout="fp8", num_layers=2)
    assert cache.rows.shape == (2, 15, 4, 656) and cache.rows.dtype == torch.uint8
    assert "pages=0 of 15 used, num_layers=2, layout=fp8" in repr(cache)
    cache = PagedKVCache(2, 20, num_kv_heads=3, head_dim=8, v_head_dim=6, page_size=16, dtype=torch.float8_e4m3fn)
    assert cache.k.shape == (1, 4, 16, 3, 8) and cache.v.shape == (1, 4, 16, 3, 6)
    assert "heads=3, dtype=float8_e4m3fn" in repr(cache)
    meta = make(device="meta")
    meta.extend(3)
    assert meta.seq_lens.is_meta


@pytest.mark.parametrize(
    "kwargs,error,message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0"),
        ({"max_length": 0}, ValueError, "max_length must be an int >= 1, got 0"),
        ({"page_size": 0}, ValueError, "page_size must be an int >= 1, got 0"),
        ({"num_pages": 0}, ValueError, "num_pages must be an int >= 1, got 0"),
        ({"num_layers": 0}, ValueError, "num_layers must be an int >= 1, got 0"),
        ({"kv_lora_rank": 0}, ValueError, "kv_lora_rank must be an int >= 1, got 0"),
        ({"qk_rope_head_dim": 3}, ValueError, "qk_rope_head_dim must be even, got 3"),
        ({"layout": "fp4"}, ValueError, "layout must be one of bf16, fp8, got 'fp4'"),
        ({"layout": "fp8"}, ValueError, "kv_lora_rank must be a multiple of 128 for layout fp8, got 8"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
    ],
)
def test_latent_errors(kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.nn.PagedLatentCache: {message}"):
        make(**kwargs)


@pytest.mark.parametrize(
    "kwargs,error,message",
    [
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be an int >= 1, got 0"),
        ({"head_dim": 0}, ValueError, "head_dim must be an int >= 1, got 0"),
        ({"v_head_dim": 0}, ValueError, "v_head_dim must be an int >= 1, got 0"),
        ({"k_scale": 2.0}, ValueError, "k_scale must be positive, and 1 unless dtype is float8_e4m3fn, got 2.0"),
        ({"v_scale": 0.0, "dtype": torch.float8_e4m3fn}, ValueError, "v_scale must be positive"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be a floating dtype"),
    ],
)
def test_kv_errors(kwargs, error, message):
    with pytest.raises(error, match=f"tilefuse.nn.PagedKVCache: {message}"):
        PagedKVCache(**{"batch_size": 1, "max_length": 8, "num_kv_heads": 2, "head_dim": 4} | kwargs)


def test_extend_errors():
    cache = make()
    cases = [
        ((0,), ValueError, "tokens must be an int >= 1, got 0"),
        ((21,), ValueError, "max_length must be at least 21 for these tokens, got 20"),
        ((2, [1, 2]), ValueError, r"lengths must be 3 numbers in \[0, 2\]"),
        ((2, [1, 2, 3]), ValueError, r"lengths must be 3 numbers in \[0, 2\]"),
        ((2, [1, 2, -1]), ValueError, r"lengths must be 3 numbers in \[0, 2\]"),
        ((2, torch.ones(2, dtype=torch.int32)), ValueError, r"lengths must be \[3\] int32 or int64"),
        ((2, torch.ones(3)), TypeError, "lengths must be int32 or int64"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=f"tilefuse.nn.PagedLatentCache: {message}"):
            cache.extend(*args)
    cache.extend(20)
    # a full sequence may rest while padding stands for it
    cache.extend(1, [0, 0, 0])
    with pytest.raises(ValueError, match="max_length must be at least 21"):
        cache.extend(1, [0, 1, 0])
