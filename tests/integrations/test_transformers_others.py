"""What others change in a model, its classes or Hugging Face's registries, before or between two calls of ``patch``."""

import functools
import types

import pytest
import torch

from tilefuse.testing import assert_bit_equal

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

from tilefuse.integrations.transformers import patch, unpatch


@pytest.fixture(autouse=True)
def _auto_backend():
    import tilefuse

    tilefuse.backend("auto")


IDS = torch.randint(3, 97, (2, 18), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(IDS)
PADDING[0, :5] = 0


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=PADDING).logits[PADDING.bool()]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def halved(forward):
    """A forward whose result, or a router's weights, are half as large."""

    def other(*args, **kwargs):
        out = forward(*args, **kwargs)
        if not isinstance(out, tuple):
            return out / 2
        at = 1 if len(out) == 3 else 0
        return (*out[:at], out[at] / 2, *out[at + 1 :])

    return other


PARTS = ["model.layers.0.self_attn", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wraps"])
@pytest.mark.parametrize("path", PARTS)
def test_a_forward_of_an_instance_stays(tiny, path, wrapped):
    model = tiny("mixtral")
    stock = logits(model)
    module = model.get_submodule(path)
    before = module.forward
    module.forward = functools.wraps(before)(halved(before)) if wrapped else halved(before)
    expected = logits(model)
    assert (expected - stock).abs().max() > 1e-3
    report = patch(model)
    assert report[path].left == "someone replaced its forward" and not report[path].changed
    assert report[path.replace("0", "1")].changed
    close(logits(model), expected)
    unpatch(model)
    assert_bit_equal(logits(model), expected)


def test_a_forward_of_a_whole_model_stays(tiny):
    model = tiny("llama")
    forward = type(model.model).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state / 2
        return out

    model.model.forward = types.MethodType(scaled, model.model)
    expected = logits(model)
    patch(model)
    close(logits(model), expected)


@pytest.mark.parametrize("name", ["MixtralAttention", "MixtralTopKRouter", "MixtralExperts"])
def test_a_forward_of_a_class_counts_from_then_on(tiny, monkeypatch, name):
    first, second = tiny("mixtral"), tiny("mixtral")
    stock = logits(first)
    patch(first)
    cls = getattr(modeling_mixtral, name)
    monkeypatch.setattr(cls, "forward", halved(cls.forward))
    expected = logits(second)
    assert (expected - stock).abs().max() > 1e-3
    patch(second)
    close(logits(second), expected)


def test_experts_with_a_forward_of_their_own(tiny):
    class Halved(modeling_mixtral.MixtralExperts):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) / 2

    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Halved
    expected = logits(model)
    report = patch(model)
    assert report["model.layers.0.mlp.experts"].left == "Halved has a forward of its own"
    close(logits(model), expected)


def test_a_function_of_a_file_counts_from_then_on(tiny, monkeypatch):
    first, second = tiny("llama"), tiny("llama")
    stock = logits(first)
    patch(first)
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(2 * q, k, cos, sin))
    expected = logits(second)
    assert (expected - stock).abs().max() > 1e-3
    patch(second)
    close(logits(second), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_function_under_the_name_of_sdpa(tiny, monkeypatch, when):
    def attention(module, query, *args, **kwargs):
        return sdpa_attention_forward(module, 2 * query, *args, **kwargs)

    def mask(*args, **kwargs):
        found = sdpa_mask(*args, **kwargs)
        return None if found is None else found | torch.eye(found.shape[-1], dtype=torch.bool)

    model = tiny("llama")
    stock = logits(model)
    if when == "after":
        patch(model)
    for interface, function in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        with monkeypatch.context() as context:
            context.setitem(interface._global_mapping, "sdpa", function)
            if when == "before":
                patch(model)
            ours = logits(model)
            unpatch(model)
            expected = logits(model)
            close(ours, expected)
            if function is attention:
                assert (expected - stock).abs().max() > 1e-3
            patch(model)
        close(logits(model), stock)
