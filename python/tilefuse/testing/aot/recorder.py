"""Records what a call launches, on a machine without a GPU: as Triton's launcher would specialise it for a target."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from ... import arch, library
from .cases import AotCase


@dataclass(frozen=True)
class Launch:
    """One launch: what ``triton.compile`` takes, and what was passed."""

    source: Any
    target: Any
    options: Any
    args: tuple[Any, ...] = field(repr=False)
    keywords: Mapping[str, Any] = field(repr=False)

    @property
    def kernel(self) -> Any:
        return self.source.fn

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @functools.cached_property
    def key(self) -> str:
        """Triton's key of the binary, but for the environment; equal for launches that share one."""
        import triton
        from triton.compiler import make_backend

        parts = (self.source.hash(), make_backend(self.target).hash(), self.options.hash(), triton.__version__)
        return hashlib.sha256("-".join(parts).encode()).hexdigest()

    def compile(self) -> Any:
        """Compiles, or takes the binary from Triton's cache, as the launch would."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


@functools.cache
def gpu_target(name: str) -> Any:
    """Triton's description of a compile target."""
    from triton.backends.compiler import GPUTarget

    capability = arch.capability(name)
    return GPUTarget("cuda", capability, 32) if capability else GPUTarget("hip", name, 64)


@functools.cache
def _binder(kernel: Any, target: str) -> tuple[Any, Any]:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(gpu_target(target))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialized(kernel: Any, target: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Launch:
    """What ``JITFunction.run`` would compile for these arguments."""
    from triton import knobs
    from triton.compiler import ASTSource

    keywords = {
        **keywords,
        "debug": keywords.get("debug", kernel.debug) or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    backend, bind = _binder(kernel, target)
    bound, specialization, options = bind(*args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return Launch(source, gpu_target(target), options, args, keywords)


def _on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The same layout on the fake GPU: autograd without a GPU runs on the CPU only."""
    if x.device.type == "cuda":
        return x
    size = x.storage_offset() + x.untyped_storage().nbytes() // x.element_size()
    return torch.empty(size, dtype=x.dtype, device="cuda").as_strided(x.shape, x.stride(), x.storage_offset())


def _address(x: torch.Tensor) -> int:
    # allocations are aligned, views keep their offset
    return int(x.storage_offset() * x.element_size())


def _item(x: torch.Tensor, index: Any) -> torch.Tensor:
    """``x[index]`` in the layout that a CPU tensor gives it."""

    def twin(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

    if x.device.type != "cuda":
        return torch.Tensor.__getitem__(x, index)
    base = twin(x)
    out = torch.Tensor.__getitem__(base, tree_map_only(torch.Tensor, twin, index))
    if out.untyped_storage()._cdata != base.untyped_storage()._cdata:
        return torch.empty(out.shape, dtype=out.dtype, device=x.device)
    return x.as_strided(out.shape, out.stride(), x.storage_offset() + out.storage_offset())


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


# methods that switch to the tensor's device, which PyTorch without CUDA cannot; and addresses, which fakes do not have
_FAKED = {
    "data_ptr": _address,
    "contiguous": _contiguous,
    "__getitem__": _item,
    "__setitem__": lambda *_: None,
    "__invert__": lambda x: torch.bitwise_not(x),
}


def record(case: AotCase, target: str, module: str) -> list[Launch]:
    """The launches of a case on a GPU of ``target``, each binary once.

    Args:
        case: its public ops are traced first, then the launchers of their kernels run on fake tensors.
        target: one of ``arch.COMPILE_TARGETS``.
        module: path of an op; kernels of other ops that the call runs are recorded by cases of theirs.
    """
    from triton.runtime.jit import JITFunction

    from ...triton_kernels.common import tuned  # pyright: ignore[reportMissingImports]

    found: dict[str, Launch] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launch = specialized(kernel, target, args, keywords)
        found.setdefault(launch.key, launch)

    with (
        arch.pretend(target),
        FakeTensorMode(),
        library.tracing() as calls,
        # nothing is measured on a GPU that is not there
        tuned.session(),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.multiple(FakeTensor, **_FAKED),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        case.run()
        for kernel, args in calls:
            if kernel.module == module:
                launcher, missing = kernel.implementation("triton")
                if launcher is None:
                    raise ValueError(f"aot case {case.name}: {kernel.name} has no launcher ({missing})")
                launcher(*tree_map_only(torch.Tensor, _on_gpu, args))
    return list(found.values())
