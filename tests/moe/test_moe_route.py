"""``moe_route``. Numbers in names: docs/known-bugs.md."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, poisoned
from tilefuse.testing.inputs.moe.moe_route import MODELS, bias_of, logits_of, model_case

KERNEL = "moe_route_fwd"
NAN, INF = math.nan, math.inf
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")


def on_reference(function):
    with tilefuse.backend("reference"):
        return function()


def assert_same_routing(actual, expected):
    assert_bit_equal(actual[1], expected[1], name="ids")
    torch.testing.assert_close(actual[0], expected[0], rtol=4e-6, atol=1e-7, equal_nan=True)


def by_hand(row, bias, top_k, score, renormalize, n_group, topk_group, group_score, scale):
    """One row without special values, in Python floats."""
    x = row.double().tolist()
    if score == "softmax":
        total = sum(math.exp(v) for v in x)
        s = [math.exp(v) / total for v in x]
    else:
        f = {
            "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
            "sqrtsoftplus": lambda v: math.sqrt(math.log1p(math.exp(v))),
            "none": lambda v: v,
        }[score]
        s = [f(v) for v in x]
    biased = [v + (0 if bias is None else bias[i].item()) for i, v in enumerate(s)]
    size = len(x) // n_group
    groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
    of_group = [g[0] if group_score == "max" or size == 1 else g[0] + g[1] for g in groups]
    kept = sorted(range(n_group), key=lambda g: (-of_group[g], g))[:topk_group]
    eligible = [i for i in range(len(x)) if i // size in kept]
    ids = sorted(eligible, key=lambda i: (-biased[i], i))[:top_k]
    total = sum(s[i] for i in ids) + 1e-20 if renormalize else 1.0
    return [s[i] / total * scale for i in ids], ids


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("biased", [False, True])
def test_reference_is_the_formula(score, group_score, biased):
    logits, bias = logits_of(6, 24, dtype=torch.float64), bias_of(24) if biased else None
    for renormalize, n_group in ((True, 4), (False, 1)):
        options = dict(
            top_k=5,
            score=score,
            renormalize=renormalize,
            n_group=n_group,
            topk_group=min(2, n_group),
            group_score=group_score,
            scale=1.5,
        )
        with tilefuse.backend("reference"):
            weights, ids = tilefuse.moe_route(logits, bias, **options)
        for t in range(len(logits)):
            expected = by_hand(logits[t], bias, **options)
            assert ids[t].tolist() == expected[1]
            torch.testing.assert_close(weights[t], torch.tensor(expected[0], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_matches_reference(name, where):
    logits, bias, options = model_case(name, 33, where)
    with poisoned():
        out = tilefuse.moe_route(logits, bias, **options)
    assert out[0].dtype == torch.float32 and out[1].dtype == torch.int32
    assert_same_routing(out, on_reference(lambda: tilefuse.moe_route(logits, bias, **options)))


@pytest.mark.parametrize("experts", [1, 7, 60, 160, 192, 256, 384, 512])
@pytest.mark.parametrize("top_k", [1, 3, 5, 6, 22, 10**6], ids=lambda k: f"k{k}" if k < 10**6 else "kE")
def test_5_sizes(experts, top_k, where):
    top_k = min(top_k, experts)
    if where == "cpu" and tilefuse.backend() == "triton" and top_k > 60:
        pytest.skip("a round per choice is slow in the interpreter")
    logits = logits_of(5, experts, where)
    out = tilefuse.moe_route(logits, top_k=top_k, score="sigmoid")
    assert_same_routing(out, on_reference(lambda: tilefuse.moe_route(logits, top_k=top_k, score="sigmoid")))


@pytest.mark.parametrize("experts", [1500, 5000])
def test_5_more_experts_than_registers_hold(experts, where):
    """Beyond a kernel's number of experts a forced backend says so, and ``auto`` takes another."""
    logits = logits_of(3, experts, where)
    expected = on_reference(lambda: tilefuse.moe_route(logits, top_k=6))
    if experts > {"cuda": 1024, "triton": 4096}.get(tilefuse.backend(), experts):
        with pytest.raises(NotImplementedError, match="takes at most"):
            tilefuse.moe_route(logits, top_k=6)
        with tilefuse.backend("auto"):
            assert_same_routing(tilefuse.moe_route(logits, top_k=6), expected)
    else:
        assert_same_routing(tilefuse.moe_route(logits, top_k=6), expected)


