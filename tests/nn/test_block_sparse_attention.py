import pytest
import torch

import tilefuse
from tilefuse.nn import BlockSparseAttention
from tilefuse.testing import assert_bit_equal


def make(**kwargs):
    return BlockSparseAttention(32, 2, **{"block_size": 8, "num_random": 2, "initializer_range": 0.2} | kwargs)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_bigbird(hf, dtype):
    """Hugging Face's block-sparse attention in evaluation mode, where its random blocks are all block 0."""
    import transformers
    from transformers.models.big_bird import modeling_big_bird as big_bird

    config = transformers.BigBirdConfig(
        hidden_size=32,
        num_attention_heads=2,
        block_size=8,
        num_random_blocks=2,
        attention_type="block_sparse",
        max_position_embeddings=128,
        use_bias=True,
    )
    theirs = big_bird.BigBirdBlockSparseAttention(config)
    ours = BlockSparseAttention.from_config(config, seed=None)
    assert ours.pattern(64).density < 0.9

    def run(module, x):
        masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, 64, dtype=x.dtype), 8)
        blocked, band, from_mask, to_mask = masks
        return module.eval()(x, band, from_mask, to_mask, blocked, blocked)[0]

    hf(ours, theirs, tokens(2, 64, 32), run, dtype=dtype)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("bigbird", {"num_random": 2, "seed": 3}),
        ("strided", {"stride": 2}),
        ("fixed", {"stride": 3, "summary": 1}),
        ("longformer", {"window": (8, 8), "global_blocks": (1,)}),
        ("window", {"window": (11, 0), "causal": True}),
    ],
)
def test_is_dense_attention_under_its_mask(kind, options):
    attn = BlockSparseAttention(32, 2, kind, block_size=8, output_projection=True, initializer_range=0.2, **options)
    x = tokens(2, 60, 32)
    key_mask = torch.ones(2, 60, dtype=torch.bool)
    key_mask[1, 50:] = False
    seen = attn.pattern(60).to_dense().repeat_interleave(8, -1).repeat_interleave(8, -2)[..., :60, :60]
    assert attn.pattern(60) is attn.pattern(60)
    seen = seen & key_mask[:, None, None]
    if attn.causal:
        seen = seen & torch.ones(60, 60, dtype=torch.bool).tril()
    q, k, v = (layer(x).view(2, 60, 2, 16).transpose(1, 2) for layer in (attn.query, attn.key, attn.value))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
    got = attn(x, key_mask)
    torch.testing.assert_close(got[key_mask], attn.dense(want)[key_mask], rtol=1e-5, atol=1e-5)
    parameters = list(attn.parameters())
    want = torch.autograd.grad(attn.dense(want)[key_mask].square().sum(), parameters)
    # the gradient of the key's bias is 0 but for rounding
    atol = 1e-5 * max(float(g.abs().max()) for g in want)
    for a, b in zip(torch.autograd.grad(got[key_mask].square().sum(), parameters), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def test_given_pattern_and_compile():
    attn, x = make(), tokens(2, 64, 32)
    mask = torch.eye(8, dtype=torch.bool)
    pattern = tilefuse.block_pattern("from_mask", 64, 64, block_size=8, mask=mask)
    out = attn(x, pattern=pattern)
    # every block sees itself only
    alone = attn(x[:, 8:16], pattern=tilefuse.block_pattern("from_mask", 8, 8, block_size=8, mask=mask[:1, :1]))
    torch.testing.assert_close(out[:, 8:16], alone, rtol=1e-5, atol=1e-6)
    want = attn(x)
    assert_bit_equal(torch.compile(attn, backend="aot_eager", fullgraph=True)(x).detach(), want.detach())


@pytest.mark.parametrize("output_projection", [False, True])
def test_initialisation(initialisation, output_projection):
    attn = initialisation(lambda **factory: make(output_projection=output_projection, **factory))
    assert attn.query.bias.eq(0).all() and ("dense.weight" in attn.state_dict()) == output_projection
    assert "kind=bigbird, block_size=8, causal=False, num_random=2" in repr(attn)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"hidden_size": 0}, "hidden_size must be an int >= 1, got 0"),
        ({"num_heads": 0}, "num_heads must be an int >= 1, got 0"),
        ({"num_heads": 3}, "num_heads must be a divisor of hidden_size 32, got 3"),
        ({"block_size": 0}, "block_size must be an int >= 1, got 0"),
        ({"kind": "dense"}, "kind must be one of bigbird, longformer"),
        ({"windows": 3}, r"pattern must be options among .*, got \['windows'\]"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=f"tilefuse.nn.BlockSparseAttention: {message}"):
        BlockSparseAttention(**{"hidden_size": 32, "num_heads": 2} | kwargs)


def test_forward_errors():
    attn, x = make(), tokens(2, 64, 32)
    with pytest.raises(ValueError, match=r"tilefuse.nn.BlockSparseAttention: x must be \[B, S, 32\], got \[64, 32\]"):
        attn(x[0])
    with pytest.raises(TypeError, match=r"tilefuse.nn.BlockSparseAttention: x must be float32"):
        attn(x.int())
    with pytest.raises(ValueError, match=r"pattern must be for 56 queries and keys, got \(64, 64\)"):
        attn(x[:, :56], pattern=attn.pattern(64))
    with pytest.raises(ValueError, match=r"tilefuse.block_pattern: window must be"):
        BlockSparseAttention(32, 2, "window")(x)

    class Unknown:
        model_type = "bert"

    with pytest.raises(ValueError, match="from_config: config must be of type big_bird, got 'bert'"):
        BlockSparseAttention.from_config(Unknown())
