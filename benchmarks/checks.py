"""Checks: tilefuse against the oracle of a case, and each peer against it too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tilefuse
from tilefuse.testing import assert_bit_equal, error_report
from tilefuse.testing.verification import gradient_report

from .contestants import Contestant, results_of
from .harness import Case, Failure
from .roofline import Roof

# a peer this far from the oracle computes something else
PEER_TINY = 1e-3
# two results of the same precision differ by less, relative to their own size
FULL_SIZE = 0.05
# of one output, that are compared with the oracle
CHECKED_ELEMENTS = 2**20


@dataclass(frozen=True)
class Checked:
    """A check that tilefuse passed: what its peers are compared with.

    ``error`` holds the largest and the root mean square error of tilefuse and of the naive computation, or says
    that the bits were the oracle's.
    """

    inputs: tuple[Any, ...]
    upstream: Sequence[Tensor] | None
    expected: list[Tensor]
    error: dict[str, Any]


def _widened(case: Case, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same operands in float64; tables and weights that are float32 anyway stay as they are."""
    if case.exact and case.upcast is None:
        return inputs
    positions = case.upcast
    if positions is None:
        positions = tuple(
            i
            for i, a in enumerate(inputs)
            if isinstance(a, Tensor) and str(a.dtype).removeprefix("torch.") == case.dtype and a.dtype.itemsize > 1
        )
    return tuple(a.double() if i in positions else a for i, a in enumerate(inputs))


def _oracle(case: Case, inputs: tuple[Any, ...], upstream: Sequence[Tensor] | None) -> list[Tensor]:
    with tilefuse.backend("reference") if case.oracle is None else nullcontext():
        return results_of(case.oracle or case.run, _widened(case, inputs), case, upstream)


def check(ours: Contestant, naive: Callable[..., Any], inputs: tuple[Any, ...], generator: torch.Generator) -> Checked:
    """Compares tilefuse with the oracle of its case.

    Raises:
        Failure: it computes something else.
    """
    case = ours.case
    upstream = ours.upstream(inputs, generator)
    got = ours.results(inputs, upstream)
    expected = _oracle(case, inputs, upstream)
    if len(got) != len(expected):
        raise Failure(f"{len(got)} outputs, the oracle has {len(expected)}")
    if case.exact:
        for i, (g, e) in enumerate(zip(got, expected)):
            _same_bits(g, e, f"output {i}")
        return Checked(inputs, upstream, expected, {"exact": True})
    plain = results_of(naive, inputs, case, upstream)
    return Checked(inputs, upstream, expected, _compare(case, got, expected, plain))


def _compare(
    case: Case, got: Sequence[Tensor], expected: Sequence[Tensor], plain: Sequence[Tensor]
) -> dict[str, float]:
    """The errors of tilefuse and of the naive computation; a Failure where ours is beyond the rule."""
    error = {"max": 0.0, "rms": 0.0, "naive_max": 0.0, "naive_rms": 0.0}
    for i, (g, e) in enumerate(zip(got, expected)):
        if not g.is_floating_point() or g.dtype.itemsize == 1:
            _same_bits(g, e.to(g.dtype), f"output {i}")
            continue
        if i >= len(plain):
            raise Failure(f"the naive computation has {len(plain)} outputs, tilefuse {len(got)}: give `naive`")
        if g.shape != e.shape or plain[i].shape != e.shape:
            raise Failure(f"output {i}: shapes {[*g.shape]}, oracle {[*e.shape]}, naive {[*plain[i].shape]}")
        g, e, p = _some_rows(g, e.double(), plain[i])
        if case.mode != "forward" and case.rows:
            report = gradient_report(g, e, p)
        else:
            report = error_report(g, e, p, rows=case.rows)
        if not report:
            raise Failure(f"output {i}: {report.message}")
        for prefix, tensor in (("", g), ("naive_", p)):
            for name, value in _errors(tensor, e).items():
                error[prefix + name] = max(error[prefix + name], value)
    return error


def _same_bits(got: Tensor, expected: Tensor, name: str) -> None:
    try:
        assert_bit_equal(got, expected, name=name)
    except AssertionError as reason:
        raise Failure(f"not the oracle's bits: {reason}") from None


