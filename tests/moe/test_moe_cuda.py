"""The CUDA C++ kernels of ``moe_route``, its gradient and ``moe_plan``, run on the CPU by the emulation."""

import math

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, emulation, poisoned
from tilefuse.testing.inputs.moe.moe_plan import ids_of
from tilefuse.testing.inputs.moe.moe_route import MODELS, bias_of, logits_of, model_case

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")


@pytest.fixture(scope="module")
def route():
    return emulation.load_or_skip("moe", "moe_route")


@pytest.fixture(scope="module")
def plan():
    return emulation.load_or_skip("moe", "moe_plan")


def emulated_route(
    module,
    logits,
    bias=None,
    *,
    top_k,
    score="softmax",
    renormalize=True,
    n_group=1,
    topk_group=1,
    group_score="top2",
    scale=1.0,
    nan_policy="propagate",
):
    tokens, experts = logits.shape

    def run():
        with poisoned():
            weights, ids = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int32)
        module.run(
            CODES[logits.dtype],
            logits.data_ptr(),
            logits.stride(0),
            0 if bias is None else bias.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            tokens,
            experts,
            top_k,
            SCORES.index(score),
            renormalize,
            n_group,
            topk_group,
            group_score == "top2",
            scale,
            nan_policy == "zero",
        )
        return weights, ids

    return emulation.in_every_order(module, run)


def check_route_backward(
    module, logits, bias=None, *, score="softmax", renormalize=True, scale=1.0, nan_policy="propagate", **selection
):
    """The gradient against the reference's, for a choice that the reference made."""
    options = dict(score=score, renormalize=renormalize, scale=scale, nan_policy=nan_policy)
    with tilefuse.backend("reference"):
        ids = tilefuse.moe_route(logits, bias, **options, **selection)[1]
        grad = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
        # the order of the kernel op's arguments
        expected = torch.ops.tilefuse.moe_route_bwd(grad, logits, ids, *options.values())

    def run():
        with poisoned():
            out = torch.empty(logits.shape, dtype=logits.dtype)
        module.run_backward(
            CODES[logits.dtype],
            grad.data_ptr(),
            logits.data_ptr(),
            logits.stride(0),
            ids.data_ptr(),
            out.data_ptr(),
            *logits.shape,
            ids.shape[1],
            SCORES.index(score),
            renormalize,
            scale,
            nan_policy == "zero",
        )
        return out

    actual = emulation.in_every_order(module, run)
    tolerance = 2e-5 if logits.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-6, equal_nan=True)
    return actual, ids


def check_route(module, logits, bias, options):
    weights, ids = emulated_route(module, logits, bias, **options)
    with tilefuse.backend("reference"):
        expected = tilefuse.moe_route(logits, bias, **options)
    assert_bit_equal(ids, expected[1])
    torch.testing.assert_close(weights, expected[0], rtol=4e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
def test_route_models(route, name):
    check_route(route, *model_case(name, 5))


@pytest.mark.parametrize("experts", [1, 33, 70, 600])
def test_route_sizes(route, experts):
    check_route(route, logits_of(3, experts), None, {"top_k": min(experts, 40), "score": "sigmoid"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_dtypes_ties_and_strides(route, dtype):
    wide = torch.randn(6, 200).mul(2).round().to(dtype)
    check_route(route, wide[:, 30:126], None, {"top_k": 6, "n_group": 12, "topk_group": 3, "score": "sigmoid"})


def special_rows():
    logits = logits_of(8, 24)
    logits[1, 3] = logits[7, 3:] = math.nan
    logits[2] = math.nan
    logits[3] = -math.inf
    logits[4, 12] = math.inf
    logits[5] = math.inf
    logits[6, ::2] = -math.inf
    return logits


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("grouped", [False, True])
def test_route_special_values(route, score, grouped):
    logits = special_rows()
    options = {"top_k": 6, "score": score} | ({"n_group": 4, "topk_group": 2} if grouped else {})
    for bias in (None, bias_of(24)):
        for policy in ("propagate", "zero"):
            check_route(route, logits, bias, options | {"nan_policy": policy})


@pytest.mark.parametrize("name", MODELS)
def test_route_backward_models(route, name):
    logits, bias, options = model_case(name, 5)
    check_route_backward(route, logits, bias, **options)


@pytest.mark.parametrize("experts", [1, 33, 70, 600, 1024])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_route_backward_sizes(route, experts, score):
    """More choices than lanes, a single choice, every expert, and a last block with fewer rows than warps."""
    for tokens, top_k in ((1, 1), (5, min(40, experts))):
        for renormalize in (False, True):
            logits = logits_of(tokens, experts)
            check_route_backward(route, logits, top_k=top_k, score=score, renormalize=renormalize, scale=1.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_route_backward_dtypes_and_strides(route, dtype, score):
    wide = torch.full((6, 200), math.nan, dtype=dtype)
    wide[:, 30:126] = torch.randn(6, 96).abs()
    check_route_backward(route, wide[:, 30:126], top_k=6, n_group=12, topk_group=3, score=score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_route_backward_special_values(route, score, renormalize):
    logits = special_rows()
    # scores that underflow to 0
    logits = torch.cat([logits, torch.full((1, 24), -200.0), torch.full((1, 24), 200.0)])
    for bias in (None, bias_of(24)):
        for policy in ("propagate", "zero"):
            actual, ids = check_route_backward(
                route, logits, bias, top_k=6, score=score, renormalize=renormalize, nan_policy=policy, scale=2.0
            )
            if policy == "zero":
                assert not actual.isnan().any()
            if score != "softmax":
                # whatever the logits of the experts that were not chosen hold
                assert not actual.scatter(1, ids.long(), 0).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (7, 3, 5), (100, 6, 64), (40, 8, 384), (0, 2, 4)])
def test_plan(plan, tokens, top_k, experts, dtype):
    ids = ids_of(tokens, top_k, experts, dropped=0.2).to(dtype)
    slots = ids.numel()

    def run():
        with poisoned():
            order, inverse = (torch.empty(slots, dtype=torch.int32) for _ in range(2))
            offsets = torch.empty(experts + 1, dtype=torch.int32)
        plan.run(
            dtype == torch.int64,
            ids.data_ptr(),
            slots,
            experts,
            order.data_ptr(),
            inverse.data_ptr(),
            offsets.data_ptr(),
        )
        return order, inverse, offsets

    with tilefuse.backend("reference"):
        expected = tilefuse.moe_plan(ids, experts)
    for actual, wanted in zip(emulation.in_every_order(plan, run), expected, strict=True):
        assert_bit_equal(actual, wanted)
