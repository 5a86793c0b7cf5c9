"""The library core, on a toy op that is defined here and taken out of the registry again."""

import sys
import threading
import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import tilefuse
from tilefuse import backends, errors, library

calls = []


def run_double(x, factor):
    calls.append(("reference", torch.is_autocast_enabled("cpu")))
    return x * 2 * factor


def run_bump(x, y):
    x.detach().numpy()[...] += 1
    return y + 1


def run_fussy(x):
    messages = (
        "device on fire",
        "tilefuse.toy_fussy: CUDA launch failed",
        "tilefuse.toy_fussy: x must be nice, got ugly",
    )
    raise RuntimeError(messages[x.numel()])


@pytest.fixture(scope="module")
def toy():
    """Kernel ops toy_double, toy_bump (mutates x), toy_fussy and the public op toy_twice."""
    kernels, ops = dict(library._kernels), dict(library._ops)
    module = types.ModuleType("tilefuse.reference.toys.toy")
    module.toy_double, module.toy_bump, module.toy_fussy = run_double, run_bump, run_fussy
    sys.modules["tilefuse.reference.toys"] = types.ModuleType("tilefuse.reference.toys")
    sys.modules[module.__name__] = module

    def fake_double(x, factor):
        return x.new_empty(x.shape)

    double = library.kernel(
        "toy_double(Tensor x, float factor) -> Tensor",
        module="toys/toy",
        fake=fake_double,
        backends=("reference", "cpu"),
        when={"reference": lambda x, factor: "factor is negative" if factor < 0 else None},
    )
    bump = library.kernel(
        "toy_bump(Tensor(a!) x, Tensor y) -> Tensor",
        module="toys/toy",
        fake=lambda x, y: y.new_empty(y.shape),
        backends=("reference",),
    )
    fussy = library.kernel(
        "toy_fussy(Tensor x) -> Tensor", module="toys/toy", fake=lambda x: x.new_empty(x.shape), backends=("reference",)
    )

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return double(x, factor)

        @staticmethod
        def backward(ctx, grad):
            return double(grad, ctx.factor), None

    @library.op(module="toys/toy", kernels=("toy_double",), differentiable=("x",))
    def toy_twice(x: Tensor, *, factor: float = 1.0) -> Tensor:
        """Two times factor times x."""
        if x.dim() == 0:
            errors.value_error("toy_twice", "x", "of at least one dim", x)
        return Twice.apply(x, factor) if errors.needs_grad(x) else double(x, factor)

    yield types.SimpleNamespace(double=double, bump=bump, fussy=fussy, twice=toy_twice)
    for mine in set(library._kernels) - set(kernels):
        del library._kernels[mine]
    for mine in set(library._ops) - set(ops):
        del library._ops[mine]


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


def test_both_ways_to_call(toy):
    x = torch.randn(3)
    assert torch.equal(toy.twice(x, factor=2.0), 4 * x)
    assert torch.equal(torch.ops.tilefuse.toy_twice(x, factor=2.0), 4 * x)
    assert torch.equal(torch.ops.tilefuse.toy_double(x, 2.0), 4 * x)
    assert torch.equal(torch.ops.tilefuse.toy_twice(x), 2 * x)


def test_record(toy):
    record = tilefuse.ops()["toy_twice"]
    assert (record.family, record.module, record.kernels) == ("toys", "toys/toy", ("toy_double",))
    assert record.differentiable == ("x",)
    # the C++ backend is declared for the kernel
    assert record.backends == ("reference", "cpu")
    assert dict(record.architectures) == {}
    with pytest.raises(TypeError):
        tilefuse.ops()["other"] = record


def test_opcheck_and_gradients(toy):
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.tilefuse.toy_twice.default, (x,), {"factor": 3.0})
    torch.library.opcheck(torch.ops.tilefuse.toy_double.default, (x.detach(), 3.0))
    torch.library.opcheck(torch.ops.tilefuse.toy_bump.default, (torch.randn(3), torch.randn(3)))
    x = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(toy.twice, (x,))
    assert torch.autograd.gradgradcheck(toy.twice, (x,))


def test_compile_and_export_keep_the_kernel_as_one_node(toy):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: toy.twice(x, factor=2.0) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), 4 * x + 1)
    assert torch.ops.tilefuse.toy_double.default in {n.target for n in graphs[0].graph.nodes}

    class Module(torch.nn.Module):
        def forward(self, x):
            return toy.twice(x)

    exported = torch.export.export(Module(), (x,))
    assert torch.ops.tilefuse.toy_double.default in {n.target for n in exported.graph.nodes}
    assert torch.equal(exported.module()(x), 2 * x)


