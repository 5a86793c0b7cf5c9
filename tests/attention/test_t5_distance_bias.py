"""``t5_distance_bias`` against Hugging Face's dense bias."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal

CONFIGS = [(True, 32, 128), (False, 32, 128), (True, 32, 20), (True, 64, 512), (False, 16, 100)]


def dense_of(bias, queries, keys):
    """[H, Sq, Sk] from the bias of each distance."""
    length = (bias.shape[1] + 1) // 2
    distance = torch.arange(queries)[:, None] - torch.arange(keys)[None, :]
    return bias[:, distance + length - 1]


@pytest.mark.parametrize(("bidirectional", "num_buckets", "max_distance"), CONFIGS)
@pytest.mark.parametrize(("queries", "keys"), [(400, 400), (3, 300), (1, 1)])
def test_is_hugging_faces_bias_and_gradient(bidirectional, num_buckets, max_distance, queries, keys):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        num_heads=3,
        is_decoder=not bidirectional,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True)
    weight = theirs.relative_attention_bias.weight
    torch.nn.init.normal_(weight)
    options = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    ours = dense_of(tilefuse.t5_distance_bias(weight, max(queries, keys), **options), queries, keys)
    expected = theirs.compute_bias(queries, keys)[0]
    assert_bit_equal(ours.detach(), expected.detach())
    upstream = torch.randn(expected.shape)
    for a, b in zip(torch.autograd.grad(ours, weight, upstream), torch.autograd.grad(expected, weight, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_bucket_but_the_unused_one_is_met(bidirectional):
    """Of the later keys' half, that of distance 0 has no distance."""
    weight = torch.arange(32.0)[:, None]
    bias = tilefuse.t5_distance_bias(weight, 4096, bidirectional=bidirectional)
    assert bias.shape == (1, 8191)
    assert {*bias.int().flatten().tolist()} == {*range(32)} - ({16} if bidirectional else set())


def test_a_longer_table_holds_the_shorter_one():
    weight = torch.randn(32, 4)
    assert_bit_equal(tilefuse.t5_distance_bias(weight, 100)[:, 60:139], tilefuse.t5_distance_bias(weight, 40))


W = torch.zeros(32, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((W[:16], 8), {}, ValueError, r"weight must be \[32, H\], got \[16, 4\] float32"),
        ((W[:, 0], 8), {}, ValueError, r"weight must be \[32, H\]"),
        ((W.int(), 8), {}, TypeError, "weight must be float32 or"),
        ((W, 0), {}, ValueError, "length must be at least 1, got 0"),
        ((W[:2], 8), {"num_buckets": 2}, ValueError, "num_buckets must be at least 4, got 2"),
        ((W, 8), {"max_distance": 8}, ValueError, "max_distance must be above 8, got 8"),
    ],
)
def test_errors(args, options, error, message):
    for call in (tilefuse.t5_distance_bias, torch.ops.tilefuse.t5_distance_bias):
        with pytest.raises(error, match=f"^tilefuse.t5_distance_bias: {message}"):
            call(*args, **options)
