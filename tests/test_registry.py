"""Every op has all its layers, and keeps torch's and this package's contracts on its sample inputs."""

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import tilefuse
from tilefuse import direct, library, native
from tilefuse.testing import assert_bit_equal, poisoned, samples

ROOT = Path(__file__).resolve().parent.parent
OPS = tilefuse.ops()
KERNELS = library.kernels()
MODULES = sorted({op.module for op in OPS.values()})
# opcheck costs about a second per call: `make test-full` takes every sample
QUICK_SAMPLES = 1
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

each_op = pytest.mark.parametrize("name", sorted(OPS))
each_kernel = pytest.mark.parametrize("name", sorted(KERNELS))
each_module = pytest.mark.parametrize("module", MODULES)


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def copied(values):
    """The same arguments in new memory, with the same strides (overlapping ones too) and requires_grad."""

    def copy(t):
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0
        memory = t.detach().as_strided((extent,), (1,)).clone()
        return memory.as_strided(t.shape, t.stride()).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, copy, values)


def source_of(kernel, backend):
    """The file that holds a kernel's implementation, relative to the checkout."""
    # a kernel for one generation of GPUs carries its name, as in csrc/fp8/matmul_sm90.cu
    one_generation = sorted((ROOT / "csrc").glob(f"{kernel.module}_sm*.cu"))
    return {
        "reference": f"python/tilefuse/reference/{kernel.module}.py",
        "cpu": f"csrc/{kernel.module}_cpu.cpp",
        "triton": f"triton_kernels/{kernel.module}.py",
        "cuda": str(one_generation[0].relative_to(ROOT)) if one_generation else f"csrc/{kernel.module}.cu",
    }[backend]


def defined_functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_package_imports_what_its_modules_name():
    public = {"PackedWeight", "__version__", "backend", "explain", "nn", "ops", "pack_weight"}
    for path in (ROOT / "python/tilefuse/ops").glob("*/*.py"):
        if path.stem != "__init__":
            module = importlib.import_module(f"tilefuse.ops.{path.parent.name}.{path.stem}")
            for name in module.__all__:
                assert getattr(tilefuse, name, None) is getattr(module, name), f"tilefuse/__init__.py lacks {name}"
            public |= {*module.__all__}
    assert sorted(tilefuse.__all__) == sorted(public)
    assert OPS and KERNELS and set(OPS) < public


@each_module
def test_a_module_has_its_file_in_every_layer(module):
    kernels = {k for op in OPS.values() if op.module == module for k in op.kernels}
    wanted = {f"python/tilefuse/{layer}/{module}.py" for layer in ("ops", "testing/inputs")}
    wanted |= {f"benchmarks/{module}.py"}
    family, op = module.split("/")
    wanted |= {f"tests/{family}/test_{op}.py"}
    for kernel in (KERNELS[k] for k in kernels):
        wanted |= {source_of(kernel, backend) for backend in kernel.backends}
        if "cuda" in kernel.backends:
            wanted.add(f"{source_of(kernel, 'cuda')}h")
    missing = sorted(path for path in wanted if not (ROOT / path).exists())
    assert not missing, f"{module} lacks {', '.join(missing)}"


@each_module
def test_a_module_has_benchmark_cases(module):
    assert "cases" in defined_functions(ROOT / f"benchmarks/{module}.py")


@each_kernel
def test_a_kernel_has_its_implementations(name):
    kernel = KERNELS[name]
    assert "reference" in kernel.backends
    for backend in kernel.backends:
        source = source_of(kernel, backend)
        assert (ROOT / source).exists(), f"{name} lacks {source}"
        if backend in ("reference", "triton"):
            # without importing it: Triton may be missing
            assert name in defined_functions(ROOT / source), f"{source} has no function {name}"
            continue
        assert f'"{name}"' in (ROOT / source).read_text(), f"{source} does not register {name}"
        if native.load(backend).missing is None:
            found, reason = native.find(backend, kernel.schema)
            assert found is not None, reason


@each_kernel
def test_a_kernel_belongs_to_an_op(name):
    assert any(name in op.kernels for op in OPS.values())


