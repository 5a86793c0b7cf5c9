"""Attention through Hugging Face's registry of attention functions, one module at a time.

A module's forward takes its attention function from ``ALL_ATTENTION_FUNCTIONS``, and a model's forward makes masks
with the functions of ``masking_utils``. ``replace`` stands ours in for both (see ``rebuild``). The config stays what it
was, so that the model goes every way that it went before, and Hugging Face's own function for the module, ``sdpa`` or
the eager one of its file, is at hand: a call that says anything but what the ops compute goes to it whole.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from ... import backend, errors
from ...ops.attention.paged_attention import paged_attention
from ...ops.attention.window_attention import window_attention
from . import calls, mask, qk_norm, rebuild, rope, verified
from .compact import Compact
from .swap import Left, Swap

NAME = "tilefuse"
# up to so many queries per sequence the split-KV kernel of decoding is the faster one
_FEW = 16
# keywords that change nothing in a call: what they say is in the mask, or meant for other functions
_SILENT = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "return_dict",
    "sliding_window", "use_cache",
}  # fmt: skip

_KNOWN = {"dropout", "scaling", "is_causal", "output_attentions", *_SILENT}

Function = Callable[..., tuple[Tensor, Tensor | None]]


class Eager(NamedTuple):
    """What an eager attention function computes besides a masked softmax."""

    softcap: bool
    sinks: bool


# only successes: a failure may be due to where it was tried
_forms: dict[Function, Eager] = {}


def form_of(eager: Any) -> Eager | None:
    """The form of a file's ``eager_attention_forward``, found by running it on a few random numbers."""
    code = getattr(eager, "__code__", None)
    if code is None:
        return None
    if eager not in _forms:
        form = Eager("softcap" in code.co_varnames, "sinks" in code.co_names)
        try:
            same = _is(eager, form)
        except Exception:
            # not a function of these arguments
            same = False
        if not same:
            return None
        _forms[eager] = form
    return _forms[eager]


def _is(eager: Function, form: Eager) -> bool:
    with torch.no_grad(), torch.device("cpu"), backend("reference"):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float32) for _ in range(3))
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        module: Any = nn.Module()
        module.head_dim, module.num_key_value_groups, module.training = 8, 1, False
        sinks = None
        if form.sinks:
            sinks = module.sinks = nn.Parameter(torch.linspace(-1, 2, 4, dtype=torch.float32))
        more: dict[str, Any] = {"softcap": 3.0} if form.softcap else {}
        for grouped in (False, True):
            if grouped:
                if "num_key_value_groups" not in eager.__code__.co_names:
                    break
                module.num_key_value_groups = 2
                k, v = k[:, :2], v[:, :2]
            for seen in (
                None,
                torch.zeros(5, 5, dtype=torch.float32).masked_fill(hidden, torch.finfo(torch.float32).min),
            ):
                window = (-1, -1) if seen is None else (-1, 0)
                expected = eager(
                    module, q, k, v, None if seen is None else seen[None, None], scaling=0.4, dropout=0.0, **more
                )[0]
                out, _ = window_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), sinks, window=window, scale=0.4, **more
                )
                if expected.shape != out.shape or not torch.allclose(out, expected, atol=1e-5):
                    return False
    return True


class Registry:
    """``ALL_ATTENTION_FUNCTIONS`` as the modules of one file see it: ours where stock is ``sdpa`` or known eager."""

    def __init__(self, eager: Any):
        self.eager = eager
        self._sdpa = functools.partial(attention, sdpa_attention_forward, None)
        form = form_of(eager)
        self._eager = None if form is None else functools.partial(attention, eager, form)

    def get_interface(self, name: str, default: Function) -> Function:
        # someone may have registered another function under a name of Hugging Face's
        found = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
        if found is sdpa_attention_forward:
            return self._sdpa
        if found is self.eager and self._eager is not None:
            return self._eager
        return found

    def __getitem__(self, name: str) -> Function:
        found = ALL_ATTENTION_FUNCTIONS[name]
        return self._sdpa if found is sdpa_attention_forward else found

    def __getattr__(self, name: str) -> Any:
        return getattr(ALL_ATTENTION_FUNCTIONS, name)


