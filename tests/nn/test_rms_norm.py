import pytest
import torch

import tilefuse
from tilefuse.nn import RMSNorm
from tilefuse.testing import assert_bit_equal


@pytest.mark.parametrize(
    "options", [{}, {"weight_offset": 1.0, "eps": 1e-5}, {"rounding": "llama"}], ids=["plain", "offset", "llama"]
)
def test_is_the_op(options):
    norm = RMSNorm(48, **options)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 5, 48).bfloat16(), torch.randn(2, 5, 48).bfloat16()
    assert_bit_equal(norm(x), tilefuse.rms_norm(x, norm.weight, **options))
    for got, want in zip(norm(x, residual), tilefuse.add_rms_norm(x, residual, norm.weight, **options)):
        assert_bit_equal(got, want)


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [("llama", "LlamaRMSNorm", {"rounding": "llama"}), ("gemma", "GemmaRMSNorm", {"weight_offset": 1.0})],
)
def test_against_hugging_face(module, name, options):
    pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    theirs, ours = getattr(modeling, name)(64, eps=1e-5), RMSNorm(64, 1e-5, **options)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 7, 64, requires_grad=True)
    for a, b in zip(
        torch.autograd.grad(ours(x).square().sum(), (x, ours.weight)),
        torch.autograd.grad(theirs(x).square().sum(), (x, theirs.weight)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_fresh_weight_changes_nothing(offset):
    x = torch.randn(3, 32)
    assert_bit_equal(RMSNorm(32, weight_offset=offset)(x), tilefuse.rms_norm(x))


def test_errors():
    with pytest.raises(ValueError, match=r"nn\.RMSNorm: hidden_size must be an int >= 1, got 0"):
        RMSNorm(0)
    with pytest.raises(ValueError, match=r"nn\.RMSNorm: rounding must be 'once' or 'llama', got 'twice'"):
        RMSNorm(8, rounding="twice")
