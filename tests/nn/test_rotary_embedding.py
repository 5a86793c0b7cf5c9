import copy

import pytest
import torch

import tilefuse
from tilefuse.nn import RotaryEmbedding
from tilefuse.testing import assert_bit_equal

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 5000.0}


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_is_the_op(scaling, interleaved):
    rotary = RotaryEmbedding(16, 64, base=5000.0, scaling=scaling, interleaved=interleaved, rotary_offset=8)
    cos, sin = tilefuse.rope_tables(16, 64, base=5000.0, scaling=scaling)
    q, k = torch.randn(2, 9, 4, 24), torch.randn(2, 9, 2, 24)
    positions = torch.randint(0, 64, (2, 9))
    options = {"interleaved": interleaved, "rotary_offset": 8}
    for got, want in zip(rotary(q, k, positions), tilefuse.rope_qk(q, k, cos, sin, positions, **options)):
        assert_bit_equal(got, want)
    assert_bit_equal(rotary(q), tilefuse.rope(q, cos, sin, **options))
    bounds = torch.tensor([0, 4, 9])
    packed = rotary(q[0], cu_seqlens=bounds)
    assert_bit_equal(packed, tilefuse.rope(q[0], cos, sin, cu_seqlens=bounds, **options))


def test_against_hugging_face():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters=LLAMA3, max_position_embeddings=64
    )
    theirs = LlamaRotaryEmbedding(config)
    ours = RotaryEmbedding(16, 64, scaling=config.rope_parameters, angle_dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    cos, sin = theirs(q, torch.arange(9)[None])
    assert_bit_equal(ours.cos[:9], cos[0, :, :8])
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for got, expected in zip(ours(q, k), want):
        torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_tables_keep_their_dtype_and_survive_moves():
    rotary = torch.nn.Sequential(RotaryEmbedding(8, 16))
    want = rotary[0].cos.clone()
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
    ):
        rotary = change(rotary)
        assert_bit_equal(rotary[0].cos, want)
        assert rotary[0].sin.dtype == torch.float32
    assert RotaryEmbedding(8, 16, device="meta").cos.is_meta
    assert not rotary.state_dict()
    assert len(list(rotary.buffers())) == 2
    assert repr(rotary[0]) == "RotaryEmbedding(8, max_positions=16, base=10000.0)"
    assert "scaling=llama3, interleaved=True, rotary_offset=2" in repr(
        RotaryEmbedding(8, 16, scaling=LLAMA3, interleaved=True, rotary_offset=2)
    )


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"dim": 7}, "dim must be even and at least 2, got 7"),
        ({"dim": 0}, "dim must be even and at least 2, got 0"),
        ({"max_positions": 0}, "max_positions must be at least 1, got 0"),
        ({"rotary_offset": -1}, "rotary_offset must be at least 0, got -1"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=f"tilefuse.nn.RotaryEmbedding: {message}"):
        RotaryEmbedding(**{"dim": 8} | kwargs)
    with pytest.raises(ValueError, match=r"tilefuse.rope\w*: \w+ must be"):
        RotaryEmbedding(8, 4)(torch.randn(1, 5, 1, 8))
