"""Router losses and bias update. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.inputs.moe.moe_plan import ids_of

KINDS = ("switch", "gshard", "sequence", "device", "communication")


def balanced(tokens, experts, top_k):
    """Equal logits and round-robin choices."""
    ids = (torch.arange(tokens)[:, None] * top_k + torch.arange(top_k)) % experts
    return torch.zeros(tokens, experts), ids


@pytest.mark.parametrize("kind", KINDS)
def test_19_perfect_balance_is_one(kind):
    logits, ids = balanced(16, 8, 2)
    loss = tilefuse.moe_balance_loss(logits, ids, kind=kind, sequence_length=4, n_devices=4)
    # a token's two choices lie on one device, of the two that it could reach
    expected = {"communication": 0.5, "gshard": 1.0}.get(kind, 1.0)
    torch.testing.assert_close(loss, torch.tensor(expected))
    scaled = tilefuse.moe_balance_loss(logits, ids, kind=kind, sequence_length=4, n_devices=4, normalization="topk")
    torch.testing.assert_close(scaled, 2 * loss)


def by_hand(logits, ids, kind, score, n_devices, sequence_length):
    tokens, experts = logits.shape
    top_k = ids.shape[1]
    x = logits.double()
    s = x.softmax(-1) if score == "softmax" else x.sigmoid()
    if kind == "sequence":
        parts = range(0, tokens, sequence_length)
        total = 0.0
        for start in parts:
            here = slice(start, start + sequence_length)
            p = (s[here] / s[here].sum(-1, keepdim=True)).mean(0)
            f = torch.tensor([(ids[here] == i).sum() for i in range(experts)]) * experts / (top_k * sequence_length)
            total += (f * p).sum().item() / len(parts)
        return total
    p = s.mean(0)
    if kind == "gshard":
        f = torch.tensor([(ids[:, 0] == i).sum() for i in range(experts)]) * experts / tokens
        return (f * p).sum().item()
    f = torch.tensor([(ids == i).sum() for i in range(experts)]) * experts / (top_k * tokens)
    if kind == "switch":
        return (f * p).sum().item()
    size, total = experts // n_devices, 0.0
    for d in range(n_devices):
        members = range(d * size, (d + 1) * size)
        share = sum(p[i].item() for i in members)
        if kind == "device":
            total += share * sum(f[i].item() for i in members) / size
        else:
            sent = sum(any(int(e) in members for e in row) for row in ids)
            total += share * sent * n_devices / (min(top_k, n_devices) * tokens)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_19_is_the_formula(kind, score):
    logits, ids = torch.randn(24, 12), ids_of(24, 3, 12, dropped=0.2)
    options = dict(kind=kind, score=score, n_devices=4, sequence_length=6)
    loss = tilefuse.moe_balance_loss(logits, ids, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert math.isclose(loss.item(), by_hand(logits, ids, **options), rel_tol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_11_19_excluded_rows_never_matter(kind):
    logits, ids = torch.randn(24, 12), ids_of(24, 3, 12)
    valid = torch.arange(24) % 3 != 1
    valid[6:12] = False
    dirty, dirty_ids = logits.clone(), ids.clone()
    dirty[~valid] = math.nan
    dirty_ids[~valid] = 0
    options = dict(kind=kind, n_devices=4, sequence_length=6)
    losses = []
    for x, i in ((logits, ids), (dirty, dirty_ids)):
        x.requires_grad_()
        loss = tilefuse.moe_balance_loss(x, i, valid, **options) + tilefuse.moe_z_loss(x, valid)
        (grad,) = torch.autograd.grad(loss, x)
        assert not grad[~valid].any()
        losses.append((loss.detach(), grad))
    for a, b in zip(*losses):
        assert_bit_equal(a, b)
    if kind != "sequence":
        kept = tilefuse.moe_balance_loss(logits[valid], ids[valid], **(options | {"sequence_length": 0}))
        torch.testing.assert_close(tilefuse.moe_balance_loss(logits, ids, valid, **options), kept)
    torch.testing.assert_close(tilefuse.moe_z_loss(logits, valid), tilefuse.moe_z_loss(logits[valid]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_18_gradcheck(kind, score):
    logits, ids = torch.randn(12, 6, dtype=torch.float64, requires_grad=True), ids_of(12, 2, 6)
    valid = torch.arange(12) != 5
    assert torch.autograd.gradcheck(
        lambda x: tilefuse.moe_balance_loss(x, ids, valid, kind=kind, score=score, n_devices=3, sequence_length=4),
        (logits,),
    )
    assert torch.autograd.gradcheck(lambda x: tilefuse.moe_z_loss(x, valid), (logits,))


@pytest.fixture(params=["reference", pytest.param("cpu", marks=pytest.mark.cpu_library)])
def backend(request):
    tilefuse.backend(request.param)
    return request.param


SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")


def formula(logits, ids, valid, kind, score, n_devices, sequence_length):
    """The losses of the docstring with autograd, in the logits' precision: the kernels do not run in a transform."""
    return torch.func.vjp(
        lambda x: tilefuse.moe_balance_loss(
            x, ids, valid, kind=kind, score=score, n_devices=n_devices, sequence_length=sequence_length
        ),
        logits,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balance_loss_and_gradient_on_every_backend(backend, kind, score, dtype):
    """Against float64: three blocks of rows, the last short, experts that fill no vector, a strided row, padding."""
    tokens, experts = 300, 20
    logits = torch.rand(tokens, 2 * experts).to(dtype)[:, :experts] + 0.1
    ids, valid = ids_of(tokens, 3, experts, dropped=0.2), torch.arange(tokens) % 7 != 3
    valid[150:] = False
    logits[~valid] = math.nan
    options = dict(kind=kind, score=score, n_devices=4, sequence_length=150)
    exact, pull = formula(logits.double(), ids, valid, **options)
    (slope,) = pull(torch.tensor(3.0, dtype=torch.float64))
    x = logits.requires_grad_()
    for i in (ids, ids.long()):
        loss = tilefuse.moe_balance_loss(x, i, valid, **options)
        (grad,) = torch.autograd.grad(loss, x, torch.tensor(3.0))
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        assert grad.dtype == dtype and not grad[~valid].any()
        rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
        # slopes are differences of terms of about this size
        term = 3 / (valid.sum().item() * experts)
        torch.testing.assert_close(grad.double(), slope, rtol=rounding, atol=1e-6 * term)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss_and_gradient_on_every_backend(backend, dtype):
    logits = 8 * torch.randn(150, 40).to(dtype)[:, :20]
    valid = torch.arange(150) % 7 != 3
    dirty = torch.where(valid[:, None], logits, math.nan).requires_grad_()
    loss = tilefuse.moe_z_loss(dirty, valid)
    (grad,) = torch.autograd.grad(loss, dirty, torch.tensor(3.0))
    x = logits[valid].double().requires_grad_()
    exact = x.logsumexp(-1).square().mean()
    (slope,) = torch.autograd.grad(exact, x, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    assert not grad[~valid].any()
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(grad[valid].double(), slope, rtol=rounding, atol=2e-6 * slope.abs().max().item())


def test_z_loss_of_special_logits(backend):
    rows = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf], [-math.inf, 2.0], [1e30, 0.0]])
    found = [tilefuse.moe_z_loss(row[None]).item() for row in rows]
    assert math.isnan(found[0]) and found[1:3] == [math.inf, math.inf] and found[3] == 4.0 and found[4] == math.inf