def test_backward_compiles(toy):
    x = torch.randn(3, requires_grad=True)
    torch.compile(lambda x: toy.twice(x, factor=2.0).sum(), fullgraph=True, backend="aot_eager")(x).backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))


def test_plain_calls_skip_the_dispatcher_and_all_others_do_not(toy, monkeypatch):
    x = torch.randn(3)
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        toy.double(x, 1.0)
    assert torch.ops.tilefuse.toy_double.default in seen
    with torch.profiler.profile() as profile:
        toy.double(x, 1.0)
    assert "tilefuse::toy_double" in {e.name for e in profile.events()}
    with torch._subclasses.FakeTensorMode() as mode:
        out = toy.double(mode.from_tensor(x), 1.0)
        assert isinstance(out, torch._subclasses.FakeTensor)
    assert toy.double(torch.empty(3, device="meta"), 1.0).device.type == "meta"


def test_a_meta_tensor_runs_the_fake_and_no_kernel(toy):
    # its device index is that of the CPU: it must not meet, or leave, a choice of the CPU's
    for _ in range(2):
        assert toy.double(torch.empty(3, device="meta"), 1.0).device.type == "meta"
        assert calls == []
        toy.double(torch.randn(3), 1.0)
        assert len(calls) == 1
        calls.clear()


def test_fakes_check_arguments_like_the_function(toy):
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r"tilefuse.toy_twice: x must be of at least one dim, got \[\] float32"):
            toy.twice(torch.zeros((), device=device))


def test_forced_backend_never_falls_back(toy):
    x = torch.randn(3)
    for name in ("cpu", "triton", "cuda"):
        with (
            tilefuse.backend(name),
            pytest.raises(NotImplementedError, match=r"tilefuse.toy_double: no backend for cpu \(cpu\): ") as caught,
        ):
            toy.twice(x)
        if name == "cpu":
            assert "cpu: _cpu.abi3.so" in str(caught.value)
    # auto falls back
    assert torch.equal(toy.twice(x), 2 * x)


def test_when_refuses_with_a_reason(toy):
    with pytest.raises(NotImplementedError, match="reference: factor is negative"):
        toy.double(torch.randn(3), -1.0)


def test_value_errors_of_native_kernels(toy):
    with pytest.raises(ValueError, match=r"tilefuse.toy_fussy: x must be nice, got ugly"):
        toy.fussy(torch.randn(2))
    for i, message in enumerate(("device on fire", "CUDA launch failed")):
        with pytest.raises(RuntimeError, match=message):
            toy.fussy(torch.randn(i))