def test_5_cuda_refuses_the_gradient_of_more_experts_too():
    refuses = tilefuse.library.kernels()["moe_route_bwd"].when["cuda"]
    for experts, reason in ((1024, None), (1025, "takes at most 1024 experts")):
        logits = torch.empty(2, experts)
        assert refuses(torch.empty(2, 3), logits, torch.empty(2, 3, dtype=torch.int32)) == reason


def test_1_no_tokens(where):
    logits = torch.zeros(0, 16, device=where, requires_grad=True)
    weights, ids = tilefuse.moe_route(logits, top_k=3)
    assert weights.shape == ids.shape == (0, 3) and ids.dtype == torch.int32
    weights.sum().backward()
    assert logits.grad.shape == (0, 16)


@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_4_token_counts(tokens, where):
    logits, bias, options = model_case("deepseek_v3", tokens, where)
    out = tilefuse.moe_route(logits, bias, **options)
    assert_same_routing(out, on_reference(lambda: tilefuse.moe_route(logits, bias, **options)))


def test_7_groups_with_negative_bias(where):
    """Every biased score is negative: masking excluded groups with 0 would choose nothing else."""
    logits, _, options = model_case("deepseek_v3", 16, where)
    bias = bias_of(256, where) * 3 - 1.5
    weights, ids = tilefuse.moe_route(logits, bias, **options)
    biased = logits.sigmoid() + bias
    groups = biased.view(-1, 8, 32).topk(2).values.sum(-1).topk(4).indices
    assert all(set((row // 32).tolist()) <= set(g.tolist()) for row, g in zip(ids.cpu(), groups.cpu()))
    assert_same_routing((weights, ids), on_reference(lambda: tilefuse.moe_route(logits, bias, **options)))


@pytest.mark.parametrize("experts", [7, 256, 500])
def test_8_all_equal_logits_choose_the_first(experts, where):
    for score in SCORES:
        _, ids = tilefuse.moe_route(torch.full((3, experts), 0.25, device=where), top_k=6, score=score)
        assert ids.tolist() == [list(range(6))] * 3


def test_8_ties_of_bf16_logits_and_of_groups(where):
    logits = torch.randn(64, 96).mul(2).round().bfloat16().to(where)
    for options in ({"top_k": 20}, {"top_k": 4, "n_group": 12, "topk_group": 3, "score": "sigmoid"}):
        _, ids = tilefuse.moe_route(logits, **options)
        assert_bit_equal(ids, on_reference(lambda o=options: tilefuse.moe_route(logits, **o))[1])
    row, picked = logits[0].float().cpu(), tilefuse.moe_route(logits, top_k=20)[1][0].tolist()
    assert picked == sorted(range(96), key=lambda i: (-row[i].item(), i))[:20]


def test_8_zero_of_either_sign_ties(where):
    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]], device=where)
    assert tilefuse.moe_route(logits, top_k=4, score="none")[1].tolist() == [[0, 1, 3, 4]]


def test_8_underflowing_softmax_ranks_by_logit(where):
    logits = torch.tensor([[-400.0, -200.0, 0.0, -300.0]], device=where)
    assert tilefuse.moe_route(logits, top_k=4)[1].tolist() == [[2, 1, 3, 0]]


