"""Models that were once wrong under ``patch``, each with the call that showed it."""

import importlib

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

import transformers
from transformers import masking_utils

from tilefuse.integrations.transformers import mask, patch, rope, verified
from tilefuse.testing import assert_bit_equal

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
INDEXED = {
    "num_key_value_heads": 4,
    "head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_topk": 8,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
HALVES = ["sliding_attention", "full_attention"]


@pytest.fixture(autouse=True)
def _everything_is_verified(monkeypatch):
    import tilefuse

    tilefuse.backend("auto")
    monkeypatch.setattr(verified, "why_not", lambda *configs: "")


def build(model, config, **changes):
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    made = getattr(transformers, model)(getattr(transformers, config)(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def tokens(seed=0, batch=2, length=24):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, count=5):
    seen = torch.ones_like(ids)
    seen[0, :count] = 0
    return seen


def compare(model, *runs, tolerance=1e-4):
    """Each run on stock and on the patched model; returns the report, and what attention ran on."""
    with torch.no_grad():
        expected = [run(model) for run in runs]
        report = patch(model)
        for run, stock in zip(runs, expected):
            torch.testing.assert_close(run(model), stock, rtol=tolerance, atol=tolerance)
    return report, {what for counts in report.calls().values() for what in counts}


def logits(ids, seen=None, **more):
    """The first output of a model; of tokens, where they are real."""

    def run(model):
        out = model(ids, attention_mask=seen, **more)[0]
        return out if seen is None or out.shape[:2] != seen.shape else out[seen.bool()]

    return run


def generated(ids, seen=None, **more):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | more
    return lambda model: model.generate(ids, attention_mask=torch.ones_like(ids) if seen is None else seen, **settings)


@pytest.mark.parametrize(
    "model, config",
    [("DeepseekV32ForCausalLM", "DeepseekV32Config"), ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig")],
)
def test_sparse_attention_stays_sparse(model, config):
    made = build(model, config, **INDEXED)
    ids = tokens(length=16)
    static = {"cache_implementation": "static", "disable_compile": True}
    report, ran = compare(made, logits(ids), logits(ids, padded(ids)), generated(ids), generated(ids, **static))
    assert "its keys are chosen by an indexer" in report["model.layers.0.self_attn"].left and not ran


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_a_tensor_that_is_asked_for(name):
    """One query, or no padding: Hugging Face gives None there only where its caller can use it."""
    config = transformers.LlamaConfig(**SMALL, attn_implementation="sdpa")
    function = getattr(masking_utils, f"create_{name}_mask")
    for length in (1, 7):
        arguments = {"config": config, "inputs_embeds": torch.zeros(2, length, 64), "attention_mask": None}
        arguments |= {"past_key_values": None} if name == "causal" else {}
        skip = "allow_is_causal_skip" if name == "causal" else "allow_is_bidirectional_skip"
        for allowed in (True, False):
            found, stock = (each(**arguments, **{skip: allowed}) for each in (mask.MAKERS[function], function))
            assert (found is None) == (stock is None) == allowed
            if stock is not None:
                assert_bit_equal(torch.cat((found, found), -1), torch.cat((stock, stock), -1))


def test_eager_encoders_see_both_sides():
    """Splinter's modules say nothing about causality, and to its eager function no mask means everything."""
    made = build("SplinterModel", "SplinterConfig")
    ids = tokens()
    _, ran = compare(made, logits(ids), logits(ids, padded(ids).flip(1)))
    assert ran == {"window_attention"}


def test_eager_decoders_do_not_see_the_future():
    made = build(
        "BigBirdPegasusForCausalLM",
        "BigBirdPegasusConfig",
        d_model=64,
        decoder_layers=2,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
    )
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] = 5
    _, ran = compare(made, logits(ids), generated(ids, padded(ids)))
    assert "window_attention" in ran
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits[:, :-1], made(changed).logits[:, :-1], rtol=1e-5, atol=1e-5)


def test_masks_that_a_model_puts_together():
    """Gemma 4 takes rows of the mask for the layers that share their keys."""
    made = build(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        num_hidden_layers=4,
        layer_types=HALVES * 2,
        num_kv_shared_layers=2,
        global_head_dim=16,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
    )
    ids = tokens()
    _, ran = compare(
        made, logits(ids), logits(ids, logits_to_keep=3), logits(ids, padded(ids)), generated(ids, padded(ids))
    )
    assert "window_attention" in ran and "paged_attention" in ran


def test_text_with_an_image():
    """GIT concatenates a mask for the image's tokens; its vision tower and its text have one config."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    made = build("GitForCausalLM", "GitConfig", vision_config=vision)
    ids = tokens(length=9)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    compare(made, logits(ids), logits(ids, pixel_values=pixels), logits(ids, padded(ids), pixel_values=pixels))


def test_generation_past_a_chunk():
    made = build(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=8,
        no_rope_layers=[1, 0],
    )
    ids = tokens(length=11)
    positions = torch.tensor([[*range(5), *range(6)]] * 2)
    _, ran = compare(
        made,
        logits(ids),
        logits(ids, padded(ids)),
        logits(ids, position_ids=positions),
        generated(ids, max_new_tokens=16),
        generated(ids, padded(ids), max_new_tokens=16),
    )
    assert {"window_attention", "paged_attention"} <= ran


def test_windows_in_both_directions_reach_the_op():
    made = build(
        "ModernBertModel",
        "ModernBertConfig",
        local_attention=8,
        global_attn_every_n_layers=2,
        num_hidden_layers=3,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = tokens(length=40)
    report, ran = compare(made, logits(ids), logits(ids, padded(ids, 15)), logits(ids, padded(ids, 15).flip(1)))
    assert ran == {"window_attention"}
    assert all(counts == {"window_attention": 3} for counts in report.calls().values()) and len(report.calls()) == 3


def test_right_padded_windows_reach_the_op():
    made = build("MistralForCausalLM", "MistralConfig", sliding_window=6)
    ids = tokens()
    right = padded(ids, 11).flip(1)
    # every row: Hugging Face's numbers at the padding too
    _, ran = compare(made, lambda model: model(ids, attention_mask=right).logits)
    assert ran == {"window_attention"}
    compare(made, generated(ids, right))


def test_a_static_cache_that_the_mask_is_made_for():
    made = build("DogeForCausalLM", "DogeConfig", keep_window_size=64)
    ids = tokens()
    compare(made, logits(ids), generated(ids, padded(ids), cache_implementation="static", disable_compile=True))


@pytest.mark.parametrize(
    "model, rotary, config, same",
    [
        ("hunyuan_vl", "HunYuanVLRotaryEmbedding", "HunYuanVLTextConfig", False),
        ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", "Qwen3VLTextConfig", True),
    ],
)
def test_tables_whose_halves_differ(model, rotary, config, same):
    """HunYuan-VL cuts its sections of axes across the halves, and the op takes one half for both."""
    file = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    made = getattr(file, rotary)(getattr(transformers, config)(**SMALL | {"rope_parameters": parameters}))
    assert rope.files_of_other_tables(torch.nn.Sequential(made)) == (set() if same else {file.__name__})


def by_token(*tensors):
    return (x.transpose(1, 2) for x in tensors)


@pytest.mark.parametrize(
    "model, name, call",
    [
        # the query alone, as indexers rotate it
        ("qwen4_exp", "apply_rotary_pos_emb", lambda f, q, k, cos, sin: f(q, cos=cos, sin=sin)),
        ("mistral_large4", "apply_rotary_pos_emb_interleave", lambda f, q, k, cos, sin: f(q, None, cos, sin)[0]),
        # heads behind tokens
        ("llama", "apply_rotary_pos_emb", lambda f, q, k, cos, sin: f(*by_token(q, k), cos, sin, unsqueeze_dim=2)[1]),
    ],
)
def test_rotary_calls_that_say_more_stay_theirs(model, name, call):
    stock = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    angle = torch.randn(2, 3, 4).repeat(1, 1, 2)
    expected, got = (call(f, q, k, angle.cos(), angle.sin()) for f in (stock, rope.counterpart(stock, name)))
    assert_bit_equal(got, expected)
