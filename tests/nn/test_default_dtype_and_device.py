"""Modules built on the meta device, under another default dtype or device, run as those built plainly."""

import pytest
import torch

import tilefuse
from tilefuse.nn import (
    BlockSparseAttention,
    FP8Linear,
    GatedMLP,
    MoE,
    MultiheadLatentAttention,
    PagedKVCache,
    PagedLatentCache,
    QATLinear,
    RMSNorm,
    RotaryEmbedding,
    WindowAttention,
)
from tilefuse.testing import assert_bit_equal

LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
MODULES = {
    "window": lambda **factory: WindowAttention(48, 3, qk_norm=True, sinks=True, **factory),
    "latent": lambda **factory: MultiheadLatentAttention(48, 3, **LATENT, **factory),
    "blocks": lambda **factory: BlockSparseAttention(48, 3, block_size=4, num_random=1, **factory),
    "moe": lambda **factory: MoE(48, 24, 8, 2, correction_bias=True, num_shared_experts=1, **factory),
    "fp8": lambda **factory: FP8Linear(48, 48, **factory),
    "qat": lambda **factory: QATLinear(48, 48, group_size=16, **factory),
    "norm": lambda **factory: RMSNorm(48, **factory),
    "mlp": lambda **factory: GatedMLP(48, 40, **factory),
}


def cached(attn, x):
    """Prefill and decode."""
    sizes = {"page_size": 8, "dtype": x.dtype, "device": "cpu"}
    if isinstance(attn, WindowAttention):
        cache = PagedKVCache(2, 64, num_kv_heads=3, head_dim=16, **sizes)
    else:
        cache = PagedLatentCache(2, 64, kv_lora_rank=32, qk_rope_head_dim=8, **sizes)
    outs = []
    for part, lengths in zip(x.split((20, 2), 1), (None, [2, 0])):
        cache.extend(part.shape[1], lengths)
        outs.append(attn(part, cache=cache))
    return torch.cat(outs, 1)


@torch.no_grad()
def run(module, kind, x):
    return [module(x), cached(module, x)] if kind in ("window", "latent") else [module(x)]


@pytest.fixture
def x():
    return torch.randn(2, 22, 48, generator=torch.Generator().manual_seed(0), device="cpu")


def plain(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return MODULES[kind](dtype=dtype, device="cpu").train()


@pytest.mark.parametrize("kind", MODULES)
def test_assigned_into_the_meta_device(kind, x):
    """Tables and counters are in no state dict; all the same nothing is left behind."""
    module = MODULES[kind](device="meta")
    module.load_state_dict(plain(kind).state_dict(), assign=True)
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
    for got, want in zip(run(module.to("cpu"), kind, x), run(plain(kind), kind, x)):
        assert_bit_equal(got, want)


def test_shared_tables_left_on_the_meta_device(x):
    """Tables outside of the modules that use them are made at their first use."""
    rotary = RotaryEmbedding(16, 64, device="meta")
    attn = WindowAttention(48, 3, rotary_emb=rotary, device="cpu")
    attn.load_state_dict(plain("window").state_dict(), strict=False)
    want = WindowAttention(48, 3, device="cpu")
    want.load_state_dict(attn.state_dict())
    assert_bit_equal(attn(x), want(x))
    q = torch.randn(1, 5, 2, 16)
    assert_bit_equal(RotaryEmbedding(16, 64, device="meta")(q), RotaryEmbedding(16, 64)(q))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_default_dtype(kind, default, x):
    want = run(plain(kind, default), kind, x.to(default))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        module = MODULES[kind]()
        assert {p.dtype for p in module.parameters()} <= {default, torch.float8_e4m3fn, torch.float32}
        got = run(module, kind, x.to(default))
        module.to("cpu")
        got += run(module, kind, x.to(default))
    finally:
        torch.set_default_dtype(previous)
    for a, b in zip(got, want + want):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("kind", MODULES)
def test_inside_of_a_meta_device_context(kind, x):
    """A module and tensors on the CPU do not mind it."""
    module = plain(kind)
    with torch.device("meta"):
        got = run(module, kind, x)
        assert all(t.is_meta for t in MODULES[kind]().parameters())
    for a, b in zip(got, run(plain(kind), kind, x)):
        assert_bit_equal(a, b)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("window", {"window": (8, 0)}),
        ("longformer", {"window": (8, 8)}),
        ("bigbird", {"num_heads": 2, "num_random": 1}),
        ("bigbird", {"seed": None}),
        ("strided", {"stride": 2}),
        ("fixed", {"stride": 2}),
    ],
)
def test_block_pattern(kind, options):
    want = tilefuse.block_pattern(kind, 64, 64, block_size=8, **options)
    with torch.device("meta"):
        inside = tilefuse.block_pattern(kind, 64, 64, block_size=8, **options)
    assert_bit_equal(inside.row_offsets, want.row_offsets)
    assert_bit_equal(inside.col_index, want.col_index)
    meta = tilefuse.block_pattern(kind, 64, 64, block_size=8, device="meta", **options)
    assert meta.row_offsets.is_meta and meta.col_index.is_meta
    assert meta.row_offsets.shape == want.row_offsets.shape and meta.col_index.shape == want.col_index.shape


def test_block_pattern_of_a_mask_without_values():
    with pytest.raises(ValueError, match=r"tilefuse.block_pattern: mask must be with values, not on the meta device"):
        tilefuse.block_pattern("from_mask", 8, 8, block_size=4, mask=torch.ones(2, 2, dtype=torch.bool, device="meta"))