@pytest.mark.parametrize("score", SCORES)
def test_tokens_whose_scores_sum_to_nothing_count_nothing(backend, score):
    """Padding, logits of 0 where they are the scores, and logits so low that their scores underflow."""
    logits, ids = torch.rand(12, 8) + 0.5, ids_of(12, 2, 8)
    logits[5] = -math.inf if score == "sigmoid" else 0.0 if score in ("none", "softmax") else -200.0
    valid = torch.arange(12) % 4 != 3
    x = logits.clone().requires_grad_()
    loss = tilefuse.moe_balance_loss(x, ids, valid, kind="sequence", score=score, sequence_length=6)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and grad.isfinite().all() and not grad[~valid].any()
    if score != "softmax":
        assert not grad[5].any()
    switch = tilefuse.moe_balance_loss(x, ids, valid, score=score)
    assert switch.isfinite() and torch.autograd.grad(switch, x)[0].isfinite().all()


def test_gradient_of_sqrtsoftplus_at_zero(backend):
    """The slope there is 1/2 / (2 sqrt(log 2)), of both sides alike."""
    logits, ids = torch.zeros(4, 4, requires_grad=True), torch.arange(4)[:, None]
    expected = torch.full((4, 4), 1 / 4 / (4 * math.sqrt(math.log(2))))

    def loss(x):
        return tilefuse.moe_balance_loss(x, ids, score="sqrtsoftplus")

    torch.testing.assert_close(torch.autograd.grad(loss(logits), logits)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), expected)


@pytest.mark.cpu_library
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_number_of_threads(kind):
    tokens, experts = 3000, 64
    logits, ids = torch.randn(tokens, experts), ids_of(tokens, 4, experts)
    options = dict(kind=kind, n_devices=8, sequence_length=1000)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = logits.clone().requires_grad_()
            loss = tilefuse.moe_balance_loss(x, ids, **options) + tilefuse.moe_z_loss(x)
            found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert_bit_equal(a, b)


