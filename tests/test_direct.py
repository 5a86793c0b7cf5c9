"""Calls that are repeated without Python (tilefuse/direct.py): same bits, and every other call is the function's."""

import copy
import inspect
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tilefuse
from tilefuse import backends, direct, library
from tilefuse.testing import assert_bit_equal

OPS = tilefuse.ops()

needs_module = [
    pytest.mark.cpu_library,
    pytest.mark.skipif(direct.load().missing is not None, reason=str(direct.load().missing)),
]


@pytest.fixture(autouse=True)
def _nothing_recorded():
    backends.forget()


def repeated(op):
    return op.replay.counts()[2]


def warm(op, *args, **kwargs):
    """Calls until the call is repeated; returns what the function returns."""
    before = repeated(op)
    for _ in range(3):
        op(*args, **kwargs)
    assert repeated(op) > before
    return op.__wrapped__(*args, **kwargs)


def equal(outputs, expected):
    outputs, expected = tree_leaves(outputs), tree_leaves(expected)
    assert len(outputs) == len(expected)
    for a, b in zip(outputs, expected):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        assert_bit_equal(a, b)


def operands(tokens=5, heads=2, dtype=torch.float32):
    cos, sin = tilefuse.rope_tables(8, 64)
    return torch.randn(tokens, heads, 8, dtype=dtype), torch.randn(tokens, 1, 8, dtype=dtype), cos, sin


CHANGES = [
    dict(interleaved=True),
    dict(conjugate=True),
    dict(interleaved=False),
    dict(conjugate=False),
    dict(interleaved=True, conjugate=False),
    dict(interleaved=False, conjugate=True),
    dict(rotary_offset=2),
    dict(positions=torch.tensor([4, 3, 2, 1, 0])),
    dict(positions=torch.tensor([4, 3, 2, 1, 0], dtype=torch.int32)),
    dict(cu_seqlens=torch.tensor([0, 3, 5])),
    dict(x=torch.randn(5, 2, 12)),
    dict(x=torch.randn(5, 2, 8).bfloat16()),
    dict(x=torch.randn(5, 2, 8).half()),
    dict(x=torch.randn(2, 5, 8).transpose(0, 1)),
    dict(x=torch.randn(5, 8, 2).transpose(1, 2)),
    dict(x=torch.randn(1, 2, 8).expand(5, 2, 8)),
    dict(x=torch.randn(0, 2, 8)),
    dict(x=torch.randn(5, 2, 8).double()),
    dict(mrope_section=(1, 2, 1), positions=torch.arange(15).view(3, 5)),
    dict(mrope_section=[2, 1, 1], positions=torch.arange(15).view(3, 5)),
]


class TestKey:
    pytestmark = needs_module

    def test_a_call_is_repeated_from_the_third_on(self):
        q, k, cos, sin = operands()
        expected = tilefuse.rope_qk.__wrapped__(q, k, cos, sin)
        before = repeated(tilefuse.rope_qk)
        counts = []
        for _ in range(4):
            equal(tilefuse.rope_qk(q, k, cos, sin), expected)
            counts.append(repeated(tilefuse.rope_qk) - before)
        assert counts == [0, 0, 1, 2]
        # other values of the same key
        q, k = torch.randn_like(q), torch.randn_like(k)
        equal(tilefuse.rope_qk(q, k, cos, sin), tilefuse.rope_qk.__wrapped__(q, k, cos, sin))
        assert repeated(tilefuse.rope_qk) == before + 3

    def test_each_difference_makes_another_key(self):
        x, _, cos, sin = operands()
        narrow = cos[:, :3].contiguous(), sin[:, :3].contiguous()
        calls = []
        for change in CHANGES:
            tables = (cos, sin) if "mrope_section" in change else narrow
            call = dict(x=x, cos=tables[0], sin=tables[1]) | change
            calls.append((call, tilefuse.rope.__wrapped__(**call)))
        for _ in range(4):
            for call, expected in calls:
                equal(tilefuse.rope(**call), expected)
        # 0 and False, a tuple and a list are keys of their own as well
        assert tilefuse.rope.replay.counts()[0] == len(CHANGES)

    def test_floats_and_strings_are_in_the_key(self):
        logits, bias = torch.randn(3, 16), torch.randn(16)
        for score in ("softmax", "sigmoid", "sqrtsoftplus"):
            for scale in (1.0, 2.5, -0.0, 0.0, 1):
                call = dict(top_k=4, score=score, scale=scale, n_group=4, topk_group=2)
                equal(tilefuse.moe_route(logits, bias, **call), warm(tilefuse.moe_route, logits, bias, **call))

    def test_one_tensor_given_twice_is_another_key(self):
        q, _, cos, sin = operands()
        k = torch.randn_like(q)
        for first in (True, False):
            backends.forget()
            calls = [(q, q, cos, sin), (q, k, cos, sin)]
            for call in calls if first else reversed(calls):
                equal(tilefuse.rope_qk(*call), warm(tilefuse.rope_qk, *call))

    def test_keys_are_bounded(self):
        _, _, cos, sin = operands()
        x = torch.randn(60, 60, 8)
        most = 0
        for tokens in range(60):
            for heads in range(60):
                tilefuse.rope(x[:tokens, :heads], cos, sin)
            most = max(most, tilefuse.rope.replay.counts()[0])
        assert 500 < most <= 1024

    def test_long_calls_are_the_functions(self):
        replay, calls = toy(lambda *args: len(args))
        assert [replay(*["a long text" * 100] * 10) for _ in range(4)] == [10] * 4
        assert [replay(*torch.zeros(40).unbind()) for _ in range(4)] == [40] * 4
        assert len(calls) == 8