def test_the_schema_of_a_signature():
    def everything(
        x: Tensor,
        y: Tensor | None = None,
        *,
        needed: int,
        sizes: Sequence[int] = (1, -1),
        none: Sequence[int] = (),
        size: int = 3,
        flag: bool = True,
        factor: float = 1e-12,
        scale: float | None = None,
        kind: str = "it's",
        dtype: torch.dtype = torch.float8_e4m3fn,
        other: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def in_place_(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]: ...

    def write(x: Tensor, cache: Tensor) -> None: ...

    schema = library.signature_schema(everything)
    assert schema == (
        "everything(Tensor x, Tensor? y=None, *, SymInt needed, SymInt[] sizes=[1, -1], SymInt[] none=[], "
        'SymInt size=3, bool flag=True, float factor=1e-12, float? scale=None, str kind="it\'s", '
        "ScalarType dtype=float8_e4m3fn, ScalarType? other=None) -> (Tensor, Tensor)"
    )
    defaults = {a.name: a.default_value for a in torch._C.parse_schema(schema).arguments if a.has_default_value()}
    assert defaults["sizes"] == [1, -1] and defaults["kind"] == "it's" and defaults["factor"] == 1e-12
    assert library.signature_schema(in_place_, ("x", "y")) == "in_place_(Tensor(a!) x, Tensor(b!) y, SymInt n) -> ()"
    assert library.signature_schema(write, ("cache",)) == "write(Tensor x, Tensor(a!) cache) -> ()"


def test_mutated_arguments():
    assert library.mutated_arguments("f(Tensor x, Tensor(a!) y, Tensor(b!)? z) -> ()") == (1, 2)
    assert library.mutated_arguments("f(Tensor x) -> Tensor") == ()


def test_mutation_is_seen_by_autograd(toy):
    x = torch.randn(3)
    version = x._version
    toy.bump(x, torch.randn(3))
    assert x._version == version + 1
    w = torch.randn(3, requires_grad=True)
    product = w * x
    torch.ops.tilefuse.toy_bump(x, torch.randn(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        toy.bump(torch.randn(3), torch.randn(3))


def test_kernels_run_with_autocast_off(toy):
    x = torch.randn(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        toy.twice(x)
        torch.ops.tilefuse.toy_double(x, 1.0)
        assert torch.is_autocast_enabled("cpu")
    assert calls == [("reference", False)] * 2


def test_autocast_helper():
    x, w, ids = torch.randn(3, requires_grad=True), torch.randn(3).half(), torch.arange(3)
    assert library.autocast(x, None, ids) == (x, None, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b, c, none, d = library.autocast(x, w, ids, None, torch.randn(3, dtype=torch.float64))
    assert (a.dtype, b.dtype, c.dtype, none, d.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.int64,
        None,
        torch.float64,
    )
    a.sum().backward()
    assert x.grad.dtype is torch.float32


def test_explain(toy):
    x = torch.randn(3)
    answer = tilefuse.explain("toy_twice", x, factor=2.0)
    assert answer["toy_double"]["reference"] == "runs"
    assert "_cpu.abi3.so" in answer["toy_double"]["cpu"]
    assert calls == []
    assert tilefuse.explain("toy_twice", x, factor=-1.0)["toy_double"]["reference"] == "factor is negative"
    assert tilefuse.explain("toy_twice", x.clone().requires_grad_())["toy_double"]["reference"] == "runs"
    with tilefuse.backend("cpu"):
        assert tilefuse.explain("toy_twice", x)["toy_double"]["reference"] == "backend 'cpu' is forced"
    with pytest.raises(ValueError, match=r"tilefuse.explain: op_name must be one of \[.*toy_twice.*\], got 'none'"):
        tilefuse.explain("none")
    with pytest.raises(ValueError, match="at least one dim"):
        tilefuse.explain("toy_twice", torch.zeros(()))


def test_explain_is_not_disturbed_by_other_threads(toy):
    with library.tracing() as mine:
        other = []

        def explain():
            other.append(tilefuse.explain("toy_twice", torch.randn(3)))

        thread = threading.Thread(target=explain)
        thread.start()
        thread.join()
    assert mine == [] and "toy_double" in other[0]


def test_threads_that_change_the_setting_see_a_valid_choice(toy):
    x = torch.randn(3)
    failures = []

    def work(name):
        for _ in range(100):
            with tilefuse.backend(name):
                try:
                    toy.double(x, 1.0)
                except NotImplementedError:
                    # another thread forced a backend that cannot run: an error, never a stale choice
                    continue
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "cpu", "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tilefuse.backend("auto")
    assert not failures
    assert torch.equal(toy.double(x, 1.0), 2 * x)


def test_a_refused_call_names_what_it_tried_whatever_another_thread_sets_meanwhile(toy, monkeypatch):
    entry = library.kernels()["toy_double"]
    monkeypatch.setattr(entry, "implementation", lambda b: (run_double, None))

    def refuses(x, factor):
        # once decided, the call meets a setting under which only cpu, which has no `when`, could run
        thread = threading.Thread(target=tilefuse.backend, args=("cpu",))
        thread.start()
        thread.join()
        return "factor is negative"

    monkeypatch.setitem(entry.when, "reference", refuses)
    with tilefuse.backend("reference"), pytest.raises(NotImplementedError, match="reference: factor is negative"):
        toy.double(torch.randn(3), -1.0)
    assert calls == []


def test_choice_follows_the_setting_at_once(toy, monkeypatch):
    entry = library.kernels()["toy_double"]
    real = entry.implementation
    monkeypatch.setattr(entry, "implementation", lambda b: real(b) if b == "reference" else (lambda x, f: x * 0, None))
    backends.forget()
    x = torch.ones(3)
    assert torch.equal(toy.twice(x), 0 * x)
    with tilefuse.backend("reference"):
        assert torch.equal(toy.twice(x), 2 * x)
    assert torch.equal(toy.twice(x), 0 * x)
    # float64 is not among the dtypes of compiled backends
    assert torch.equal(toy.twice(x.double()), 2 * x.double())
