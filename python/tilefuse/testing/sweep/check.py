"""One row of the sweep: a tiny model of one architecture, stock and patched, in every mode.

The rule: a patched result may differ from stock's by four times what stock's own eager and sdpa attention differ by,
plus ``FLOOR`` of the largest value. bfloat16 is judged by verification.md's rule against stock in float32.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..numeric import assert_bit_equal
from .architectures import Architecture, model_types, tiny
from .modes import COMPILED, MODES, Case, NotAsked, Results

FACTOR, FLOOR = 4.0, 2e-5
_CONTRADICTION = 1e-2
# where the noise of stock is measured
_NOISE = ("plain", "left_padding", "right_padding", "packed", "mask_4d", "gradients")
_LIKE = {"checkpointing": "gradients"}
# what a model is asked that names tilefuse as its implementation
_BY_NAME = ("plain", "left_padding", "right_padding", "packed", "chunked_prefill", "greedy", "gradients")
# models that choose (experts, keys, buckets): a choice that rounding decides says nothing, so these get other inputs
_CHOOSING = ("router", "indexer", "topk", "gate", "lsh")
_SEEDS = 3


@dataclass
class Record:
    """What one row did."""

    name: str
    model_type: str
    class_name: str
    kinds: list[str]
    # "passed", "failed", or "not built: ..." and "not run: ..." with what stock raised
    status: str = ""
    # whether attention was taken; False: patch left what this row showed to be wrong, and then it passed
    verified: bool = True
    # the types of all configs in it
    types: list[str] = field(default_factory=list)
    parameters: int = 0
    # what patch says it swapped and left, and in how many modules
    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    # mode -> "" where it agreed, else what went wrong
    modes: dict[str, str] = field(default_factory=dict)
    # mode -> why stock itself cannot do it
    stock_cannot: dict[str, str] = field(default_factory=dict)
    # the largest over all modes, relative to the largest value of the result
    difference: float = 0.0
    noise: float = 0.0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    # of the code that it ran, see ``record.fingerprint``
    code: str = ""

    @property
    def failures(self) -> dict[str, str]:
        return {name: what for name, what in self.modes.items() if what}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _run(function: Callable[[Case], Results], case: Case) -> Results:
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(case)


def _scale(x: Tensor) -> float:
    x = x[x.isfinite()]
    return x.abs().max().item() if x.numel() else 0.0


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference; infinite where one is NaN or infinite and the other is not the same."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs()).nan_to_num(torch.inf, torch.inf).amax().item() if x.numel() else 0.0


def _until_parted(ours: Results, stock: Results) -> tuple[Results, Results, str]:
    """The logits of generated tokens up to where the tokens part, which is wrong unless the two best nearly tied."""
    a, b = ours.pop("tokens"), stock.pop("tokens")
    if "beams" in stock or torch.equal(a, b):
        # another beam of the same score is as good
        return ours, stock, ""
    if a.shape != b.shape or ours["steps"].shape != stock["steps"].shape:
        return ours, stock, f"tokens: {[*a.shape]}, stock {[*b.shape]}"
    steps = stock["steps"].shape[1]
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for i, (mine, theirs) in enumerate(zip(a[:, -steps:], b[:, -steps:])):
        different = (mine != theirs).long()
        at = int(different.argmax()) if different.any() else steps - 1
        logits = stock["steps"][i, at]
        gap = (logits[theirs[at]] - logits[mine[at]]).abs().item()
        if gap > 1e-3 * _scale(logits):
            return ours, stock, f"tokens: sequence {i} parts at step {at}, where the logits are {gap:.2g} apart"
        for part, result in zip(parts, (ours, stock)):
            part.append(result["steps"][i, : at + 1])
    return {"steps": torch.cat(parts[0])}, {"steps": torch.cat(parts[1])}, ""


def compare(
    ours: Results, stock: Results, other: Results | None = None, noise: float = 0.0
) -> tuple[float, float, str]:
    """Largest difference and noise of a mode, relative to the largest value, and the first thing that is wrong.

    ``other`` is stock with its other attention, ``noise`` what that made of other modes. Gradients count against at
    least a tenth of the largest one: small ones are differences of large terms.
    """
    if ours.keys() != stock.keys():
        return 0.0, 0.0, f"results: {sorted(ours.keys() ^ stock.keys())[:4]} in one only"
    ours, stock, wrong = dict(ours), dict(stock), ""
    if "tokens" in stock:
        ours, stock, wrong = _until_parted(ours, stock)
    largest = max((_scale(x) for name, x in stock.items() if name.startswith("gradient")), default=0.0)
    difference = seen = 0.0
    for name, y in stock.items():
        if wrong:
            break
        x = ours[name]
        if name == "graphs":
            wrong = f"{x.item()} graphs, stock {y.item()}" if x > y else ""
        elif x.shape != y.shape or x.dtype != y.dtype:
            wrong = f"{name}: {[*x.shape]} {x.dtype}, stock {[*y.shape]} {y.dtype}"
        elif not y.is_floating_point():
            wrong = "" if torch.equal(x, y) else f"{name}: {x.tolist()}, stock {y.tolist()}"[:200]
        else:
            scale = max(_scale(y), 0.1 * largest if name.startswith("gradient") else 0.0) or 1.0
            off = _distance(x, y) / scale
            own = _distance(other[name], y) / scale if other and other[name].shape == y.shape else noise
            # where stock contradicts itself, its other attention says nothing
            own = own if own < _CONTRADICTION else 0.0
            difference, seen = max(difference, off), max(seen, own)
            if not off <= FACTOR * own + FLOOR:
                wrong = f"{name}: off by {off:.2g} of the largest value, stock's own noise {own:.2g}"
    return difference, seen, wrong


def _over_eager(model: Any) -> nn.Module | None:
    """A copy that runs stock's other attention, if it has one."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def _as_if_verified(unverified: bool) -> contextlib.AbstractContextManager[Any]:
    """``patch(unverified=True)`` would compare once more, on fewer inputs."""
    if not unverified:
        return contextlib.nullcontext()
    return mock.patch("tilefuse.integrations.transformers.verified.why_not", return_value="")