def special_rows(experts, where):
    logits = logits_of(9, experts, where)
    logits[1, 3] = NAN
    logits[2] = NAN
    logits[3] = -INF
    logits[4, experts // 2] = INF
    logits[5] = INF
    logits[6, ::2] = -INF
    logits[6, 1] = NAN
    logits[7, : experts - 2] = NAN
    return logits


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_9_special_values(score, grouped, biased, where):
    """Ids stay distinct and in range, and rows without special values keep their bits."""
    experts, top_k = 24, 6
    logits, bias = special_rows(experts, where), bias_of(experts, where) if biased else None
    options = dict(top_k=top_k, score=score)
    if grouped:
        options |= dict(n_group=4, topk_group=2)
    clean = torch.tensor([0, 8])
    alone = tilefuse.moe_route(logits[clean], bias, **options)
    for policy in ("propagate", "zero"):
        weights, ids = tilefuse.moe_route(logits, bias, nan_policy=policy, **options)
        assert_same_routing(
            (weights, ids), on_reference(lambda p=policy: tilefuse.moe_route(logits, bias, nan_policy=p, **options))
        )
        for row in ids.tolist():
            assert len(set(row)) == top_k and all(0 <= i < experts for i in row)
        if tilefuse.backend() == "reference":
            # PyTorch's own vector loops round the ends of a tensor differently
            torch.testing.assert_close(weights[clean], alone[0], rtol=1e-6, atol=0)
        else:
            assert_bit_equal(weights[clean], alone[0])
        assert_bit_equal(ids[clean], alone[1])
        if policy == "zero":
            assert not weights.isnan().any()
        elif score == "softmax":
            assert weights[[1, 2, 3, 4, 5, 6, 7]].isnan().all()


def test_9_order_of_special_values(where):
    logits = torch.tensor([[NAN, -INF, 1.0, NAN, -INF, 2.0]], device=where)
    _, ids = tilefuse.moe_route(logits, top_k=6, score="none")
    assert ids.tolist() == [[5, 2, 1, 4, 0, 3]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_18_gradcheck(score, renormalize):
    logits = logits_of(4, 12, dtype=torch.float64).requires_grad_()
    bias = bias_of(12)
    with tilefuse.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x: tilefuse.moe_route(
                x, bias, top_k=3, score=score, renormalize=renormalize, n_group=4, topk_group=3, scale=1.7
            )[0],
            (logits,),
        )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_18_backward_matches_reference(score, renormalize, dtype, where):
    logits = special_rows(24, where).to(dtype).requires_grad_()
    grad = torch.randn(9, 6, device=where)
    for policy in ("propagate", "zero"):

        def gradient(policy=policy):
            weights, _ = tilefuse.moe_route(
                logits, top_k=6, score=score, renormalize=renormalize, nan_policy=policy, scale=2.0
            )
            with poisoned():
                return torch.autograd.grad(weights, logits, grad)[0]

        actual, expected = gradient(), on_reference(gradient)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-6, equal_nan=True)
        if policy == "zero":
            assert not actual.isnan().any()
        if renormalize:
            chosen = tilefuse.moe_route(logits.detach(), top_k=6, score=score)[1].long()
            others = torch.ones(9, 24, device=where).scatter_(1, chosen, 0).bool()
            others[1:8] = False
            # exactly 0, but for softmax's 1e-20 in the denominator
            assert actual[others].abs().max() <= (1e-15 if score == "softmax" else 0)


def test_18_bias_gets_no_gradient(where):
    logits, bias, options = model_case("deepseek_v3", 4, where)
    bias.requires_grad_()
    assert not tilefuse.moe_route(logits, bias, **options)[0].requires_grad
    weights, ids = tilefuse.moe_route(logits.requires_grad_(), bias, **options)
    weights.sum().backward()
    assert bias.grad is None and logits.grad is not None and not ids.requires_grad


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_13_14_repeatable_and_batch_invariant(name, where, repeats):
    logits, bias, options = model_case(name, 20, where)
    logits.requires_grad_()

    def run(x):
        weights, ids = tilefuse.moe_route(x, bias, **options)
        return weights.detach(), ids, torch.autograd.grad(weights, x, torch.ones_like(weights))[0]

    first = run(logits)
    for _ in range(repeats(where)):
        for a, b in zip(run(logits), first):
            assert_bit_equal(a, b)
    for rows in (slice(3, 4), slice(5, 18)):
        for a, b in zip(run(logits.detach()[rows].requires_grad_()), first):
            assert_bit_equal(a, b[rows])


def test_strides(where):
    logits, bias, options = model_case("deepseek_v3", 6, where)
    expected = tilefuse.moe_route(logits, bias, **options)
    wide = torch.full((6, 300), NAN, device=where)
    wide[:, 20:276] = logits
    for view in (wide[:, 20:276], logits.T.contiguous().T):
        out = tilefuse.moe_route(view, bias, **options)
        assert_bit_equal(out[0], expected[0])
        assert_bit_equal(out[1], expected[1])