@pytest.mark.parametrize("loss", ["moe_balance_loss", "moe_z_loss"])
def test_transforms_take_pytorch_operations(loss):
    logits, ids = torch.randn(12, 8, dtype=torch.float64), ids_of(12, 2, 8)
    call = {"moe_balance_loss": lambda x: tilefuse.moe_balance_loss(x, ids), "moe_z_loss": tilefuse.moe_z_loss}[loss]
    expected = call(logits)
    torch.testing.assert_close(torch.func.vmap(call)(torch.stack((logits, logits))), expected.expand(2))
    hessian = torch.func.hessian(call)(logits).view(96, 96)
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.any()
    # of the kernel a second one would be wrong, and is refused
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(call(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


def test_equals_hugging_face():
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 8)
    ids = logits.topk(2).indices
    expected = transformers.load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(tilefuse.moe_balance_loss(logits, ids, normalization="topk"), expected)


def test_1_no_tokens():
    logits = torch.zeros(0, 8, requires_grad=True)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    for loss in (tilefuse.moe_balance_loss(logits, ids), tilefuse.moe_z_loss(logits)):
        assert loss == 0
        loss.backward()
    nobody = torch.zeros(4, dtype=torch.bool)
    assert tilefuse.moe_balance_loss(torch.randn(4, 8), ids_of(4, 2, 8), nobody) == 0


def test_z_loss_is_the_formula():
    logits = torch.randn(9, 7)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.double().tolist()) / 9
    assert math.isclose(tilefuse.moe_z_loss(logits).item(), expected, rel_tol=1e-5)
    assert tilefuse.moe_z_loss(logits.bfloat16()).dtype == torch.float32


def test_update_bias():
    bias = torch.tensor([0.5, 0.0, -0.25, 1.0])
    for counts in (torch.tensor([1, 4, 9, 6]), torch.tensor([1.0, 4.0, 9.0, 6.0])):
        out = tilefuse.moe_update_bias(bias, counts, rate=0.125)
        # the mean is 5: more for those below, less for those above
        assert out.tolist() == [0.625, 0.125, -0.375, 0.875]
    assert_bit_equal(tilefuse.moe_update_bias(bias, torch.full((4,), 7)), bias)
    big = torch.tensor([2**60, 2**60, 2**60, 2**60])
    assert_bit_equal(tilefuse.moe_update_bias(bias, big), bias)
    with pytest.raises(RuntimeError, match="bias requires grad"):
        tilefuse.moe_update_bias(bias.requires_grad_(), counts)
    with torch.no_grad():
        tilefuse.moe_update_bias(bias, counts)


def test_16_compile():
    logits, ids = torch.randn(12, 8), ids_of(12, 2, 8)
    for function in (
        lambda: tilefuse.moe_balance_loss(logits, ids, kind="device", n_devices=2),
        lambda: tilefuse.moe_z_loss(logits),
        lambda: tilefuse.moe_update_bias(torch.zeros(8), torch.arange(8)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), function())


L, I, V = torch.zeros(6, 8), torch.zeros(6, 2, dtype=torch.int32), torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"moe_balance_loss: logits must be \[T, E\]", (L[0], I), {}),
        (TypeError, "logits must be float32 or", (L.int(), I), {}),
        (ValueError, r"ids must be \[6, k\]", (L, I[:5]), {}),
        (TypeError, "ids must be int32 or int64", (L, I.float()), {}),
        (ValueError, r"valid must be \[6\] bool", (L, I, V[:5]), {}),
        (TypeError, "valid must be", (L, I, V.int()), {}),
        (ValueError, "kind must be one of", (L, I), {"kind": "seq"}),
        (ValueError, "score must be one of", (L, I), {"score": "relu"}),
        (ValueError, "normalization must be one of", (L, I), {"normalization": "mean"}),
        (ValueError, "n_devices must be a divisor of E = 8, got 3", (L, I), {"n_devices": 3}),
        (ValueError, "sequence_length must be 0 or a divisor of T = 6, got 4", (L, I), {"sequence_length": 4}),
        (ValueError, "ids must be on the device of logits", (L, I.to("meta")), {}),
    ],
)
def test_balance_loss_errors(error, match, args, options):
    for call in (tilefuse.moe_balance_loss, torch.ops.tilefuse.moe_balance_loss):
        with pytest.raises(error, match=match):
            call(*args, **options)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"moe_z_loss: logits must be \[T, E\]", lambda: tilefuse.moe_z_loss(L[0])),
        (ValueError, "valid must be", lambda: tilefuse.moe_z_loss(L, V[:2])),
        (ValueError, r"moe_update_bias: bias must be \[E\] float32", lambda: tilefuse.moe_update_bias(L, L)),
        (TypeError, "bias must be", lambda: tilefuse.moe_update_bias(L[0].half(), L[0])),
        (ValueError, r"counts must be \[8\]", lambda: tilefuse.moe_update_bias(L[0], L[0, :7])),
        (TypeError, "counts must be integer or float", lambda: tilefuse.moe_update_bias(L[0], L[0].bool())),
        (ValueError, "counts must be on the device of bias", lambda: tilefuse.moe_update_bias(L[0], L[0].to("meta"))),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()