def _patch(model: nn.Module, unverified: bool) -> Any:
    from tilefuse.integrations.transformers import patch

    with _as_if_verified(unverified):
        return patch(model)


def check(row: Architecture, *, unverified: bool = False, compiled: bool = False, only: tuple[str, ...] = ()) -> Record:
    """Runs one row.

    Args:
        row: one of ``architectures()``.
        unverified: patch as if every model type were on the verified list.
        compiled: also the modes that compile and export.
        only: names of the modes to run; all by default.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    record = Record(row.name, row.model_type, row.class_name, [*row.kinds], verified=unverified)
    record.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    try:
        model = tiny(row)
    except Exception as error:
        record.status = f"not built: {_said(error)}"
        return record
    record.types = model_types(model.config)
    record.parameters = sum(p.numel() for p in model.parameters())
    # compiled before hooks of other modes are on the model, which dynamo would follow
    asked = {"plain": MODES["plain"]} | (COMPILED if compiled else {}) | MODES
    asked = {name: f for name, f in asked.items() if not only or name in only}
    stock_model = copy.deepcopy(model)
    fresh_model = copy.deepcopy(model)
    other_model = _over_eager(model)
    images: dict[str, Any] = {}

    def case(model: nn.Module, seed: int = 1) -> Case:
        return Case(row, model, seed, images)

    stock: dict[str, Results] = {}
    other: dict[str, Results] = {}

    def ask_stock(name: str, seed: int = 1) -> None:
        stock[name] = _run(asked[name], case(stock_model, seed))
        if other_model is not None and name in _NOISE:
            with contextlib.suppress(Exception):
                other[name] = _run(asked[name], case(other_model, seed))

    for name in asked:
        try:
            ask_stock(name)
        except NotAsked:
            continue
        except Exception as error:
            record.stock_cannot[name] = _said(error)
            if name == "plain":
                record.status = f"not run: {_said(error)}"
                return record
    try:
        report = _patch(model, unverified)
    except Exception as error:
        record.modes["patch"] = _said(error)
        record.status = "failed"
        return record
    record.swapped, record.left = dict(Counter(report.changed.values())), dict(Counter(report.left.values()))

    chooses = any(word in type(m).__name__.lower() for m in model.modules() for word in _CHOOSING)
    for name in [*stock]:
        difference, noise, wrong = 0.0, 0.0, ""
        try:
            for seed in range(1, (_SEEDS if chooses else 1) + 1):
                if seed > 1:
                    ask_stock(name, seed)
                ours = _run(asked[name], case(model, seed))
                difference, noise, wrong = compare(ours, stock[name], other.get(_LIKE.get(name, name)), record.noise)
                if not wrong:
                    break
        except Exception as error:
            wrong = _said(error)
        if not wrong:
            record.difference, record.noise = max(record.difference, difference), max(record.noise, noise)
        record.modes[name] = wrong
    record.modes["unpatch"] = _unpatched(row, model, stock_model, [*stock])
    if not only or "by_name" in only:
        _by_name(lambda: case(copy.deepcopy(fresh_model)), unverified, [*stock], other, record)
    if not only or "bfloat16" in only:
        _bfloat16(row, stock_model, unverified, record)
    record.status = "failed" if record.failures else "passed"
    record.seconds = round(time.perf_counter() - started, 1)
    return record


def _unpatched(row: Architecture, model: nn.Module, stock_model: nn.Module, names: list[str]) -> str:
    """What is wrong with the bits that ``unpatch`` gives back."""
    from tilefuse.integrations.transformers import unpatch

    try:
        unpatch(model)
        for name in ("plain", "left_padding"):
            if name in names:
                got, before = (_run(MODES[name], Case(row, m)) for m in (model, stock_model))
                assert_bit_equal(got["logits"], before["logits"], name=name)
    except Exception as error:
        return _said(error)
    return ""


def _by_name(
    fresh: Callable[[], Case], unverified: bool, names: list[str], other: dict[str, Results], record: Record
) -> None:
    """Adds the mode "by_name": ``attn_implementation="tilefuse"`` without ``patch``, where that is not refused."""
    from tilefuse.integrations.transformers import register

    register()
    case, wrong, asked = fresh(), "", [name for name in _BY_NAME if name in names]
    with _as_if_verified(unverified):
        try:
            case.model.set_attn_implementation("tilefuse")
        except Exception as error:
            record.stock_cannot["by_name"] = _said(error)
            return
        if case.config._attn_implementation != "tilefuse":
            return
        for name in asked:
            try:
                # new models each time: one may keep what a short input made of it, as BigBird its attention type
                case = fresh()
                case.model.set_attn_implementation("tilefuse")
                results = _run(MODES[name], case)
                difference, noise, wrong = compare(results, _run(MODES[name], fresh()), other.get(name), record.noise)
            except Exception as error:
                wrong = _said(error)
                if isinstance(error, ValueError) and 'attn_implementation="tilefuse"' in wrong:
                    record.stock_cannot["by_name"] = wrong
                    return
            if wrong:
                wrong = f"{name}: {wrong}"
                break
            record.difference, record.noise = max(record.difference, difference), max(record.noise, noise)
    record.modes["by_name"] = wrong


def _bfloat16(row: Architecture, model: nn.Module, unverified: bool, record: Record) -> None:
    """Adds the mode "bfloat16": an error of at most twice stock's, plus one rounding of the largest value."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    patched = copy.deepcopy(half)
    wrong = ""
    for seed in range(1, _SEEDS + 1):
        wrong = ""
        for name in ("plain", "left_padding"):
            try:
                oracle, naive = (_run(MODES[name], Case(row, m, seed))["logits"].double() for m in (exact, half))
            except Exception as error:
                record.stock_cannot["bfloat16"] = _said(error)
                return
            try:
                _patch(patched, unverified)
                out = _run(MODES[name], Case(row, patched, seed))["logits"].double()
            except Exception as error:
                record.modes["bfloat16"] = f"{name}: {_said(error)}"
                return
            error, allowed = _distance(out, oracle), _distance(naive, oracle)
            if not error <= 2 * allowed + 2**-8 * _scale(oracle):
                wrong = f"{name}: off by {error:.2g} of {_scale(oracle):.2g}, stock by {allowed:.2g}"
        if not wrong:
            break
    record.modes["bfloat16"] = wrong
