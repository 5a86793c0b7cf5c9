"""``rope_tables`` against the formulas in float64 and against Hugging Face, bit for bit."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 64 for i in range(32)],
    "long_factor": [1.0 + i / 4 for i in range(32)],
    "original_max_position_embeddings": 4096,
}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> scaling dict, seq_len
RULES = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 3.0}, None),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, None),
    "dynamic_short": ({"rope_type": "dynamic", "factor": 2.0}, 100),
    "dynamic_long": ({"rope_type": "dynamic", "factor": 2.0}, 100_000),
    "yarn": (YARN, None),
    "yarn_deepseek": (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}, None),
    "yarn_mscales": (YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}, None),
    "yarn_one_mscale": (YARN | {"mscale": 0.707}, None),
    "yarn_attention_factor": (YARN | {"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.5}, None),
    "yarn_gpt_oss": (YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 150000.0}, None),
    "yarn_no_factor": (YARN | {"factor": None}, None),
    "yarn_below_one": (YARN | {"factor": 0.5}, None),
    "yarn_degenerate": (YARN | {"beta_fast": 4096.0, "beta_slow": 4096.0}, None),
    "longrope_init": (LONG, None),
    "longrope_short": (LONG, 4096),
    "longrope_long": (LONG, 4097),
    "longrope_factor": (LONG | {"factor": 4.0}, 5000),
    "longrope_attention_factor": (LONG | {"attention_factor": 1.19}, 5000),
    "llama3": (LLAMA3, None),
    "llama3_theta": (LLAMA3 | {"rope_theta": 500000.0}, None),
}


def hugging_face(scaling, seq_len, rows, head_dim=64, base=10000.0, partial=1.0):
    """cos and sin as a stock model builds them for its positions 0 .. rows - 1."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": base} | scaling | ({"partial_rotary_factor": partial} if partial != 1.0 else {})
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=rows,
        rope_parameters=parameters,
    )
    if scaling["rope_type"] == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)
    freqs = torch.arange(rows)[None, :, None].float() * inv_freq
    emb = torch.cat((freqs, freqs), -1)
    half = inv_freq.shape[0]
    return (emb.cos() * factor)[0, :, :half], (emb.sin() * factor)[0, :, :half]


@pytest.mark.parametrize("name", RULES)
def test_14_float32_angles_are_hugging_faces_bits(name):
    scaling, seq_len = RULES[name]
    rows = 8192
    expected = hugging_face(scaling, seq_len, rows)
    for out, bits in zip(
        tilefuse.rope_tables(64, rows, scaling=scaling, seq_len=seq_len, angle_dtype=torch.float32), expected
    ):
        assert out.dtype == torch.float32 and out.shape == (rows, 32)
        assert_bit_equal(out, bits)


@pytest.mark.parametrize("name", RULES)
def test_float64_angles_agree_at_low_positions(name):
    """The default tables are the same function, more exactly."""
    scaling, seq_len = RULES[name]
    # the rules that read max_position_embeddings get it as a key, the table may then be shorter
    scaling = scaling | {"max_position_embeddings": 8192}
    exact = tilefuse.rope_tables(64, 16, scaling=scaling, seq_len=seq_len)
    coarse = tilefuse.rope_tables(64, 16, scaling=scaling, seq_len=seq_len, angle_dtype=torch.float32)
    for a, b in zip(exact, coarse):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_14_proportional_is_hugging_faces():
    scaling = {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.25}
    expected = hugging_face(scaling, None, 128)
    out = tilefuse.rope_tables(64, 128, scaling=scaling, angle_dtype=torch.float32)
    assert_bit_equal(out[0], expected[0])
    assert_bit_equal(out[1], expected[1])
    assert (out[1][:, 8:] == 0).all()


def test_14_partial_rotary_factor_is_said_by_rotary_dim():
    scaling = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    expected = hugging_face(scaling, None, 128)
    out = tilefuse.rope_tables(32, 128, scaling=scaling, angle_dtype=torch.float32)
    assert_bit_equal(out[0], expected[0])


