"""Every derivative of every op is right, or refused with an error: none is dropped silently.

Right means: equal to central differences of the reference backend in float64.
"""

import functools
import inspect

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import tilefuse
from tilefuse.testing import samples

OPS = tilefuse.ops()
STEP = 1e-5
# (op, argument) with a forward-mode derivative: linear ops, and ops made of PyTorch operations
FORWARD = {
    ("grouped_matmul", "a"),
    ("grouped_matmul", "b"),
    ("grouped_matmul", "bias"),
    ("lowbit_matmul", "x"),
    ("mla_absorb_query", "q"),
    ("mla_expand_kv", "latent"),
    ("moe_apply_capacity", "weights"),
    ("moe_balance_loss", "logits"),
    ("moe_z_loss", "logits"),
    ("moe_combine", "y"),
    ("moe_combine", "weights"),
    ("moe_experts_fp8", "weights"),
    ("moe_experts", "weights"),
    ("moe_experts", "w_down"),
    ("moe_experts", "bias_down"),
    ("preference_loss", "chosen"),
    ("preference_loss", "rejected"),
    ("t5_distance_bias", "weight"),
    ("rope", "x"),
    ("rope_qk", "q"),
    ("rope_qk", "k"),
    ("sequence_logp", "logp"),
}
# several kernels make one forward pass: torch.func.grad does not reach through the first ones
NO_FUNC_GRAD = {
    ("fp8_linear", "x"),
    ("fp8_linear", "weight"),
    ("fp8_linear", "bias"),
    *(("silu_mul_fp8_linear", argument) for argument in ("gate_up", "weight", "bias")),
    *(("rms_norm_fp8_linear", argument) for argument in ("x", "norm_weight", "weight", "bias", "residual")),
}
REFUSALS = (NotImplementedError, RuntimeError)

DIFFERENTIABLE = [(name, argument) for name in sorted(OPS) for argument in OPS[name].differentiable]
# codes have no neighbours to take differences with
SMOOTH = [(name, argument) for name, argument in DIFFERENTIABLE if not name.endswith("fp8_linear")]
each = pytest.mark.parametrize(("name", "argument"), DIFFERENTIABLE, ids=lambda value: value)
each_smooth = pytest.mark.parametrize(("name", "argument"), SMOOTH, ids=lambda value: value)


@pytest.fixture(autouse=True)
def _reference():
    with tilefuse.backend("reference"):
        yield


@functools.cache
def calls_of(name, argument):
    """The calls of the samples that have this argument, as tuples that begin with their size, smallest first."""
    signature = inspect.signature(OPS[name].function)
    found = []
    for sample in samples(name):
        call = signature.bind(*sample.args, **sample.kwargs)
        value = call.arguments.get(argument)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            found.append((sum(t.numel() for t in tree_leaves(call.args) if isinstance(t, Tensor)), len(found), call))
    return sorted(found)


@functools.cache
def function_of(name, argument, at=0):
    """(function of one argument, its value): the smallest sample with that argument, or the next ones, in float64."""
    call = calls_of(name, argument)[at][-1]
    for other in OPS[name].differentiable:
        value = call.arguments.get(other)
        if isinstance(value, Tensor):
            # no poison in rows that are hidden: differences would be taken of it
            call.arguments[other] = value.detach().nan_to_num(0.0, 0.0, 0.0).double()
    value = call.arguments[argument].contiguous()

    def function(x):
        call.arguments[argument] = x
        out = OPS[name].function(*call.args, **call.kwargs)
        return tuple(o for o in tree_leaves(out) if isinstance(o, Tensor) and o.is_floating_point())

    return function, value


def difference(function, x, direction):
    """Central differences of a tuple of tensors along a direction."""
    after, before = function(x + STEP * direction), function(x - STEP * direction)
    return [torch.where(a == b, 0.0, (a - b) / (2 * STEP)) for a, b in zip(after, before)]


def assert_near(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def direction_of(x, seed=1):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def dual(function, x, direction):
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(x, direction))
        unpacked = [forward_ad.unpack_dual(o) for o in out]
        return [u.primal for u in unpacked], [u.primal * 0 if u.tangent is None else u.tangent for u in unpacked]


def func_jvp(function, x, direction):
    return torch.func.jvp(function, (x,), (direction,))


