"""``mla_expand_kv``. Numbers in names: the family's list of known bugs."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.mla.common import normal
from tilefuse.testing.inputs.mla.mla_expand_kv import cases

KERNEL, BACKWARD = "mla_expand_kv_fwd", "mla_expand_kv_bwd"
CASES = [case[0] for case in cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(name, device="cpu", dtype=torch.float32):
    return next(c[1:] for c in cases(device, dtype) if c[0] == name)


def expand(latent, w_ukv, kv_lora_rank, nope_dim, v_dim):
    k, v = [], []
    for w in w_ukv.view(-1, nope_dim + v_dim, kv_lora_rank):
        up = latent[:, :kv_lora_rank] @ w.T
        k.append(torch.cat((up[:, :nope_dim], latent[:, kv_lora_rank:]), 1))
        v.append(up[:, nope_dim:])
    return torch.stack(k, 1), torch.stack(v, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype, grad_where, compare):
    args, options = case(name, grad_where, dtype)
    compare(tilefuse.mla_expand_kv, expand, args, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_matches_oracle(name, dtype, where, compare_forward):
    args, options = case(name, where, dtype)
    compare_forward(tilefuse.mla_expand_kv, expand, args, options, dtype)


def test_many_tokens(compare_forward):
    """On the CPU: several blocks of tokens, the last one not full, and so much output that it goes past the caches."""
    latent = normal(200, 576, device="cpu", dtype=torch.bfloat16, seed=1)
    w_ukv = normal(13 * 256, 512, device="cpu", dtype=torch.bfloat16, seed=2)
    options = {"kv_lora_rank": 512, "nope_dim": 128, "v_dim": 128}
    compare_forward(tilefuse.mla_expand_kv, expand, (latent, w_ukv), options, torch.bfloat16)


def test_gradcheck():
    (latent, w), options = case("odd_widths", dtype=torch.float64)
    leaves = (latent.clone().requires_grad_(), w.clone().requires_grad_())
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(lambda x, w: tilefuse.mla_expand_kv(x, w, **options), leaves, fast_mode=True)


def test_one_output_used(grad_where):
    (latent, w), options = case("odd_widths", grad_where)
    latent = latent.detach().requires_grad_()
    _, v = tilefuse.mla_expand_kv(latent, w, **options)
    v.sum().backward()
    expected = latent.detach().double().requires_grad_()
    expand(expected, w.double(), *options.values())[1].sum().backward()
    torch.testing.assert_close(latent.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


ERRORS = {
    "latent": ({"latent": torch.zeros(576)}, ValueError, r"latent must be \[T, R \+ r\]"),
    "dtype": ({"latent": torch.zeros(5, 576).int()}, TypeError, "latent must be float32 or"),
    "rank": ({"kv_lora_rank": 577}, ValueError, r"kv_lora_rank must be in \(0, 576\], got 577"),
    "nope": ({"nope_dim": -1}, ValueError, "nope_dim must be >= 0, got -1"),
    "v": ({"v_dim": 0}, ValueError, "v_dim must be > 0, got 0"),
    "rows": ({"w_ukv": torch.zeros(500, 512)}, ValueError, r"w_ukv must be \[H \* 256, 512\]"),
    "columns": ({"w_ukv": torch.zeros(512, 500)}, ValueError, r"w_ukv must be \[512, 512\]"),
    "w_dtype": ({"w_ukv": torch.zeros(512, 512).half()}, TypeError, "w_ukv must be of latent's dtype"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_expand_kv, torch.ops.tilefuse.mla_expand_kv], ids=["function", "op"])
def test_errors(name, call):
    edit, error, message = ERRORS[name]
    arguments = {"latent": torch.zeros(5, 576), "w_ukv": torch.zeros(512, 512)}
    with pytest.raises(error, match=f"^tilefuse.mla_expand_kv: {message}"):
        call(**arguments | {"kv_lora_rank": 512, "nope_dim": 128, "v_dim": 128} | edit)


def test_19_opcheck_and_compile():
    (latent, w), options = case("odd_widths")
    leaves = (latent.detach().requires_grad_(), w.detach().requires_grad_())
    torch.library.opcheck(torch.ops.tilefuse.mla_expand_kv_fwd.default, (latent, w, *options.values()))
    torch.library.opcheck(torch.ops.tilefuse.mla_expand_kv.default, leaves, options)

    def function(x, w):
        return sum(y.square().sum() for y in tilefuse.mla_expand_kv(x, w, **options))

    step = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(step(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves)):
        assert_bit_equal(a, b)