@pytest.mark.parametrize("name", MODELS)
def test_16_compile(name):
    # every model is the same code with other options: not a recompilation to count
    torch._dynamo.reset()
    _, bias, options = model_case(name, 6)

    def function(x):
        weights, ids = tilefuse.moe_route(x, bias, **options)
        return weights * 2, ids

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        x = model_case(name, tokens)[0].requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, expected = compiled(x), function(y)
        assert_bit_equal(out[1], expected[1])
        assert_bit_equal(out[0].detach(), expected[0].detach())
        out[0].sum().backward()
        expected[0].sum().backward()
        assert_bit_equal(x.grad, y.grad)


def hugging_face(model):
    """(router, options of moe_route, bias or None), random weights, float32."""
    if model == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router

        config = Config(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
        options = dict(top_k=2)
    elif model.startswith("qwen3"):
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

        norm = model == "qwen3_norm"
        config = Config(hidden_size=32, num_experts=128, num_experts_per_tok=8, norm_topk_prob=norm)
        options = dict(top_k=8, renormalize=norm)
    elif model == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig as Config
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter as Router

        config = Config(hidden_size=32, num_local_experts=32, num_experts_per_tok=4)
        options = dict(top_k=4)
    elif model == "deepseek_v2":
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config as Config
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter as Router

        config = Config(
            hidden_size=32,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
            norm_topk_prob=False,
        )
        options = dict(top_k=6, n_group=8, topk_group=3, group_score="max", renormalize=False, scale=16.0)
    else:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router

        config = Config(
            hidden_size=32,
            n_routed_experts=64,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
        options = dict(top_k=8, score="sigmoid", n_group=8, topk_group=4, scale=2.5)
    router = Router(config)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    bias = None
    if model.startswith("deepseek_v3"):
        bias = bias_of(64) * (3 if model.endswith("negative") else 0.1)
        router.e_score_correction_bias.copy_(bias)
    return router, options, bias


HUGGING_FACE = [
    "mixtral",
    "qwen3",
    "qwen3_norm",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_negative",
]


@pytest.mark.parametrize("model", HUGGING_FACE)
def test_equals_hugging_face_router(model, where):
    """Same experts with the same weights; Hugging Face promises no order among them.

    With negative biases Hugging Face 5.23 masks excluded groups with -inf in DeepSeek-V3, as tilefuse does. In
    DeepSeek-V2 it masks with 0, which changes nothing there: softmax scores are positive.
    """
    pytest.importorskip("transformers")
    router, options, bias = hugging_face(model)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(40, 32))
    bias = None if bias is None else bias.to(where)
    ours, our_ids = tilefuse.moe_route(logits.to(where), bias, **options)
    by_id, by_our_id = ids.sort(-1), our_ids.cpu().long().sort(-1)
    assert torch.equal(by_our_id.values, by_id.values)
    torch.testing.assert_close(
        ours.cpu().gather(-1, by_our_id.indices), weights.gather(-1, by_id.indices).float(), rtol=4e-6, atol=1e-7
    )


L = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"moe_route: logits must be \[T, E\] with E >= 1, got \[8\] float32", (L[0],), {}),
        (ValueError, "logits must be", (L[:, :0],), {}),
        (TypeError, "logits must be float32 or", (L.int(),), {}),
        (ValueError, r"bias must be \[8\] float32, got \[7\] float32", (L, L[0, :7]), {}),
        (TypeError, "bias must be", (L, L[0].bfloat16()), {}),
        (ValueError, "bias must be on the device of logits", (L, L[0].to("meta")), {}),
        (ValueError, "score must be one of", (L,), {"score": "relu"}),
        (ValueError, "group_score must be one of", (L,), {"group_score": "mean"}),
        (ValueError, "nan_policy must be one of", (L,), {"nan_policy": "raise"}),
        (ValueError, "n_group must be a divisor of E = 8, got 3", (L,), {"n_group": 3}),
        (ValueError, "n_group must be", (L,), {"n_group": 0}),
        (ValueError, "topk_group must be between 1 and n_group = 4, got 5", (L,), {"n_group": 4, "topk_group": 5}),
        (ValueError, "top_k must be between 1 and the 8 experts", (L,), {"top_k": 9}),
        (ValueError, "top_k must be", (L,), {"top_k": 0}),
        (ValueError, "top_k must be between 1 and the 2 experts", (L,), {"top_k": 3, "n_group": 4}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.moe_route, torch.ops.tilefuse.moe_route):
        with pytest.raises(error, match=match):
            call(*args, **({"top_k": 2} | options))