def _errors(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Largest and root mean square error over the elements that are finite in both; inf where only one is."""
    got, exact = got.double(), exact.double()
    if not torch.equal(got.isnan(), exact.isnan()):
        return {"max": math.inf, "rms": math.inf}
    difference = torch.where(got == exact, 0.0, got - exact)[~exact.isnan()].abs()
    if difference.numel() == 0:
        return {"max": 0.0, "rms": 0.0}
    return {"max": difference.max().item(), "rms": difference.square().mean().sqrt().item()}


def _some_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same blocks of 64 rows of each, the first and the last among them, where all rows would take seconds."""
    width = tensors[0].shape[-1] if tensors[0].dim() else 1
    if tensors[0].numel() <= CHECKED_ELEMENTS or width == 0:
        return tensors
    rows = tensors[0].numel() // width
    blocks = max(2, CHECKED_ELEMENTS // (64 * width))
    starts = torch.linspace(0, max(rows - 64, 0), blocks).long().unique()
    index = (starts[:, None] + torch.arange(64)).clamp(max=rows - 1).flatten().to(tensors[0].device)
    return tuple(t.reshape(rows, width)[index] for t in tensors)


def check_peer(peer: Contestant, checked: Checked) -> dict[str, float] | None:
    """The peer's error, or a Failure when it computes something else: then its time says nothing."""
    if peer.peer.tolerance is None or peer.peer.yardstick:
        return None
    worst = {"max": 0.0, "rms": 0.0}
    got, expected = peer.results(checked.inputs, checked.upstream), checked.expected
    if peer.peer.compared:
        got, expected = peer.peer.compared(*got), peer.peer.compared(*expected)
    for g, e in zip(got, expected):
        if not e.is_floating_point() or e.dtype.itemsize == 1:
            continue
        if g.shape != e.shape:
            raise Failure(f"its output has shape {[*g.shape]}, ours {[*e.shape]}")
        g, e = _some_rows(g, e)
        found = _errors(g, e)
        scale = _scale(e)
        naive = checked.error.get("naive_rms", 0.0) or PEER_TINY * scale
        stated = peer.peer.error
        limit = peer.peer.tolerance * naive + PEER_TINY * scale if stated is None else stated * scale
        if not found["rms"] <= limit:
            raise Failure(f"its output is another one: rms error {found['rms']:.2e}, expected below {limit:.2e}")
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


def check_full_size(
    ours: Contestant,
    naive: Callable[..., Any],
    peers: Mapping[str, Contestant],
    inputs: tuple[Any, ...],
    generator: torch.Generator,
) -> dict[str, str]:
    """At the timed size the oracle would be too slow; a plain result of the same precision still finds blunders.

    Returns why peers are not believed, by name.

    Raises:
        Failure: tilefuse computes something else.
    """
    upstream = ours.upstream(inputs, generator)
    got = ours.results(inputs, upstream)
    try:
        plain = results_of(naive, inputs, ours.case, upstream)
    except (RuntimeError, MemoryError):
        # no room for the naive computation at this size, which is why the op exists
        plain = got
    if reason := _apart(got, plain):
        raise Failure(f"at full size, against the naive result: {reason}")
    apart = {name: _apart(peer.results(inputs, upstream), plain) for name, peer in peers.items()}
    return {name: f"its output is another one: {reason}" for name, reason in apart.items() if reason}


def check_first_call(peer: Contestant, out: Any, ours: Any) -> None:
    """A library's first call at the timed size against ours: it may take another path than at the oracle's size.

    Raises:
        Failure: it computes something else.
    """
    if peer.peer.tolerance is None or peer.peer.yardstick:
        return
    got, plain = (tree_leaves(value) for value in (peer.peer.post(out) if peer.peer.post else out, ours))
    if peer.peer.compared:
        got, plain = peer.peer.compared(*got), peer.peer.compared(*plain)
    if reason := _apart(got, plain, max(FULL_SIZE, peer.peer.error or 0.0)):
        raise Failure(f"its output is another one: at full size, {reason}")


def judge(line: Mapping[str, Any], roof: Roof, device: str) -> dict[str, Any]:
    """A measured line by a roof: its share of it, or ``unjudged`` where a time is shorter than the roof allows.

    The roof is measured too, perhaps in a slow moment, so that the line is left as it is: a better roof may judge it
    again. A peer whose output was never compared with ours (a yardstick) does less work where it is too fast: the
    judged line has it as missing.
    """
    line = dict(line) | {"roof": roof.as_dict()}
    if line["status"] != "ok" or "state" not in line:
        # nothing was timed, or it is a whole model, whose least work nobody counts
        return line
    cached = line["state"] == "cached"
    work = line["bytes"], line["flops"]
    floor = roof.floor_seconds(*work, device, cached) * 1e6
    attainable, bound = roof.attainable_seconds(*work, line["dtype"], cached, line.get("reads", False))
    line |= {"roof_percent": 1e8 * attainable / line["median_us"], "bound": bound, "floor_us": floor}
    if line["call_cost"]:
        # the cost of a call is no bandwidth: its few operands sit in the first-level cache
        return line
    line["peers"] = dict(line["peers"])
    for name, timed in {"tilefuse": line, **line["peers"]}.items():
        if not timed.get("median_us", floor) < floor:
            continue
        reason = f"took {timed['median_us']:.2f} us, this machine's roof allows no less than {floor:.2f} us"
        if timed.get("yardstick") or timed.get("unchecked"):
            line["peers"][name] = {"missing": reason}
        elif line["status"] == "ok":
            line |= {"status": "unjudged", "reason": f"{name} {reason}"}
    return line


def _scale(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].double()
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def _apart(got: Sequence[Tensor], plain: Sequence[Tensor], limit: float = FULL_SIZE) -> str | None:
    """How two results of the same precision differ by more than rounding explains, or None."""
    for i, (g, p) in enumerate(zip(got, plain)):
        if g.shape != p.shape:
            return f"output {i} has shape {[*g.shape]} for {[*p.shape]}"
        if g.is_floating_point() and g.dtype.itemsize > 1 and p.is_floating_point():
            g, p = _some_rows(g, p)
            found, scale = _errors(g, p)["rms"], _scale(p)
            if not found <= limit * scale + 1e-30:
                return f"output {i} is off by rms {found:.2e} at a scale of {scale:.2e}"
    return None