@pytest.mark.parametrize("forward_mode", [dual, func_jvp])
@each
def test_forward_mode(name, argument, forward_mode):
    function, x = function_of(name, argument)
    direction = direction_of(x)
    if (name, argument) not in FORWARD:
        with pytest.raises(NotImplementedError):
            forward_mode(function, x, direction)
        return
    out, tangents = forward_mode(function, x, direction)
    assert_near(out, function(x))
    assert_near(tangents, difference(function, x, direction))


def scalar(function):
    """A weighted sum of all outputs: its gradient needs every cotangent."""

    def total(x):
        out = function(x)
        return sum((torch.where(o.isfinite(), o, 0) * direction_of(o, 2 + i)).sum() for i, o in enumerate(out))

    return total


@each
def test_func_grad(name, argument):
    function, x = function_of(name, argument)
    total = scalar(function)
    if (name, argument) in NO_FUNC_GRAD:
        with pytest.raises(NotImplementedError, match="has no derivative"):
            torch.func.grad(total)(x)
        return
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    assert_near([torch.func.grad(total)(x)], [expected])


@each
@pytest.mark.slow
def test_compiled_func_grad(name, argument):
    compiled_func_grad(name, argument)


@pytest.mark.parametrize(("name", "argument"), [("rope", "x"), ("window_attention", "k"), ("moe_experts", "x")])
def test_compiled_func_grad_quick(name, argument):
    compiled_func_grad(name, argument)


def compiled_func_grad(name, argument):
    function, x = function_of(name, argument)
    total = scalar(function)
    compiled = torch.compile(torch.func.grad(total), backend="aot_eager")
    try:
        got = compiled(x)
    except Exception as error:
        # torch wraps errors of tracing
        assert (name, argument) in NO_FUNC_GRAD, error
        return
    finally:
        torch.compiler.reset()
    assert_near([got], [torch.func.grad(total)(x)])


@each_smooth
def test_a_second_derivative_of_a_constant_cotangent(name, argument):
    second_derivative_of_a_constant_cotangent(name, argument, 0)


@each_smooth
@pytest.mark.slow
def test_a_second_derivative_of_a_constant_cotangent_of_every_sample(name, argument):
    """Whatever the options: some choose another ``autograd.Function``."""
    if name == "moe_apply_capacity":
        pytest.skip("by weight its results jump, and central differences reach across")
    for at in range(1, len(calls_of(name, argument))):
        second_derivative_of_a_constant_cotangent(name, argument, at)


@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_a_second_derivative_of_gradients_made_in_the_forward(argument):
    found = [
        at
        for at, (*_, call) in enumerate(calls_of("linear_cross_entropy", argument))
        if call.arguments.get("recompute") is False and call.arguments.get("bias") is not None
    ]
    assert found
    for at in found:
        second_derivative_of_a_constant_cotangent("linear_cross_entropy", argument, at)


def second_derivative_of_a_constant_cotangent(name, argument, at):
    """The gradient penalty: what the gradient depends on is the saved tensors alone."""
    function, x = function_of(name, argument, at)
    total = scalar(function)

    def gradient(x, create_graph=False):
        leaf = x if create_graph else x.detach().requires_grad_()
        return torch.autograd.grad(total(leaf), leaf, create_graph=create_graph)

    leaf = x.clone().requires_grad_()
    (first,) = gradient(leaf, create_graph=True)
    direction = direction_of(x, 3)
    expected = difference(gradient, x, direction)[0]
    if not first.requires_grad:
        assert_near([expected], [torch.zeros_like(expected)])
        return
    try:
        (second,) = torch.autograd.grad(first, leaf, direction, allow_unused=True)
    except NotImplementedError as error:
        assert str(error).startswith("tilefuse.")
        return
    # a Hessian is symmetric: its product from the left is that from the right
    assert_near([torch.zeros_like(x) if second is None else second], [expected])


