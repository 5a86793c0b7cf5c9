"""``mla_absorb_query`` and ``mla_expand_kv``. Numbers in names: the family's list of known bugs."""

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close, poisoned
from tilefuse.testing.inputs.mla import mla_absorb_query, mla_expand_kv
from tilefuse.testing.inputs.mla.common import normal, tables

KERNEL, BACKWARD = "mla_absorb_query_fwd", "mla_absorb_query_bwd"
ABSORB = [case[0] for case in mla_absorb_query.cases("cpu", torch.float32)]
EXPAND = [case[0] for case in mla_expand_kv.cases("cpu", torch.float32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(module, name, device="cpu", dtype=torch.float32):
    return next(c[1:] for c in module.cases(device, dtype) if c[0] == name)


def absorb(q, w_uk, cos, sin, positions, interleaved=True):
    nope, rope = w_uk.shape[1], q.shape[2] - w_uk.shape[1]
    rows = torch.arange(q.shape[0]) if positions is None else positions.long()
    rotated = [None] * rope
    for i in range(rope // 2):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + rope // 2)
        a, b = q[..., nope + one], q[..., nope + two]
        c, s = cos[rows, i].to(q.dtype)[:, None], sin[rows, i].to(q.dtype)[:, None]
        rotated[one], rotated[two] = a * c - b * s, b * c + a * s
    latent = torch.stack([q[:, h, :nope] @ w_uk[h] for h in range(q.shape[1])], 1)
    return torch.cat([latent, *(r.unsqueeze(-1) for r in rotated)], -1)


def expand(latent, w_ukv, kv_lora_rank, nope_dim, v_dim):
    k, v = [], []
    for w in w_ukv.view(-1, nope_dim + v_dim, kv_lora_rank):
        up = latent[:, :kv_lora_rank] @ w.T
        k.append(torch.cat((up[:, :nope_dim], latent[:, kv_lora_rank:]), 1))
        v.append(up[:, nope_dim:])
    return torch.stack(k, 1), torch.stack(v, 1)


def on_cpu(args, dtype):
    return tuple(a if a is None else a.cpu().to(dtype) if a.is_floating_point() else a.cpu() for a in args)


def compare(function, formula, args, options, dtype):
    """Outputs and the gradients of the first two arguments."""

    def run(f, args):
        leaves = [a.detach().requires_grad_() for a in args[:2]]
        out = f(*leaves, *args[2:], **options)
        out = out if isinstance(out, tuple) else (out,)
        grads = [normal(*o.shape, device="cpu", dtype=dtype, seed=i).to(o.device, o.dtype) for i, o in enumerate(out)]
        return [*out, *torch.autograd.grad(out, leaves, grads)]

    with poisoned():
        got = run(function, args)
    exact, naive = run(formula, on_cpu(args, torch.float64)), run(formula, on_cpu(args, dtype))
    for g, e, n in zip(got, exact, naive, strict=True):
        assert g.dtype == dtype and g.is_contiguous()
        # sums of k terms are rounded at the magnitude of their partial sums
        tiny = 2**-20 * float(e.detach().abs().max()) if dtype == torch.float32 and e.numel() else None
        assert_close(g.detach(), e.detach(), n.detach(), tiny=tiny)
    for g, a in zip(got, run(function, args)):
        assert_bit_equal(g.detach(), a.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ABSORB)
def test_absorb_matches_oracle(name, dtype, grad_where):
    args, options = case(mla_absorb_query, name, grad_where, dtype)
    compare(tilefuse.mla_absorb_query, absorb, args, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPAND)
def test_expand_matches_oracle(name, dtype, grad_where):
    args, options = case(mla_expand_kv, name, grad_where, dtype)
    compare(tilefuse.mla_expand_kv, expand, args, options, dtype)


def test_gradcheck():
    with tilefuse.backend("reference"):
        (q, w, *rest), options = case(mla_absorb_query, "odd_widths", dtype=torch.float64)
        leaves = (q.clone().requires_grad_(), w.clone().requires_grad_())
        assert torch.autograd.gradcheck(
            lambda q, w: tilefuse.mla_absorb_query(q, w, *rest, **options), leaves, fast_mode=True
        )
        (latent, w), options = case(mla_expand_kv, "odd_widths", dtype=torch.float64)
        leaves = (latent.clone().requires_grad_(), w.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda x, w: tilefuse.mla_expand_kv(x, w, **options), leaves, fast_mode=True)


def test_one_output_used(grad_where):
    (latent, w), options = case(mla_expand_kv, "odd_widths", grad_where)
    latent = latent.detach().requires_grad_()
    _, v = tilefuse.mla_expand_kv(latent, w, **options)
    v.sum().backward()
    expected = latent.detach().double().requires_grad_()
    expand(expected, w.double(), *options.values())[1].sum().backward()
    torch.testing.assert_close(latent.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


COS, SIN = tables(64, 8)
Q, W = torch.zeros(5, 3, 192), torch.zeros(3, 128, 512)
ABSORB_ERRORS = {
    "q": ({"q": Q[0]}, ValueError, r"q must be \[T, H, P \+ r\]"),
    "dtype": ({"q": Q.int()}, TypeError, "q must be float32 or"),
    "w_rank": ({"w_uk": W[0]}, ValueError, r"w_uk must be \[H, P, R\] with P <= 192"),
    "w_wide": ({"w_uk": torch.zeros(3, 200, 512)}, ValueError, r"w_uk must be \[H, P, R\] with P <= 192"),
    "w_heads": ({"w_uk": torch.zeros(2, 128, 512)}, ValueError, r"w_uk must be \[3, 128, 512\]"),
    "w_dtype": ({"w_uk": W.half()}, TypeError, "w_uk must be of q's dtype float32"),
    "odd": ({"w_uk": torch.zeros(3, 127, 512)}, ValueError, "q must be of an even RoPE width"),
    "cos": ({"cos": COS[:, :3]}, ValueError, r"cos must be \[P, 32\] float32"),
    "positions": ({"positions": torch.zeros(4).int()}, ValueError, r"positions must be \[5\]"),
}
EXPAND_ERRORS = {
    "latent": ({"latent": torch.zeros(576)}, ValueError, r"latent must be \[T, R \+ r\]"),
    "dtype": ({"latent": torch.zeros(5, 576).int()}, TypeError, "latent must be float32 or"),
    "rank": ({"kv_lora_rank": 577}, ValueError, r"kv_lora_rank must be in \(0, 576\], got 577"),
    "nope": ({"nope_dim": -1}, ValueError, "nope_dim must be >= 0, got -1"),
    "v": ({"v_dim": 0}, ValueError, "v_dim must be > 0, got 0"),
    "rows": ({"w_ukv": torch.zeros(500, 512)}, ValueError, r"w_ukv must be \[H \* 256, 512\]"),
    "columns": ({"w_ukv": torch.zeros(512, 500)}, ValueError, r"w_ukv must be \[512, 512\]"),
    "w_dtype": ({"w_ukv": torch.zeros(512, 512).half()}, TypeError, "w_ukv must be of latent's dtype"),
}


@pytest.mark.parametrize("name", ABSORB_ERRORS)
@pytest.mark.parametrize(
    "call", [tilefuse.mla_absorb_query, torch.ops.tilefuse.mla_absorb_query], ids=["function", "op"]
)
def test_errors_of_absorb(name, call):
    edit, error, message = ABSORB_ERRORS[name]
    with pytest.raises(error, match=f"^tilefuse.mla_absorb_query: {message}"):
        call(**{"q": Q, "w_uk": W, "cos": COS, "sin": SIN} | edit)


@pytest.mark.parametrize("name", EXPAND_ERRORS)
@pytest.mark.parametrize("call", [tilefuse.mla_expand_kv, torch.ops.tilefuse.mla_expand_kv], ids=["function", "op"])
def test_errors_of_expand(name, call):
    edit, error, message = EXPAND_ERRORS[name]
    arguments = {"latent": torch.zeros(5, 576), "w_ukv": torch.zeros(512, 512)}
    with pytest.raises(error, match=f"^tilefuse.mla_expand_kv: {message}"):
        call(**arguments | {"kv_lora_rank": 512, "nope_dim": 128, "v_dim": 128} | edit)


def test_position_outside_of_the_tables(where):
    (q, w, cos, sin, positions), _ = case(mla_absorb_query, "deepseek", where)
    positions[2] = 40
    if where == "cpu":
        with pytest.raises(ValueError, match=r"tilefuse.mla_absorb_query: positions must be in \[0, 40\), got 40"):
            tilefuse.mla_absorb_query(q, w, cos, sin, positions)
    else:
        out = tilefuse.mla_absorb_query(q, w, cos, sin, positions)
        assert_bit_equal(out, tilefuse.mla_absorb_query(q, w, cos, sin, positions.clamp(max=39)))


def test_19_opcheck_and_compile():
    (q, w, *rest), options = case(mla_absorb_query, "odd_widths")
    leaves = (q.detach().requires_grad_(), w.detach().requires_grad_())
    torch.library.opcheck(torch.ops.tilefuse.mla_absorb_query_fwd.default, (q, w, *rest, True))
    torch.library.opcheck(torch.ops.tilefuse.mla_absorb_query.default, (*leaves, *rest), options)
    (latent, u), keywords = case(mla_expand_kv, "odd_widths")
    more = (latent.detach().requires_grad_(), u.detach().requires_grad_())
    torch.library.opcheck(torch.ops.tilefuse.mla_expand_kv_fwd.default, (latent, u, *keywords.values()))
    torch.library.opcheck(torch.ops.tilefuse.mla_expand_kv.default, more, keywords)
    for function, inputs in (
        (lambda q, w: tilefuse.mla_absorb_query(q, w, *rest, **options).sum(), leaves),
        (lambda x, w: sum(y.square().sum() for y in tilefuse.mla_expand_kv(x, w, **keywords)), more),
    ):
        step = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(torch.autograd.grad(step(*inputs), inputs), torch.autograd.grad(function(*inputs), inputs)):
            assert_bit_equal(a, b)
