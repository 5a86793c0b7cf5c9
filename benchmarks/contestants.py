"""Contestants: tilefuse and its peers, as calls to be timed and as results to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import tilefuse
from tilefuse import library

from .harness import Case, Peer

# inputs up to this size are cloned for each contestant of a check
CLONED_BYTES = 2**31


class Contestant:
    """tilefuse, or a peer, on given inputs."""

    def __init__(self, case: Case, peer: Peer, backend: str | None = None):
        self.case = case
        self.peer = peer
        self.backend = backend
        self.fn = peer.function()
        self.grads = case.grads if peer.grads is None else peer.grads

    def bind(self, inputs: tuple[Any, ...], generator: torch.Generator) -> Callable[[], Any]:
        """A call without arguments to be timed; preparation and, in mode backward, the forward happen here."""
        fn = self.fn
        args = self.peer.prepare(*inputs) if self.peer.prepare else inputs
        if self.case.mode == "forward":
            return lambda: fn(*args)
        args = require_grad(args, self.grads)
        leaves = [args[i] for i in self.grads]
        with torch.enable_grad():
            outputs = differentiable(fn(*args))
        upstream = _random_like(outputs, generator)
        if self.case.mode == "backward":
            return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

        def both() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(differentiable(fn(*args)), leaves, upstream)

        return both

    def results(self, inputs: tuple[Any, ...], upstream: Sequence[Tensor] | None) -> list[Tensor]:
        """Outputs, or gradients of the case's own inputs for the given upstream gradients, in tilefuse's layout."""
        with self.forced():
            return results_of(self._in_our_layout, inputs, self.case, upstream)

    def upstream(self, inputs: tuple[Any, ...], generator: torch.Generator) -> list[Tensor] | None:
        """Random gradients of the outputs on these inputs; None in mode forward."""
        if self.case.mode == "forward":
            return None
        with torch.enable_grad(), self.forced():
            outputs = differentiable(self.fn(*require_grad(inputs, self.case.grads)))
        return _random_like(outputs, generator)

    def _in_our_layout(self, *inputs: Any) -> Any:
        out = self.fn(*(self.peer.prepare(*inputs) if self.peer.prepare else inputs))
        return self.peer.post(out) if self.peer.post else out

    def forced(self) -> Any:
        """A context in which this contestant's backend, if it has one, is the only one."""
        return tilefuse.backend(self.backend) if self.backend else nullcontext()


def require_grad(args: tuple[Any, ...], positions: Sequence[int]) -> tuple[Any, ...]:
    return tuple(a.detach().clone().requires_grad_() if i in positions else a for i, a in enumerate(args))


def differentiable(outputs: Any) -> list[Tensor]:
    return [o for o in tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]


def _random_like(outputs: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outputs]


def results_of(
    fn: Callable[..., Any], inputs: tuple[Any, ...], case: Case, upstream: Sequence[Tensor] | None
) -> list[Tensor]:
    # an in-place op or peer must not change what the next contestant gets; for weights of a whole MoE layer there may
    # be no room for copies, and then only the ops that do mutate pay for them
    if nbytes(inputs) < CLONED_BYTES or _mutates(case.op):
        inputs = tree_map_only(Tensor, torch.clone, inputs)
    if upstream is None:
        with torch.no_grad():
            return [o for o in tree_leaves(fn(*inputs)) if isinstance(o, Tensor)]
    inputs = require_grad(inputs, case.grads)
    with torch.enable_grad():
        outputs = differentiable(fn(*inputs))
        given = [u.to(o.dtype) for o, u in zip(outputs, upstream)]
        return list(torch.autograd.grad(outputs, [inputs[i] for i in case.grads], given))


def _mutates(op_name: str) -> bool:
    op = tilefuse.ops().get(op_name)
    return op is None or "!)" in op.schema


def nbytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def kernels_of(case: Case, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Which backend runs each kernel of the call."""
    try:
        traced = _traced(case, inputs)
    except Exception:
        # data-dependent cases cannot be traced; the setting is all that is known then
        return {"*": tilefuse.backend()}
    return {k: next((b for b, why in row.items() if why == "runs"), "none") for k, row in traced.items()}


def whole_backends(case: Case, inputs: tuple[Any, ...], candidates: Sequence[str]) -> list[str]:
    """Those of the candidates that have every kernel of the call."""
    found = []
    for candidate in candidates:
        with tilefuse.backend(candidate):
            try:
                traced = _traced(case, inputs)
            except Exception:
                continue
        if traced and all(row.get(candidate) == "runs" for row in traced.values()):
            found.append(candidate)
    return found


def _traced(case: Case, inputs: tuple[Any, ...]) -> dict[str, dict[str, str]]:
    if case.prepare:
        inputs = case.prepare(*inputs)
    if case.mode == "forward":
        return library.trace_call(case.run, inputs, {})

    def backward(*args: Any) -> None:
        args = require_grad(args, case.grads)
        with torch.enable_grad():
            outputs = differentiable(case.run(*args))
            torch.autograd.grad(outputs, [args[i] for i in case.grads], [torch.ones_like(o) for o in outputs])

    return library.trace_call(backward, inputs, {})
