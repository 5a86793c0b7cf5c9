"""Every tensor argument of every op: another device, another dtype, a gradient that would be lost."""

import functools
import inspect
import re

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import tilefuse
from tilefuse.testing import assert_bit_equal, samples

OPS = tilefuse.ops()


def tensor_arguments():
    """(op, argument, position among the op's tensors)."""
    for name in sorted(OPS):
        schema = getattr(torch.ops.tilefuse, name).default._schema
        found = [a.name for a in schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
        yield from ((name, argument, i) for i, argument in enumerate(found))


CASES = list(tensor_arguments())
IDS = [f"{name}-{argument}" for name, argument, _ in CASES]


@functools.cache
def samples_of(name):
    return tuple(samples(name))


def bound(name, argument):
    """The arguments of the first sample that has this one."""
    signature = inspect.signature(OPS[name].function)
    for sample in samples_of(name):
        call = signature.bind(*sample.args, **sample.kwargs)
        if isinstance(call.arguments.get(argument), Tensor):
            return call
    pytest.fail(f"no sample of {name} has {argument}")


@pytest.mark.parametrize(("name", "argument", "position"), CASES, ids=IDS)
def test_another_device(name, argument, position):
    call = bound(name, argument)
    others = [a for a, value in call.arguments.items() if isinstance(value, Tensor) and a != argument]
    if not others:
        return
    call.arguments[argument] = call.arguments[argument].to("meta")
    # the first tensor gives the device: then it is one of the others that lies elsewhere
    named = re.escape(argument) if position else "|".join(map(re.escape, others))
    with pytest.raises(ValueError, match=rf"^tilefuse\.{name}: ({named}) must be on the device of"):
        OPS[name].function(*call.args, **call.kwargs)


@pytest.mark.parametrize(("name", "argument", "position"), CASES, ids=IDS)
def test_another_dtype(name, argument, position):
    call = bound(name, argument)
    call.arguments[argument] = torch.zeros_like(call.arguments[argument], dtype=torch.complex64)
    with pytest.raises(TypeError, match=rf"^tilefuse\.{name}: {re.escape(argument)} must be "):
        OPS[name].function(*call.args, **call.kwargs)


# documented: steers the choice only; a teacher is data
NO_GRADIENT = {
    ("moe_route", "bias"),
    ("linear_topk_distillation", "teacher_logp"),
    ("distillation", "teacher_logits"),
    ("linear_distillation", "teacher_x"),
    ("linear_distillation", "teacher_weight"),
    ("linear_distillation", "teacher_bias"),
}
SILENT = [
    (name, argument)
    for name, argument, _ in CASES
    if argument not in OPS[name].differentiable and "cache" not in argument and (name, argument) not in NO_GRADIENT
]


@pytest.mark.parametrize(("name", "argument"), SILENT, ids=[f"{n}-{a}" for n, a in SILENT])
def test_no_gradient_is_lost_silently(name, argument):
    """But for data by nature: caches, codes, integers."""
    call = bound(name, argument)
    value = call.arguments[argument]
    if not value.dtype.is_floating_point or value.dtype.itemsize == 1:
        return
    call.arguments[argument] = value.detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^tilefuse\.{name}: .*but {re.escape(argument)} requires grad"):
        OPS[name].function(*call.args, **call.kwargs)


def is_small(value):
    """Indices, masks and one value per head or column: kernels address them without strides."""
    return isinstance(value, Tensor) and (value.dim() == 1 or value.dtype in (torch.bool, torch.int32, torch.int64))


SMALL = [(name, argument) for name, argument, _ in CASES if is_small(bound(name, argument).arguments[argument])]


# one value everywhere is an error
DISTINCT = {("linear_topk_distillation", "teacher_ids")}


@pytest.mark.parametrize(("name", "argument"), SMALL, ids=[f"{n}-{a}" for n, a in SMALL])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_strides_change_nothing(name, argument, backend):
    """The same values with others between them, and one value expanded."""
    if backend not in OPS[name].backends:
        return
    if backend == "triton":
        pytest.importorskip("triton")
    call = bound(name, argument)
    value = call.arguments[argument].detach()
    constant = value.flatten()[:1].expand(value.numel()).view(value.shape) if value.numel() else value
    pairs = [(value, value.new_ones(*value.shape, 2)[..., 0].copy_(value)), (constant.contiguous(), constant)]
    for plain, view in pairs[:1] if (name, argument) in DISTINCT else pairs:
        results = []
        for given in (plain, view):
            fresh = tree_map_only(Tensor, torch.clone, {a: v for a, v in call.arguments.items() if a != argument})
            with tilefuse.backend(backend), torch.no_grad():
                out = OPS[name].function(**fresh, **{argument: given})
            # with what was written in place
            results.append([x for x in tree_leaves((out, fresh)) if isinstance(x, Tensor)])
        for a, b in zip(*results):
            assert_bit_equal(a, b)


def is_written(name, argument):
    schema = getattr(torch.ops.tilefuse, name).default._schema
    return any(a.name == argument and a.alias_info is not None for a in schema.arguments)


FLOATS = [
    (name, argument)
    for name, argument, _ in CASES
    if bound(name, argument).arguments[argument].dtype in (torch.float32, torch.bfloat16)
    and not is_written(name, argument)
]


@pytest.mark.parametrize(("name", "argument"), FLOATS, ids=[f"{n}-{a}" for n, a in FLOATS])
def test_zeros_without_memory_are_zeros(name, argument):
    """As forward mode makes them: the dispatcher would hand kernels one zero with strides of 0."""
    call = bound(name, argument)
    value = call.arguments[argument]
    results = []
    for zeros in (
        torch.zeros(value.shape, dtype=value.dtype),
        torch._efficientzerotensor(value.shape, dtype=value.dtype),
    ):
        fresh = tree_map_only(Tensor, torch.clone, {a: v for a, v in call.arguments.items() if a != argument})
        with torch.no_grad():
            out = OPS[name].function(**fresh, **{argument: zeros})
        results.append([x for x in tree_leaves((out, fresh)) if isinstance(x, Tensor)])
    for a, b in zip(*results):
        assert_bit_equal(a, b)
