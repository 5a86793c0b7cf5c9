"""``mla_expand_kv``. Numbers in names: docs/known-bugs.md."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs import by_name
from tilefuse.testing.inputs.mla.common import normal, surrounded
from tilefuse.testing.inputs.mla.mla_expand_kv import cases

KERNEL, BACKWARD = "mla_expand_kv_fwd", "mla_expand_kv_bwd"
case = by_name(cases)
CASES = [case[0] for case in cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


BLOCKS = {
    # tokens, heads, P, V, R, r: several blocks of tokens and groups of columns, the last ones not full
    "even": (387, 3, 32, 48, 328, 8),
    "odd": (259, 2, 33, 5, 277, 3),
    "no_keys": (250, 2, 0, 16, 70, 4),
}


def backward_args(name, dtype):
    """Arguments of the backward kernel, views into NaN, none of them contiguous."""
    tokens, heads, nope, v_dim, rank, rope = BLOCKS[name]
    grad_k = normal(heads, tokens, nope + rope, device="cpu", dtype=dtype, seed=1)
    grad_v = normal(tokens, heads, v_dim, device="cpu", dtype=dtype, seed=2)
    latent = normal(tokens, rank + rope, device="cpu", dtype=dtype, seed=3)
    w_ukv = normal(heads * (nope + v_dim), rank, device="cpu", dtype=dtype, seed=4)
    grad_k = surrounded(grad_k, (0, 0, 1), (0, 0, 2)).transpose(0, 1)
    grad_v = surrounded(grad_v, (0, 1, 0), (0, 0, 3))
    latent, w_ukv = surrounded(latent, (0, 2), (0, 3)), surrounded(w_ukv, (0, 3), (0, 4))
    return grad_k, grad_v, latent, w_ukv, rank, nope, v_dim


def backward_formula(grad_k, grad_v, latent, w_ukv, *options):
    leaves = (latent.detach().requires_grad_(), w_ukv.detach().requires_grad_())
    return torch.autograd.grad(expand(*leaves, *options), leaves, (grad_k, grad_v))


@pytest.mark.cpu_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_cpu_backward(name, dtype, backward_kernel):
    args = backward_args(name, dtype)
    backward_kernel(torch.ops.tilefuse.mla_expand_kv_bwd, backward_formula, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_nan_in_its_row(dtype, grad_where):
    grad_k, grad_v, *rest = (a.to(grad_where) if torch.is_tensor(a) else a for a in backward_args("odd", dtype))
    (grad_k, grad_v, *_), rest[0] = (a[:5] for a in (grad_k, grad_v, rest[0])), rest[0][:5]
    clean = torch.ops.tilefuse.mla_expand_kv_bwd(grad_k, grad_v, *rest)
    grad_k = grad_k.clone()
    grad_k[3, 1, 7] = float("nan")
    latent, weight = torch.ops.tilefuse.mla_expand_kv_bwd(grad_k, grad_v, *rest)
    rank, nope, v_dim = rest[2:]
    assert latent[3, :rank].isnan().all() and not latent[3, rank:].isnan().any()
    assert_bit_equal(latent[[0, 1, 2, 4]], clean[0][[0, 1, 2, 4]])
    row = nope + v_dim + 7
    others = [i for i in range(weight.shape[0]) if i != row]
    assert weight[row].isnan().all()
    assert_bit_equal(weight[others], clean[1][others])


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