@pytest.mark.parametrize("name", sorted({name for name, _ in SMOOTH if len(OPS[name].differentiable) > 1}))
def test_a_mixed_second_derivative(name):
    """A gradient in one argument depends on the others, and a derivative in one of those does not pass the rest."""
    arguments = OPS[name].differentiable
    signature = inspect.signature(OPS[name].function)
    calls = [signature.bind(*sample.args, **sample.kwargs).arguments for sample in samples(name)]

    def tensors_of(call):
        return {a: call[a] for a in arguments if isinstance(call.get(a), Tensor) and call[a].numel()}

    call = min(calls, key=lambda call: (-len(tensors_of(call)), sum(t.numel() for t in tensors_of(call).values())))
    values = {a: t.detach().nan_to_num(0.0, 0.0, 0.0).double() for a, t in tensors_of(call).items()}

    def gradients(values, create_graph=False):
        out = OPS[name].function(**(call | values))
        results = tuple(o for o in tree_leaves(out) if isinstance(o, Tensor) and o.is_floating_point())
        return torch.autograd.grad(scalar(lambda x: results)(None), list(values.values()), create_graph=create_graph)

    leaves = {a: t.clone().requires_grad_() for a, t in values.items()}
    found = gradients(leaves, create_graph=True)
    for argument, leaf in leaves.items():
        direction = direction_of(leaf.detach(), 3)
        after, before = (
            gradients(leaves | {argument: (values[argument] + step * direction).requires_grad_()})
            for step in (STEP, -STEP)
        )
        for first, a, b in zip(found, after, before):
            expected = (torch.where(a == b, 0.0, (a - b) / (2 * STEP)) * direction_of(a, 5)).sum()
            got = None
            if first.requires_grad:
                try:
                    (got,) = torch.autograd.grad(
                        first, leaf, direction_of(first.detach(), 5), allow_unused=True, retain_graph=True
                    )
                except NotImplementedError as error:
                    assert str(error).startswith("tilefuse.")
                    continue
            got = expected * 0 if got is None else (got * direction).sum()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=f"d({argument})")


@each_smooth
def test_nested_func_grad(name, argument):
    function, x = function_of(name, argument)
    gradient = torch.func.grad(scalar(function))
    try:
        second = torch.func.grad(lambda x: (gradient(x) * direction_of(x, 3)).sum())(x)
    except NotImplementedError as error:
        assert str(error).startswith("tilefuse.")
        return
    assert_near([second], difference(lambda x: (gradient(x),), x, direction_of(x, 3)))


@each
def test_vmap(name, argument):
    function, x = function_of(name, argument)
    batch = torch.stack([x, x + direction_of(x)])
    try:
        got = torch.func.vmap(function)(batch)
    except REFUSALS:
        return
    for i, one in enumerate(batch):
        assert_near([o[i] for o in got], function(one))


WITHOUT = [name for name in sorted(OPS) if OPS[name].kernels and not OPS[name].differentiable]


@pytest.mark.parametrize("name", WITHOUT)
def test_ops_without_gradient_refuse_a_tangent(name):
    """Of every float argument but for data by nature: codes of one byte, caches."""
    names = [*inspect.signature(OPS[name].function).parameters]
    sample = next(s for s in samples(name) if any(t.numel() for t in s.args if isinstance(t, Tensor)))
    for i, value in enumerate(sample.args):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype.itemsize == 1:
            continue
        if "cache" in names[i] or (name, names[i]) in FORWARD:
            continue
        with forward_ad.dual_level():
            args = list(sample.args)
            args[i] = forward_ad.make_dual(value.clone(), torch.ones_like(value))
            with pytest.raises(NotImplementedError):
                OPS[name].function(*args, **sample.kwargs)
                pytest.fail(f"{name} dropped the tangent of {names[i]}")


TWICE = {
    "qk_norm_rope": lambda q, w, *tables: tilefuse.qk_norm_rope(q, q, w, w, *tables),
    "window_attention": lambda q, w, *_: tilefuse.window_attention(q, q * w, v=q),
    "add_rms_norm": lambda q, w, *_: tilefuse.add_rms_norm(q, q, w),
    "gated_activation": lambda q, w, *_: tilefuse.gated_activation(q * w, up=q) * tilefuse.gated_activation(q, q),
    "torch.ops": lambda q, w, *_: torch.ops.tilefuse.rms_norm_gated(q, q, w),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_tensor_given_twice_compiles(name):
    """``torch.compile`` refuses an ``autograd.Function`` one tensor in two places."""

    def total(*tensors):
        return sum(out.square().sum() for out in tree_leaves(TWICE[name](*tensors)))

    leaves = [direction_of(torch.empty(shape), 7).requires_grad_() for shape in ((2, 6, 2, 8), (8,))]
    tables = tilefuse.rope_tables(8, 16)
    expected = torch.autograd.grad(total(*leaves, *tables), leaves, allow_unused=True)
    try:
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves, *tables), leaves, allow_unused=True)
    finally:
        torch.compiler.reset()
    assert_near(got, expected)