@each_kernel
def test_a_kernel_has_no_defaults(name):
    schema = getattr(torch.ops.tilefuse, name).default._schema
    assert not any(a.has_default_value() for a in schema.arguments)


@each_op
def test_an_op_is_described(name):
    op = OPS[name]
    assert op.function.__name__ == name
    assert getattr(tilefuse, name) is op.function
    assert set(op.kernels) <= set(KERNELS)
    assert "reference" in op.backends
    doc = inspect.getdoc(op.function)
    assert doc and len(doc.splitlines()) > 3
    refers = any(f"``{other}``" in doc for other in OPS if other != name)
    for parameter in inspect.signature(op.function).parameters:
        assert parameter in doc or refers, f"{parameter} is not in the docstring of {name}"
    assert set(op.differentiable) <= set(inspect.signature(op.function).parameters)


@each_op
def test_tensors_come_first_and_are_positional(name):
    schema = getattr(torch.ops.tilefuse, name).default._schema
    kinds = ["Tensor" in str(a.type) for a in schema.arguments]
    assert kinds == sorted(kinds, reverse=True)
    assert not any(a.kwarg_only for a, is_tensor in zip(schema.arguments, kinds) if is_tensor)


@functools.cache
def samples_of(name):
    return tuple(samples(name))


@each_op
def test_an_op_has_samples(name):
    found = samples_of(name)
    assert found
    for sample in found:
        inspect.signature(OPS[name].function).bind(*sample.args, **sample.kwargs)


def call(name, args, kwargs):
    """Runs an op on copies: (outputs, arguments after the call)."""
    args, kwargs = copied((args, kwargs))
    out = getattr(tilefuse, name)(*args, **kwargs)
    return tree_map_only(Tensor, torch.Tensor.detach, out), tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))


@each_op
def test_two_runs_are_bit_equal_and_every_element_is_written(name):
    for sample in samples_of(name):
        first = tensors(call(name, sample.args, sample.kwargs))
        with poisoned():
            second = tensors(call(name, sample.args, sample.kwargs))
        assert len(first) == len(second)
        for a, b in zip(first, second):
            assert_bit_equal(a, b, name=f"{sample!r}")


@each_op
@torch.no_grad()
def test_repeated_calls_have_the_functions_bits(name):
    op = OPS[name]
    if op.not_repeated is not None:
        assert op.not_repeated.strip() and not hasattr(op.function, "replay")
        return
    if direct.load().missing or native.load("cpu").missing:
        pytest.skip(direct.load().missing or native.load("cpu").missing)
    assert op.function is getattr(tilefuse, name)
    tilefuse.backends.forget()
    for sample in samples_of(name):
        args, kwargs = copied((sample.args, sample.kwargs))
        expected = op.function.__wrapped__(*args, **kwargs), args
        for _ in range(4):
            args, kwargs = copied((sample.args, sample.kwargs))
            out = op.function(*args, **kwargs), args
            for a, b in zip(tensors(out), tensors(expected), strict=True):
                assert a.stride() == b.stride()
                assert_bit_equal(a, b, name=f"{sample!r}")
    _, planned, repeated = op.function.replay.counts()
    # the decorator's `not_repeated` says what an op does beyond the checks and one kernel
    assert planned > 0 and repeated > 0, f"{name}: no call is repeated"


@each_op
def test_the_registered_op_is_the_function(name):
    op = getattr(torch.ops.tilefuse, name)
    sample = samples_of(name)[0]
    expected, after = call(name, sample.args, sample.kwargs)
    args, kwargs = copied((sample.args, sample.kwargs))
    out = op(*args, **kwargs)
    if op.default._schema.returns:
        for a, b in zip(tensors(expected), tensors(out), strict=True):
            assert_bit_equal(a, b.detach())
    for a, b in zip(tensors(after), tensors((args, kwargs)), strict=True):
        assert_bit_equal(a, b.detach())