def test_float64_angles_are_exact_at_far_positions():
    rows = 131072
    cos, sin = tilefuse.rope_tables(128, rows, base=500000.0)
    angle = torch.arange(rows - 8, rows, dtype=torch.float64)[:, None] * (
        500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    )
    assert (cos[-8:].double() - angle.cos()).abs().max() < 4e-8
    assert (sin[-8:].double() - angle.sin()).abs().max() < 4e-8
    coarse, _ = tilefuse.rope_tables(128, rows, base=500000.0, angle_dtype=torch.float32)
    assert (coarse[-2048:] - cos[-2048:]).abs().max() > 1e-3


def test_attention_factor_is_in_both_tables():
    cos, sin = tilefuse.rope_tables(64, 32, scaling=YARN)
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, 0.1 * math.log(40) + 1))


def test_dict_wins_over_base_and_type_is_an_alias():
    a = tilefuse.rope_tables(64, 8, base=7.0, scaling={"rope_theta": 500.0})
    b = tilefuse.rope_tables(64, 8, base=500.0)
    assert_bit_equal(a[0], b[0])
    c = tilefuse.rope_tables(64, 8, scaling={"type": "linear", "factor": 2.0})
    d = tilefuse.rope_tables(64, 8, scaling={"rope_type": "linear", "factor": 2.0})
    assert_bit_equal(c[1], d[1])


def test_nested_dicts_of_hugging_face():
    """Gemma-3 has a dict of dicts; one of them is right, the whole is not theta 1e4."""
    transformers = pytest.importorskip("transformers")
    nested = transformers.Gemma3TextConfig().rope_parameters
    with pytest.raises(ValueError, match=r"a dict of dicts with the keys (full|sliding)_attention, "):
        tilefuse.rope_tables(64, 8, scaling=nested)
    with pytest.raises(ValueError, match="a dict of dicts"):
        tilefuse.nn.RotaryEmbedding(64, 8, scaling=nested)
    one = tilefuse.rope_tables(64, 8, scaling=nested["full_attention"])
    assert_bit_equal(one[0], tilefuse.rope_tables(64, 8, base=nested["full_attention"]["rope_theta"])[0])


def test_10_tables_do_not_inherit_dtype_or_grad():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, sin = tilefuse.rope_tables(64, 8, scaling=LLAMA3)
    finally:
        torch.set_default_dtype(before)
    expected = tilefuse.rope_tables(64, 8, scaling=LLAMA3)
    assert_bit_equal(cos, expected[0])
    assert sin.dtype == torch.float32 and not sin.requires_grad
    assert tilefuse.rope_tables(64, 8, device="meta")[0].device.type == "meta"
    assert tilefuse.rope_tables(64, 0)[0].shape == (0, 32)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"rotary_dim": 63}, ValueError, "rotary_dim must be even"),
        ({"rotary_dim": 0}, ValueError, "rotary_dim must be even"),
        ({"max_positions": -1}, ValueError, "max_positions must be at least 0"),
        (
            {"rotary_dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2.0}},
            ValueError,
            "rotary_dim must be at least 4",
        ),
        ({"angle_dtype": torch.bfloat16}, TypeError, "angle_dtype must be"),
        ({"scaling": {"rope_type": "stretch"}}, ValueError, "rope_type among .*got 'stretch'"),
        ({"scaling": {"rope_type": "linear"}}, ValueError, "scaling must be a dict with 'factor' for 'linear'"),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0}}, ValueError, "'original_max_position_embeddings'"),
        ({"scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, ValueError, "'low_freq_factor'"),
        ({"scaling": {k: v for k, v in LONG.items() if k != "long_factor"}}, ValueError, "'long_factor'"),
        (
            {"scaling": {"full_attention": LLAMA3, "sliding_attention": {"rope_type": "default"}}},
            ValueError,
            r"scaling must be one rule's dict, such as scaling\['full_attention'\], "
            "got 'a dict of dicts with the keys full_attention, sliding_attention'",
        ),
        ({"scaling": LLAMA3 | {"other": {}}}, ValueError, "a dict of dicts with the keys other"),
        (
            {"scaling": {"rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0}},
            ValueError,
            "scaling must be a dict with a rope_type for factor, low_freq_factor, got {'rope_theta'",
        ),
        ({"scaling": {"theta": 1e6}}, ValueError, "scaling must be a dict with a rope_type for theta"),
        ({"scaling": LONG | {"short_factor": [1.0]}}, ValueError, "factors of 32 values"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        tilefuse.rope_tables(**({"rotary_dim": 64, "max_positions": 8} | arguments))