def toy(function, writes=False):
    """A Replay of a function, and the calls that reached the function."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return direct.replayed(counted, library.kernels(), writes), calls


class TestRecording:
    """What a function may do, and be repeated."""

    pytestmark = needs_module

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x[0, 0, 0].item(),
            lambda x: x.tolist(),
            lambda x: x.numpy(),
            lambda x: x.sum(),
            lambda x: torch.sum(x),
            lambda x: torch.any(x > 0),
            lambda x: bool((x == x).all()),
            lambda x: float(x[0, 0, 0]),
            lambda x: list(x),
            lambda x: x.data_ptr(),
            lambda x: x.storage_offset(),
            lambda x: x.untyped_storage(),
            lambda x: x._version,
            lambda x: x.is_inference(),
            lambda x: x.__dlpack__(),
            lambda x: x.data,
            lambda x: x.grad,
            lambda x: str(x),
            lambda x: torch.ops.aten.sum.default(x),
            lambda x: torch.ops.tilefuse.rope(x, *tilefuse.rope_tables(8, 8)),
            lambda x: tilefuse.rope(x, *tilefuse.rope_tables(8, 8)),
        ],
    )
    def test_a_function_that_reads_contents_is_not_repeated(self, read):
        from tilefuse.ops.rope.rope import rest_of, rope_fwd

        def function(x, cos, sin, look):
            if look:
                read(x)
            return rope_fwd(x, *rest_of(cos, sin, None, None, False, 0, False, None, False))

        x, _, cos, sin = operands()
        replay, calls = toy(function)
        for look in (0, 1):
            for _ in range(4):
                replay(x, cos, sin, look)
        assert len(calls) == 2 + 4

    def test_what_a_key_answers_may_be_asked(self):
        from tilefuse.ops.rope.rope import rest_of, rope_fwd

        def function(x, cos, sin):
            assert x.shape[0] == len(x) and x.size(0) and x.stride(0) and x.dim() == x.ndim and x.is_contiguous()
            assert x.dtype.is_floating_point and x.device.type == "cpu" and not x.requires_grad and x.numel()
            return (
                rope_fwd(x.detach().contiguous(), *rest_of(cos, sin, None, None, False, 0, False, None, False)),
                None,
                x,
            )

        x, _, cos, sin = operands()
        replay, calls = toy(function)
        for _ in range(4):
            out = replay(x, cos, sin)
        assert len(calls) == 2 and out[1] is None and out[2] is x
        equal(out[0], tilefuse.rope.__wrapped__(x, cos, sin))

    @pytest.mark.parametrize(
        "function",
        [
            lambda call, x: call(call(x)),
            lambda call, x: (call(x), call(x)),
            lambda call, x: call(x.clone()),
            lambda call, x: call(x) + 1,
            lambda call, x: [call(x)],
            lambda call, x: (call(x), x.shape),
            lambda call, x: (call(x), x.detach()),
            lambda call, x: x,
            lambda call, x: None,
        ],
    )
    def test_a_function_that_does_more_than_one_kernel_is_not_repeated(self, function):
        from tilefuse.ops.rope.rope import rest_of, rope_fwd

        x, _, cos, sin = operands()
        rest = rest_of(cos, sin, None, None, False, 0, False, None, False)
        replay, calls = toy(lambda x, cos, sin: function(lambda y: rope_fwd(y, cos, sin, *rest[2:]), x))
        for _ in range(4):
            replay(x, cos, sin)
        assert len(calls) == 4

    def test_a_tensor_that_is_no_argument_is_not_repeated(self):
        from tilefuse.ops.rope.rope import rest_of, rope_fwd

        x, _, cos, sin = operands()
        rest = rest_of(cos, sin, None, None, False, 0, False, None, False)
        replay, calls = toy(lambda x: rope_fwd(x, *rest))
        for _ in range(4):
            replay(x)
        assert len(calls) == 4

    def test_an_op_without_plans_is_left_to_python(self):
        replay, calls = toy(lambda x: x.sum())
        x = torch.randn(100, 100)
        for i in range(1, 100):
            for _ in range(2):
                replay(x[:i])
        keys = replay.counts()[0]
        assert keys < 80
        replay(x[:, :3])
        assert replay.counts()[0] == keys and len(calls) == 199

    def test_an_error_is_raised_each_time(self):
        q, k, cos, sin = operands()
        for _ in range(4):
            with pytest.raises(
                ValueError, match=r"tilefuse.rope_qk: k must be of q's shape .*, got \[4, 1, 8\] float32"
            ):
                tilefuse.rope_qk(q, k[:4], cos, sin)
            with pytest.raises(TypeError, match="unexpected keyword"):
                tilefuse.rope_qk(q, k, cos, sin, wrong=1)
            with pytest.raises(TypeError, match="missing"):
                tilefuse.rope_qk(q, k, cos)


class TestOtherCalls:
    """Each of these must not be repeated, though a plain call of the same key was."""

    pytestmark = needs_module

    def test_gradients(self):
        q, k, cos, sin = operands()
        warm(tilefuse.rope_qk, q, k, cos, sin)
        before = repeated(tilefuse.rope_qk)
        for kind in (lambda t: t.clone().requires_grad_(), nn.Parameter):
            leaf = kind(q)
            out, _ = tilefuse.rope_qk(leaf, k, cos, sin)
            assert out.requires_grad and repeated(tilefuse.rope_qk) == before
            out.sum().backward()
            expected = tilefuse.rope(torch.ones_like(q), cos, sin, conjugate=True)
            assert_bit_equal(leaf.grad, expected)
        with torch.no_grad():
            out, _ = tilefuse.rope_qk(leaf, k, cos, sin)
        assert not out.requires_grad and repeated(tilefuse.rope_qk) == before + 1
        # keyword arguments too, and tables that get no gradient are refused
        assert tilefuse.rope_qk(q=leaf, k=k, cos=cos, sin=sin)[0].requires_grad
        with pytest.raises(RuntimeError, match="tables get no gradient"):
            tilefuse.rope_qk(q, k, cos.requires_grad_(), sin)

    def test_a_plan_made_without_grad_mode_serves_no_gradient(self):
        q, k, cos, sin = operands()
        q.requires_grad_()
        with torch.no_grad():
            warm(tilefuse.rope_qk, q, k, cos, sin)
        assert tilefuse.rope_qk(q, k, cos, sin)[0].requires_grad
        with torch.no_grad():
            warm(tilefuse.rope_qk_, q, k, cos, sin)
        with pytest.raises(RuntimeError, match="requires grad"):
            tilefuse.rope_qk_(q, k, cos, sin)

    def test_dispatch_modes(self):
        seen = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        call = operands()
        warm(tilefuse.rope_qk, *call)
        with Mode():
            tilefuse.rope_qk(*call)
        assert torch.ops.tilefuse.rope_qk_fwd.default in seen

    def test_function_modes(self):
        seen = []

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        call = operands()
        warm(tilefuse.rope_qk, *call)
        with Mode():
            tilefuse.rope_qk(*call)
        assert torch.ops.tilefuse.rope_qk_fwd.default in seen

    def test_fake_tensors(self):
        call = operands()
        warm(tilefuse.rope_qk, *call)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in call]
            assert all(type(t) is torch._subclasses.FakeTensor for t in tilefuse.rope_qk(*fakes))
        assert all(type(t) is torch._subclasses.FakeTensor for t in tilefuse.rope_qk(*fakes))
        assert all(t.is_meta for t in tilefuse.rope_qk(*(t.to("meta") for t in call)))

    def test_explain(self):
        call = operands()
        warm(tilefuse.rope_qk, *call)
        assert tilefuse.explain("rope_qk", *call)["rope_qk_fwd"]["cpu"] == "runs"

    def test_autocast(self):
        from tilefuse.ops.rope.rope import rest_of, rope_fwd

        def function(x, cos, sin):
            (x,) = library.autocast(x)
            return rope_fwd(x, *rest_of(cos, sin, None, None, False, 0, False, None, False))

        x, _, cos, sin = operands()
        replay, calls = toy(function)
        for _ in range(4):
            assert replay(x, cos, sin).dtype == torch.float32
        assert len(calls) == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert replay(x, cos, sin).dtype == torch.bfloat16

    def test_the_profiler_shows_the_op(self):
        call = operands()
        warm(tilefuse.rope_qk, *call)
        with torch.profiler.profile() as profile:
            tilefuse.rope_qk(*call)
        assert "tilefuse::rope_qk_fwd" in {e.name for e in profile.events()}

    def test_jit_trace(self):
        q, k, cos, sin = operands()
        warm(tilefuse.rope_qk, q, k, cos, sin)
        traced = torch.jit.trace(lambda q, k: tilefuse.rope_qk(q, k, cos, sin), (q, k))
        other = torch.randn_like(q), torch.randn_like(k)
        equal(traced(*other), tilefuse.rope_qk.__wrapped__(*other, cos, sin))

    def test_make_fx(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        call = operands()
        warm(tilefuse.rope_qk, *call)
        for mode in ("real", "fake", "symbolic"):
            graph = make_fx(lambda *call: tilefuse.rope_qk(*call), tracing_mode=mode)(*call)
            assert torch.ops.tilefuse.rope_qk_fwd.default in {n.target for n in graph.graph.nodes}

    def test_compile_and_export(self):
        q, k, cos, sin = operands()
        expected = warm(tilefuse.rope_qk, q, k, cos, sin)

        class Module(nn.Module):
            def forward(self, q, k):
                return tilefuse.rope_qk(q, k, cos, sin)

        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        equal(compiled(q, k), expected)
        exported = torch.export.export(Module(), (q, k))
        assert torch.ops.tilefuse.rope_qk_fwd.default in {n.target for n in exported.graph.nodes}
        # a compiled model leaves eager calls as they were
        warm(tilefuse.rope_qk, q, k, cos, sin)

    def test_transforms(self):
        x, _, cos, sin = operands()
        warm(tilefuse.rope, x, cos, sin)
        rope = lambda x: tilefuse.rope(x, cos, sin)  # noqa: E731
        many = torch.randn(3, *x.shape)
        equal(torch.vmap(rope)(many), torch.stack([rope(t) for t in many]))
        assert_bit_equal(
            torch.func.grad(lambda x: rope(x).sum())(x), tilefuse.rope(torch.ones_like(x), cos, sin, conjugate=True)
        )
        tangent = torch.randn_like(x)
        equal(torch.func.jvp(rope, (x,), (tangent,)), (rope(x), rope(tangent)))
        # also with tensors that no transform has to do with
        before = repeated(tilefuse.rope)
        torch.func.grad(lambda t: t.sum() + rope(x).sum())(x)
        assert repeated(tilefuse.rope) == before
        # a tensor that outlives its transform is no plain one
        kept = []
        torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
        torch.vmap(lambda x: kept.append(x) or x)(many)
        equal(rope(kept[0]), rope(x))
        with pytest.raises(RuntimeError):
            rope(kept[1])

    def test_forward_mode(self):
        x, _, cos, sin = operands()
        warm(tilefuse.rope, x, cos, sin)
        with forward_ad.dual_level():
            tangent = torch.randn_like(x)
            out = forward_ad.unpack_dual(tilefuse.rope(forward_ad.make_dual(x, tangent), cos, sin))
            equal(out.tangent, tilefuse.rope.__wrapped__(tangent, cos, sin))

    def test_negated_and_conjugated_views(self):
        x, _, cos, sin = operands()
        warm(tilefuse.rope, x, cos, sin)
        for view in (torch._neg_view(x), torch.randn(5, 2, 8, dtype=torch.complex64).conj().imag):
            assert view.is_neg()
            for _ in range(4):
                equal(tilefuse.rope(view, cos, sin), tilefuse.rope.__wrapped__(view.clone(), cos, sin))
        warm(tilefuse.rope_, x.clone(), cos, sin)
        y = torch._neg_view(x.clone())
        # torch does not resolve such views for ops that return nothing
        with pytest.raises(RuntimeError):
            tilefuse.rope_(y, cos, sin)
        assert torch.equal(y, -x)

    def test_subclasses(self):
        seen = []

        class Logged(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                seen.append(func)
                return super().__torch_function__(func, types, args, kwargs or {})

        x, _, cos, sin = operands()
        warm(tilefuse.rope, x, cos, sin)
        out = tilefuse.rope(x.as_subclass(Logged), cos, sin)
        assert torch.ops.tilefuse.rope_fwd.default in seen and type(out) is Logged

    def test_values_that_no_key_holds(self):
        x, _, cos, sin = operands()
        warm(tilefuse.rope, x, cos, sin, rotary_offset=0)
        before = repeated(tilefuse.rope)

        class Odd(int):
            pass

        equal(tilefuse.rope(x, cos, sin, rotary_offset=Odd(0)), tilefuse.rope.__wrapped__(x, cos, sin))
        assert repeated(tilefuse.rope) == before
        for _ in range(3):
            with pytest.raises((ValueError, RuntimeError, OverflowError)):
                tilefuse.rope(x, cos, sin, rotary_offset=1 << 80)

    def test_backends(self):
        call = operands()
        warm(tilefuse.rope_qk, *call)
        before = repeated(tilefuse.rope_qk)
        with tilefuse.backend("reference"):
            for _ in range(4):
                tilefuse.rope_qk(*call)
            assert repeated(tilefuse.rope_qk) == before
        with tilefuse.backend("cuda"):
            for _ in range(4):
                with pytest.raises(NotImplementedError, match="no backend for cpu"):
                    tilefuse.rope_qk(*call)
        with tilefuse.backend("cpu"):
            warm(tilefuse.rope_qk, *call)


class TestContents:
    pytestmark = needs_module

    def test_values_that_a_kernel_refuses(self):
        q, k, cos, sin = operands()
        good, bad = torch.arange(5), torch.tensor([0, 1, 64, 2, 3])
        warm(tilefuse.rope_qk, q, k, cos, sin, good)
        warm(tilefuse.rope_qk_, q.clone(), k.clone(), cos, sin, good)
        for op in (tilefuse.rope_qk, tilefuse.rope_qk_):
            name = op.__name__
            args = q.clone(), k.clone()
            for _ in range(3):
                message = rf"^tilefuse.{name}: positions must be in \[0, 64\), got 64$"
                with pytest.raises(ValueError, match=message):
                    op(*args, cos, sin, bad)
            equal(args, (q, k))
            equal(op(*args, cos, sin, good), tilefuse.rope_qk.__wrapped__(q, k, cos, sin, good))

    def test_contents_are_read_in_every_call(self):
        q, k, cos, sin = operands()
        bounds = torch.tensor([0, 3, 5])
        warm(tilefuse.rope_qk, q, k, cos, sin, None, bounds)
        bounds[1] = 1
        equal(
            tilefuse.rope_qk(q, k, cos, sin, None, bounds), tilefuse.rope_qk.__wrapped__(q, k, cos, sin, None, bounds)
        )


class TestInPlace:
    pytestmark = needs_module

    def test_the_arguments_come_back_and_count_the_change(self):
        q, k, cos, sin = operands()
        warm(tilefuse.rope_qk_, q, k, cos, sin)
        before = repeated(tilefuse.rope_qk_)
        versions = q._version, k._version, cos._version
        out = tilefuse.rope_qk_(q, k, cos, sin)
        assert repeated(tilefuse.rope_qk_) == before + 1 and out[0] is q and out[1] is k
        assert (q._version, k._version, cos._version) == (versions[0] + 1, versions[1] + 1, versions[2])
        weight = torch.randn(8, requires_grad=True)
        product = weight * q
        tilefuse.rope_qk_(q, k, cos, sin)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_memory_that_is_shared_is_refused(self):
        x = torch.randn(6, 2, 8)
        cos, sin = tilefuse.rope_tables(8, 64)
        q, k = x[:3], x[3:]
        warm(tilefuse.rope_qk_, q, k, cos, sin)
        for _ in range(3):
            for other in (x[2:5], x[:3], q, x.view(-1)[1:49].view(3, 2, 8)):
                kept = x.clone()
                with pytest.raises(ValueError, match="k must be a tensor that shares no memory with q"):
                    tilefuse.rope_qk_(q, other, cos, sin)
                assert torch.equal(x, kept)

    def test_views_of_one_projection(self):
        cos, sin = tilefuse.rope_tables(8, 64)
        x = torch.randn(5, 3 * 8)
        plain = [tilefuse.rope_qk(x[:, :16].view(5, 2, 8), x[:, 16:].view(5, 1, 8), cos, sin)]
        for _ in range(4):
            y = x.clone()
            before = repeated(tilefuse.rope_qk_)
            tilefuse.rope_qk_(y[:, :16].view(5, 2, 8), y[:, 16:].view(5, 1, 8), cos, sin)
            assert torch.equal(y, torch.cat([t.flatten(1) for t in plain[0]], 1))
        assert repeated(tilefuse.rope_qk_) == before + 1
        # the same strides at another distance, where they do share memory
        with pytest.raises(ValueError, match="shares no memory"):
            tilefuse.rope_qk_(y[:, :16].view(5, 2, 8), y[:, 12:20].view(5, 1, 8), cos, sin)

    def test_inference_tensors(self):
        with torch.inference_mode():
            q, k, cos, sin = operands()
            warm(tilefuse.rope_qk_, q, k, cos, sin)
            out = tilefuse.rope_qk(q, k, cos, sin)
            assert all(t.is_inference() for t in warm(tilefuse.rope_qk, q, k, cos, sin))
            equal(tilefuse.rope_qk(q, k, cos, sin), out)
            assert tilefuse.rope_qk(q, k, cos, sin)[0].is_inference()
        # outside, both kinds are served by one plan
        before = repeated(tilefuse.rope_qk)
        plain = [t.clone() for t in (q, k, cos, sin)]
        assert not any(t.is_inference() for t in tilefuse.rope_qk(*plain))
        assert repeated(tilefuse.rope_qk) == before + 1
        expected = tilefuse.rope_qk_(*plain)
        equal(tilefuse.rope_qk_(q, k, cos, sin), expected)


class TestTheFunction:
    def test_it_looks_like_the_function(self):
        assert list(inspect.signature(tilefuse.rope_qk).parameters)[:4] == ["q", "k", "cos", "sin"]
        assert tilefuse.rope_qk.__doc__ and tilefuse.rope_qk.__module__ == "tilefuse.ops.rope.rope"
        for op in OPS.values():
            assert pickle.loads(pickle.dumps(op.function)) is op.function
            assert copy.deepcopy(op.function) is op.function

    def test_without_the_module(self):
        program = (
            "import sys; sys.modules['tilefuse._direct'] = None\n"
            "import torch, tilefuse\n"
            "from tilefuse import direct\n"
            "x = torch.randn(3, 2, 8)\n"
            "for _ in range(4): y = tilefuse.rope(x, *tilefuse.rope_tables(8, 16))\n"
            "assert y.shape == x.shape and not hasattr(tilefuse.rope, 'replay')\n"
            "print(direct.load().missing)\n"
        )
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith(("_direct.abi3.so cannot be loaded: ", "_direct.abi3.so was not built"))


class TestThreads:
    pytestmark = needs_module

    def test_shapes_of_their_own_and_settings_of_all(self):
        cos, sin = tilefuse.rope_tables(8, 64)
        inputs = [(torch.randn(n + 1, 2, 8), torch.randn(n + 1, 1, 8), cos, sin) for n in range(8)]
        expected = [tilefuse.rope_qk.__wrapped__(*call) for call in inputs]
        start = threading.Barrier(9)

        def work(i):
            start.wait()
            for n in range(400):
                j = (i + n % 3) % 8
                for a, b in zip(tilefuse.rope_qk(*inputs[j]), expected[j]):
                    assert torch.equal(a, b)
                q, k = inputs[j][0].clone(), inputs[j][1].clone()
                assert torch.equal(tilefuse.rope_qk_(q, k, cos, sin)[0], expected[j][0])

        before = repeated(tilefuse.rope_qk)
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(work, i) for i in range(8)]
            start.wait()
            for _ in range(20):
                backends.forget()
            for one in running:
                one.result()
        assert repeated(tilefuse.rope_qk) > before