@each_op
def test_arguments_are_left_alone_unless_the_schema_says_so(name):
    schema = getattr(torch.ops.tilefuse, name).default._schema
    written = {schema.arguments[i].name for i in library.mutated_arguments(str(schema))}
    signature = inspect.signature(OPS[name].function)
    for sample in samples_of(name):
        _, (args, kwargs) = call(name, sample.args, sample.kwargs)
        before = signature.bind(*sample.args, **sample.kwargs).arguments
        for argument, value in signature.bind(*args, **kwargs).arguments.items():
            if isinstance(value, Tensor) and argument not in written:
                assert_bit_equal(before[argument].detach(), value, name=f"{argument} before and after")


def layout(values):
    return [(tuple(t.shape), t.dtype, t.device.type, tuple(t.stride()) if t.numel() else None) for t in tensors(values)]


@each_op
def test_fake_tensors_have_the_real_layout(name):
    for sample in samples_of(name):
        real, _ = call(name, sample.args, sample.kwargs)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, kwargs = tree_map_only(Tensor, mode.from_tensor, copied((sample.args, sample.kwargs)))
            fake = getattr(tilefuse, name)(*args, **kwargs)
        assert layout(fake) == layout(real), repr(sample)


def opcheck(op, args, kwargs, out):
    checks = OPCHECKS
    if any(t.dtype in FP8 for t in tensors((args, kwargs, out))) or "fp8" in op._schema.name:
        # test_schema compares tensors, those inside of a composite op too, with an operation that FP8 lacks
        checks = tuple(c for c in checks if c != "test_schema")
    torch.library.opcheck(op, args, kwargs, test_utils=checks)


def with_gradients(name, sample):
    """The arguments of a call in which every differentiable one requires a gradient."""
    bound = inspect.signature(OPS[name].function).bind(*sample.args, **sample.kwargs)
    for argument in OPS[name].differentiable:
        value = bound.arguments.get(argument)
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            bound.arguments[argument] = value.detach().requires_grad_()
    return copied((bound.args, bound.kwargs))


def opcheck_op(name, chosen):
    for sample in chosen:
        out, _ = call(name, sample.args, sample.kwargs)
        # opcheck adds up all outputs in the dtype of the first
        sums = tensors(out)[:1] and tensors(out)[0].is_floating_point()
        args, kwargs = with_gradients(name, sample) if sums else copied((sample.args, dict(sample.kwargs)))
        opcheck(getattr(torch.ops.tilefuse, name).default, args, kwargs, out)


def by_size(name):
    return sorted(samples_of(name), key=lambda s: sum(t.numel() for t in tensors((s.args, s.kwargs))))


@each_op
def test_opcheck(name):
    opcheck_op(name, by_size(name)[-QUICK_SAMPLES:])


@pytest.mark.slow
@each_op
def test_opcheck_every_sample(name):
    opcheck_op(name, samples_of(name))


@each_op
def test_opcheck_of_the_kernels(name, monkeypatch):
    """The kernel ops that forward and backward of one sample call, on the arguments they get."""
    recorded = {}
    find = library.Kernel.implementation

    def recording(kernel, backend):
        run, reason = find(kernel, backend)

        def record(*args):
            first = kernel.name not in recorded
            if first:
                recorded[kernel.name] = copied(tree_map_only(Tensor, torch.Tensor.detach, args))
            out = run(*args)
            if first:
                recorded[kernel.name] = recorded[kernel.name], out
            return out

        return run and record, reason

    monkeypatch.setattr(library.Kernel, "implementation", recording)
    # kernels keep what they found
    tilefuse.backends.forget()
    differentiable = OPS[name].differentiable
    args, kwargs = with_gradients(name, by_size(name)[-1])
    out = getattr(tilefuse, name)(*args, **kwargs)
    leaves = [t for t in tensors(out) if t.requires_grad]
    assert bool(leaves) == bool(differentiable), "an output must require grad if, and only if, the op says so"
    if leaves:
        torch.autograd.backward(leaves, [torch.randn_like(t) for t in leaves])
    monkeypatch.undo()
    tilefuse.backends.forget()
    # an op made of PyTorch operations has no kernels
    assert recorded or not OPS[name].kernels
    for kernel, (args, result) in recorded.items():
        opcheck(getattr(torch.ops.tilefuse, kernel).default, copied(args), {}, result)
