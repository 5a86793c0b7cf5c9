import pytest
import torch

import tilefuse
from tilefuse.nn import GatedMLP
from tilefuse.testing import assert_bit_equal


@pytest.mark.parametrize(
    ("act", "activation"), [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")]
)
@pytest.mark.parametrize("bias", [False, True])
def test_against_hugging_face(act, activation, bias):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=72, hidden_act=act, mlp_bias=bias)
    theirs, ours = LlamaMLP(config), GatedMLP(32, 72, activation=activation, bias=bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 5, 32, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours(x).sum(), (x, *ours.parameters())),
        torch.autograd.grad(theirs(x).sum(), (x, *theirs.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_options_reach_the_op():
    mlp = GatedMLP(16, 24, activation="swiglu_oai", alpha=1.5, limit=0.01)
    x = torch.randn(3, 16)
    hidden = tilefuse.gated_activation(mlp.gate_proj(x), mlp.up_proj(x), activation="swiglu_oai", alpha=1.5, limit=0.01)
    assert_bit_equal(mlp(x), mlp.down_proj(hidden))


def test_submodules_are_called():
    mlp = GatedMLP(16, 24)
    called = []
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        layer.register_forward_hook(lambda *_: called.append(1))
    mlp(torch.randn(3, 16))
    assert len(called) == 3


def test_the_same_seed_draws_the_same_weights():
    one, other = GatedMLP(16, 24, bias=True), GatedMLP(16, 24, bias=True)
    for mlp in (one, other):
        mlp.reset_parameters(torch.Generator().manual_seed(5))
    for a, b in zip(one.parameters(), other.parameters()):
        assert_bit_equal(a, b)
    assert one.gate_proj.weight.std() > 0.01 and not one.down_proj.bias.any()


def test_errors():
    with pytest.raises(ValueError, match=r"nn\.GatedMLP: intermediate_size must be an int >= 1, got 0"):
        GatedMLP(8, 0)
    with pytest.raises(ValueError, match=r"nn\.GatedMLP: activation must be 'silu' or .*, got 'swish'"):
        GatedMLP(8, 8, activation="swish")
