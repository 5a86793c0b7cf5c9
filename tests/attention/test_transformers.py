"""The ops against Hugging Face's own attention code, on random tiny models."""

import pytest
import torch

import tilefuse
from tilefuse.testing.inputs.attention.window_attention import normal

transformers = pytest.importorskip("transformers")

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.cpu_library)]
NAME = "window_probe"


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with tilefuse.backend(request.param):
        yield request.param


def _window_probe(
    module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_
):
    window = tilefuse.window_from("hf", sliding_window) if sliding_window else (-1, 0)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = tilefuse.window_attention(q, k, v, s_aux, window=window, scale=scaling, softcap=softcap or 0.0)
    return out, None


def _no_mask(*args, **kwargs):
    return None


SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": None}


def _mistral():
    return transformers.MistralModel(transformers.MistralConfig(**SMALL, sliding_window=9))


def _gemma3():
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=layers, query_pre_attn_scalar=24)
    )


def _gemma2():
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**SMALL, sliding_window=8, layer_types=layers, attn_logit_softcapping=2.0)
    )


def _gpt_oss():
    layers = ["sliding_attention", "full_attention"]
    config = transformers.GptOssConfig(
        **SMALL, sliding_window=8, layer_types=layers, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssModel(config)


@pytest.mark.parametrize("build", [_mistral, _gemma3, _gemma2, _gpt_oss])
def test_causal_models(build):
    """Hidden states of a whole model, eager attention against window_attention, and the next step with a cache."""
    transformers.AttentionInterface.register(NAME, _window_probe)
    transformers.AttentionMaskInterface.register(NAME, _no_mask)
    torch.manual_seed(0)
    model = build().eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.randint(0, 50, (2, 41))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        whole = model(ids, use_cache=False).last_hidden_state
        model.set_attn_implementation(NAME)
        ours = model(ids, use_cache=False).last_hidden_state
        first = model(ids[:, :-3], use_cache=True)
        steps = [first.last_hidden_state]
        for t in range(38, 41):
            steps.append(model(ids[:, t : t + 1], past_key_values=first.past_key_values).last_hidden_state)
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_longformer(padded):
    """Self-attention of Longformer with global tokens and their projections; values and all gradients."""
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=64,
        num_attention_heads=4,
        attention_window=[8],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0).eval()
    length = 48
    hidden = normal(2, length, 64).requires_grad_()
    is_global, is_masked = (torch.zeros(2, length, dtype=torch.bool) for _ in range(2))
    is_global[0, [0, 17]] = True
    is_global[1, [5, 6, 30]] = True
    if padded:
        is_masked[0, 40:] = True
    floor = torch.finfo(torch.float32).min
    mask = torch.zeros(2, length).masked_fill(is_global, 10000.0).masked_fill(is_masked, floor)
    theirs = layer(
        hidden, attention_mask=mask, is_index_masked=is_masked, is_index_global_attn=is_global, is_global_attn=True
    )[0]

    def heads(linear):
        return linear(hidden).view(2, length, 4, 16)

    index = torch.tensor([[0, 17, -1], [5, 6, 30]])
    out, _ = tilefuse.global_attention(
        heads(layer.query),
        heads(layer.key),
        heads(layer.value),
        index,
        heads(layer.query_global),
        heads(layer.key_global),
        heads(layer.value_global),
        ~is_masked,
        window=tilefuse.window_from("longformer", 8),
    )
    ours = out.flatten(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = normal(*ours.shape, seed=3)
    leaves = [hidden, *layer.parameters()]
    grads = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (ours, theirs)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_bigbird(masked):
    """Block-sparse attention of BigBird in evaluation mode, where block 0 counts once more per random block."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdConfig, BigBirdModel

    torch.manual_seed(0)
    config = BigBirdConfig(
        hidden_size=64,
        num_attention_heads=4,
        block_size=16,
        num_random_blocks=3,
        attention_type="block_sparse",
        max_position_embeddings=512,
    )
    layer = BigBirdBlockSparseAttention(config, 0).eval()
    length = 16 * 12
    hidden = normal(2, length, 64)
    shown = torch.ones(2, length, dtype=torch.bool)
    if masked:
        shown[1, 150:] = False
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(shown.float(), 16)
    with torch.no_grad():
        theirs = layer(hidden, band, rows, columns, blocked, blocked)[0]
        q, k, v = (x(hidden).view(2, length, 4, 16) for x in (layer.query, layer.key, layer.value))
        pattern = tilefuse.block_pattern("bigbird", length, length, block_size=16, num_random=3, seed=None)
        out, _ = tilefuse.block_sparse_attention(q, k, v, pattern.row_offsets, pattern.col_index, shown, block_size=16)
    # padded queries: theirs are zeroed
    ours = out.flatten(2) * shown[..., None]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