def replace(name: str, value: Any, scope: dict[str, Any]) -> Any:
    """What stands in for a global of a model's file."""
    if value is ALL_ATTENTION_FUNCTIONS:
        return Registry(scope.get("eager_attention_forward"))
    return mask.MAKERS.get(value) if callable(value) else None


def _methods(cls: type) -> tuple[list[str], list[str]]:
    """The methods of a class that call attention functions, and those that make masks."""
    methods = rebuild.methods(cls)
    attends = [name for name, method in methods.items() if _uses(method, _is_registry)]
    makes = [name for name, method in methods.items() if _uses(method, _makes_masks)]
    return attends, makes


# a class may be given another method, which is another function
_uses = functools.cache(rebuild.uses)


def _is_registry(value: Any) -> bool:
    return value is ALL_ATTENTION_FUNCTIONS


def _makes_masks(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and value in mask.MAKERS


def part(model: nn.Module, unverified: bool) -> Callable[[nn.Module, Any], Swap | Left | None]:
    """The part for one model."""
    wholes = _wholes(model, None)
    other_tables = rope.files_of_other_tables(model)

    def swap(module: nn.Module, config: Any) -> Swap | Left | None:
        cls = type(module)
        attends, makes = _methods(cls)
        why = "" if unverified else verified.why_not(wholes[module], config)
        if attends:
            return _swap_attention(module, config, _why_left(module, config) or why, attends, other_tables)
        if rope.in_forward(cls)[0] and cls.__module__ not in other_tables:
            outside = "attention outside of Hugging Face's registry"
            return Swap(rebuild.method(cls, "forward", ("rope",)), "rope", outside)
        if why:
            return None
        methods = {name: rebuild.method(cls, name, ("attention",)) for name in makes}
        if isinstance(module, GenerationMixin) and not hasattr(cls, "create_masks_for_generate"):
            methods["create_masks_for_generate"] = mask.for_generate
        return Swap(None, "", methods=methods) if methods else None

    return swap


def _wholes(module: nn.Module, config: Any) -> dict[nn.Module, Any]:
    """The config of the whole model that each module belongs to, also where a wrapper has none."""
    config = config or module.__dict__.get("config")
    found = {module: config}
    for child in module.children():
        found = _wholes(child, config) | found
    return found


def _why_left(module: nn.Module, config: Any) -> str:
    """What is known beforehand to keep a module's attention from running on tilefuse."""
    file = sys.modules[type(module).__module__]
    name = getattr(config, "_attn_implementation", None)
    code = getattr(type(module).forward, "__code__", None)
    if name not in ("sdpa", "eager"):
        return f"its model runs on {name}"
    if name == "eager" and form_of(getattr(file, "eager_attention_forward", None)) is None:
        return "its eager attention function is of another form"
    if code is not None and "position_bias" in code.co_varnames:
        return "its scores have a learned position bias"
    if hasattr(module, "indexer"):
        return "its keys are chosen by an indexer"
    return ""


def _swap_attention(
    module: nn.Module, config: Any, why: str, attends: list[str], other_tables: set[str]
) -> Swap | Left:
    """``why``: what keeps its attention from being swapped, "" if nothing."""
    cls = type(module)
    names, parts, what, left = set(attends), ["attention"], ["attention"], []
    if why:
        names, parts, what, left = set(), [], [], [f"attention: {why}"]
    rotary, other = rope.in_forward(cls)
    if rotary and cls.__module__ in other_tables:
        rotary, other = False, "its rotary embedding is of another form"
    if rotary:
        names.add("forward")
        parts.append("rope")
        offset = None if why else qk_norm.weight_offset(module)
        if offset is not None:
            parts.append(f"norm={offset}")
        what.append("rope" if offset is None else "q and k norm with rope")
    elif other:
        left.append(other)
    if not parts:
        return Left("; ".join(left))
    dropout = getattr(module, "attention_dropout", 0.0)
    if not why and isinstance(dropout, float) and dropout > 0:
        left.append(f"attention dropout {dropout} in training runs on {config._attn_implementation}")
    methods = {name: rebuild.method(cls, name, tuple(parts)) for name in names}
    return Swap(methods.pop("forward", None), ", ".join(what), "; ".join(left), methods)


def attention(
    stock: Function,
    form: Eager | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of the registry: q, k, v ``[B, H, S, D]`` to ``[B, Sq, Hq, Dv]``.

    ``stock`` is Hugging Face's function for this module, sdpa or (with its ``form``) the eager one of its file. It
    gets every call that is not exactly one of the ops.
    """
    why = _unlike(form, module, query, key, value, attention_mask, options)
    compact = None if why else _meaning(form, module, query, key, attention_mask, options)
    if compact is None:
        if not why:
            why = "its mask is not one of the ops"
            if query.shape[2] == 1:
                why = "one query's mask with padding is small, and stays dense"
        calls.count(module, f"{_name(form)}: {why}")
        return stock(module, query, key, value, mask.dense(attention_mask), **options)
    sinks = module.sinks if form is not None and form.sinks else None
    softcap = options.get("softcap") or 0.0
    settings = {"scale": options.get("scaling"), "softcap": softcap}
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    needs_grad = errors.needs_grad(q, k, v, sinks)
    if compact.lengths is not None and needs_grad:
        calls.count(module, f"{_name(form)}: decoding has no gradient")
        return stock(module, query, key, value, mask.dense(attention_mask), **options)
    if compact.segments:
        calls.count(module, "window_attention")
        return _segments(compact, q, k, v, sinks, settings), None
    if compact.first != 0 or compact.stop is not None:
        k, v = (x[:, compact.first : compact.stop] for x in (k, v))
    batch, q_length, kv_length = q.shape[0], q.shape[1], k.shape[1]
    left, right = compact.window
    # the kernel of decoding is causal: one query at the last key sees nothing to its right
    if not needs_grad and (q_length == 1 or (right == 0 and kv_length > q_length and q_length <= _FEW)):
        calls.count(module, "paged_attention")
        pages, lengths = _pages(q, batch, kv_length)
        lengths = lengths if compact.lengths is None else compact.lengths
        return paged_attention(q, k, v, pages, lengths, sinks, window=(left, 0), **settings)[0], None
    calls.count(module, "window_attention")
    return window_attention(q, k, v, sinks, window=(left, right), **settings)[0], None


def _pages(q: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Block table and lengths of a cache whose every sequence is one page, wherever that lies."""
    # the layers of a model ask for the same; a graph that is captured or traced makes its own
    kept = type(q) is Tensor and q.is_cpu and not torch.compiler.is_compiling()
    if kept and not torch._C._len_torch_dispatch_stack():
        return _kept_pages(batch, length)
    return _made_pages(batch, length, q.device)


def _made_pages(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pages = torch.arange(batch, dtype=torch.int32, device=device)
    return pages[:, None], torch.full_like(pages, length)


@functools.lru_cache(maxsize=16)
def _kept_pages(batch: int, length: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _made_pages(batch, length, torch.device("cpu"))


def _name(form: Eager | None) -> str:
    return "sdpa" if form is None else "eager"


def _unlike(
    form: Eager | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> str:
    """What a call says that the ops do not compute, "" if nothing."""
    for name, option in options.items():
        if option is None or name in _KNOWN:
            continue
        # of sinks it reads the module's own
        if form is None or not ((name == "softcap" and form.softcap) or (name == "s_aux" and form.sinks)):
            return f"it has the argument {name}"
    if (options.get("dropout") or 0.0) > 0:
        return "attention dropout"
    if form is not None:
        if options.get("scaling") is None:
            return "no scaling is given"
        if options.get("output_attentions") or _recorded(module):
            return "attention weights are asked for"
        if attention_mask is not None and not attention_mask.dtype.is_floating_point:
            return "its mask is not of the eager kind"
    if query.device.type not in ("cpu", "cuda") or query.dtype not in errors.FLOATS:
        return f"{query.dtype} on {query.device.type}"
    if not query.dtype == key.dtype == value.dtype:
        return "its tensors have several dtypes"
    if query.dim() != 4 or query.shape[1] % key.shape[1] != 0 or key.shape[:3] != value.shape[:3]:
        return "its shapes are unusual"
    return ""


def _recorded(module: nn.Module) -> bool:
    """Whether attention weights are wanted: a setting of the config reaches no attention function's arguments."""
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    collector = output_capturing._active_collector
    # torch.compile knows no context variables
    keys = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return keys is not None and "attentions" in keys


def _meaning(
    form: Eager | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Compact | None:
    """What a mask, or none, means to Hugging Face's function."""
    batch, _, q_length, _ = query.shape
    kv_length = key.shape[2]
    if attention_mask is not None:
        compact = mask.compact_of(attention_mask)
        fits = tuple(attention_mask.shape) == (batch, 1, q_length, kv_length) and key.shape[0] == batch
        return compact if fits else None
    if key.shape[0] != batch:
        return None
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if form is not None or not is_causal or q_length == 1:
        return Compact()
    # causal from the first key on
    if kv_length < q_length:
        return None
    return Compact((-1, 0), stop=None if kv_length == q_length else q_length)


def _segments(
    compact: Compact, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, settings: dict[str, Any]
) -> Tensor:
    batch, q_length = q.shape[:2]
    # [B * S, H, D]
    flat = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    total = None
    for segments in compact.segments:
        q, k, v = (x.flip(0) for x in flat) if segments.backwards else flat
        out, _ = window_attention(
            q, k, v, sinks, None, segments.cu_q, segments.cu_k, window=segments.window, **settings
        )  # fmt: skip
        out = out.flip(0) if segments.backwards else out
        # each is zero where the others are not
        total = out if total is None else total + out
    assert total is not None
    return total.view(batch, q_length, *total.shape[1:])


def named_mask(config: Any = None, **arguments: Any) -> Tensor | None:
    """The mask function of models that ask for ``"tilefuse"``."""
    make = mask.sdpa_mask if _form_of_named(type(config), type(config)) is None else mask.eager_mask
    return make(config=config, **arguments)


def named_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of models that ask for ``"tilefuse"``."""
    stock = sdpa_attention_forward
    form = _form_of_named(type(module), type(getattr(module, "config", None)))
    if form is not None:
        form = Eager(*form)
        stock = sys.modules[type(module).__module__].eager_attention_forward
    return attention(stock, form, module, query, key, value, attention_mask, **options)


# to a graph, what a class says is a constant
@torch.compiler.assume_constant_result
def _form_of_named(cls: type, config: type) -> tuple[bool, ...] | None:
    """``Eager`` of the models of the file that a class belongs to, or None if those run on sdpa."""
    name = cls.__module__.replace("configuration_", "modeling_")
    file = sys.modules.get(name)
    why = verified.why_not(config)
    if not why and (file is None or _asks_for_a_name(file)):
        why = f"the model of {cls.__name__} asks for other implementations by name"
    if why:
        raise ValueError(f'attn_implementation="{NAME}" takes verified model types only: {why}')
    models = [c for c in vars(file).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    models = [model for model in models if model.__module__ == name]
    # a file may hold a vision model that runs on sdpa and a text model that does not
    supports = {model._supports_sdpa for model in models if model.config_class is config}
    supports = supports or {model._supports_sdpa for model in models}
    if len(supports) > 1:
        raise ValueError(f'attn_implementation="{NAME}" cannot tell whether {cls.__name__} runs on sdpa')
    if True in supports:
        return None
    form = form_of(getattr(file, "eager_attention_forward", None))
    if form is None:
        raise ValueError(f'attn_implementation="{NAME}" does not know the eager attention of {cls.__name__}')
    return tuple(form)


@functools.cache
def _asks_for_a_name(file: types.ModuleType) -> bool:
    """Whether a model's file compares the name of the attention implementation with one of Hugging Face's."""
    functions = [x for x in vars(file).values() if isinstance(x, types.FunctionType)]
    for cls in vars(file).values():
        if isinstance(cls, type) and cls.__module__ == file.__name__:
            functions += [inspect.unwrap(x) for x in vars(cls).values() if isinstance(x, types.FunctionType)]
    return any(_compares(function.__code__) for function in functions)


def _compares(code: types.CodeType) -> bool:
    found = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType) and _compares(constant):
            return True
        found |= set(constant) if isinstance(constant, (tuple, frozenset)) else {constant}
    return "_attn_implementation" in code.co_names and not found.isdisjoint(("sdpa", "eager"))


def register() -> None:
    AttentionInterface.register(NAME, named_attention)
    AttentionMaskInterface.register(NAME, named_mask)
