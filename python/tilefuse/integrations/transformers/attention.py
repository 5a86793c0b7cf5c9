"""Attention and masks through Hugging Face's registries.

Hugging Face calls a mask function once per forward and kind of layer, then passes what it returned to the attention
function of every such layer. A dense mask costs O(S^2), and what nearly all of them say fits in a few numbers. So the
mask function here returns one of

* None: what None means to Hugging Face's own ``sdpa`` function (causal over the first Sq keys, or everything);
* a *code*: an int32 tensor ``[1, 1, rows, N]`` (4-D masks are handed on untouched, also by ``generate`` with a static
  cache). The number of rows tells the kind, so that finding out never waits for the GPU:

  ====  ============  ================================================================================
  rows  N             meaning
  ====  ============  ================================================================================
  0     window        causal, the last query at the last key, that many keys per query
  1     B             decode with a static cache: how many keys of each sequence are written
  2     segments + 1  ``cu_seqlens`` of queries and of keys over the flattened batch, causal inside each
  3     segments + 1  the same, with the window in ``[2, 0]``
  4     segments + 1  as 2, then the ``cu_seqlens`` of a second call without causality: queries at padding
                      after the last real key see all real keys
  5     segments + 1  ``cu_seqlens`` of one call without causality
  ====  ============  ================================================================================

* a dense bool mask where nothing above is exact. The attention function then runs Hugging Face's own function on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    prepare_padding_mask,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from ... import errors
from ...ops.attention.paged_attention import paged_attention
from ...ops.attention.window_attention import window_attention
from . import qk_norm, rope
from .swap import Left, Swap

# the first falls back to Hugging Face's sdpa function, the second to the eager function of the model's own file
NAME, EAGER = "tilefuse", "tilefuse_eager"
# up to so many queries per sequence the split-KV kernel of decoding is the faster one
_FEW = 16
_BOTTOM_RIGHT, _DECODE, _CAUSAL, _WINDOW, _TAIL, _FULL = range(6)

# a mask function that Hugging Face composed is recognised by its code, and its parameters are in its closure
_AND = and_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_REMAPPED = remap_positions_for_packed_sequence(causal_mask_function, torch.zeros(1, 1)).__code__

# text models that hand these mask functions nothing but padding and packed sequences
_TEXT_MODELS = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3"}


def register() -> None:
    for name, function in ((NAME, attention), (EAGER, attention_over_eager)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


def adopt(model: nn.Module) -> None:
    """Sends every model inside, whose config is its own already, through the registry."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
            before = module.config._attn_implementation
            if before not in (NAME, EAGER):
                has_sdpa = before != "eager" and module._supports_sdpa
                module.config._attn_implementation_internal = NAME if has_sdpa else EAGER


def swap(module: nn.Module, config: Any) -> Swap | Left | None:
    """Attention modules that take their function from the registry."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return None
    if getattr(config, "_attn_implementation", None) not in (NAME, EAGER):
        return Left("its model does not take other attention functions")
    if "position_bias" in code.co_varnames:
        return Left("its scores have a learned position bias")
    stock = "eager" if config._attn_implementation == EAGER else "sdpa"
    left = []
    forward, why = rope.rebuild(module)
    if why:
        left.append(why)
    dropout = getattr(module, "attention_dropout", 0.0)
    if isinstance(dropout, float) and dropout > 0:
        left.append(f"attention dropout {dropout} in training runs on {stock}")
    what = "attention" if forward is None else "attention, rope"
    if forward is not None and (offset := qk_norm.weight_offset(module)) is not None:
        forward, what = qk_norm.fuse(forward, offset, eager_function(module)), "attention, q and k norm with rope"
    return Swap(forward, what, "; ".join(left))


def _closure(function: Callable[..., Any], code: Any) -> dict[str, Any] | None:
    """The closure of a function that was made from this code, else None."""
    if getattr(function, "__code__", None) is not code:
        return None
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def _is_causal(function: Callable[..., Any], local_size: int | None) -> bool:
    """Whether a mask function is plainly causal, with a window of ``local_size`` if that is given."""
    if local_size is None:
        return function is causal_mask_function
    both = _closure(function, _AND)
    if both is None or len(both["mask_functions"]) != 2 or causal_mask_function not in both["mask_functions"]:
        return False
    overlays = [_closure(f, _SLIDING) for f in both["mask_functions"] if f is not causal_mask_function]
    return len(overlays) == 1 and overlays[0] is not None and overlays[0]["sliding_window"] == local_size


def _packed_ids(function: Callable[..., Any], local_size: int | None) -> Tensor | None:
    """``[B, S]`` number of the sequence that each token of a packed batch belongs to."""
    both = _closure(function, _AND)
    if both is None or len(both["mask_functions"]) != 2:
        return None
    packed, remapped = (_closure(f, c) for f, c in zip(both["mask_functions"], (_PACKED, _REMAPPED)))
    if packed is None or remapped is None or not _is_causal(remapped["mask_function"], local_size):
        return None
    return packed["packed_sequence_mask"]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask function of the registry: None, a code or a dense bool mask ``[B, 1, Sq, Sk]``."""
    code, found = _find(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip, use_vmap, device, config,
    )  # fmt: skip
    if found:
        return code
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
    )


_DENSE = None, False


def _find(
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    local_size: int | None,
    plain: bool,
    custom: bool,
    device: torch.device | str,
    config: Any,
) -> tuple[Tensor | None, bool]:
    """``(None or code, True)``, or ``(None, False)`` if only a dense mask is exact or would do."""
    # the contents of tensors decide below, and a graph cannot depend on them
    tracing = is_tracing(attention_mask) or (isinstance(q_offset, Tensor) and is_tracing(q_offset))
    if isinstance(kv_offset, Tensor) or (tracing and attention_mask is not None):
        return _DENSE
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if mask_function is bidirectional_mask_function and local_size is None:
        if padding is None:
            return None, True
        start, end, everything, one_run, _ = _runs(padding)
        if everything:
            return None, True
        return (_full(start, end, batch, q_length, kv_length, device), True) if one_run else _DENSE

    window = local_size if local_size is not None and local_size < kv_length else None
    if not plain and tracing:
        # closures cannot be looked at either, but in these models a mask that is not plain is one of packed sequences
        packed = not custom and attention_mask is None and getattr(config, "model_type", None) in _TEXT_MODELS
        if not packed or not (isinstance(q_offset, int) and q_offset == 0 and 1 < q_length == kv_length):
            return _DENSE
        if local_size is not None and (local_size != getattr(config, "sliding_window", None) or local_size < 2):
            return _DENSE
        return _packed(_starts_of(mask_function, batch, q_length, device), window), True
    if not plain:
        ids = _packed_ids(mask_function, local_size) if padding is None else None
        if ids is not None:
            new = torch.ones_like(ids, dtype=torch.bool)
            new[:, 1:] = ids[:, 1:] != ids[:, :-1]
            starts = new.flatten().nonzero().flatten()
            return _packed(torch.nn.functional.pad(starts, (0, 1), value=ids.numel()), window), True
        # a cache that may be compiled asks for a mask in every step of decoding
        if q_length > 1 or not _is_causal(mask_function, local_size):
            return _DENSE
    elif window is not None:
        # chunked attention passes its chunk as the local size
        sliding = local_size == getattr(config, "sliding_window", None)
        if not sliding or getattr(config, "attention_chunk_size", None) is not None:
            return _DENSE

    if isinstance(q_offset, Tensor):
        if q_length == 1 and padding is None and window is None:
            written = (q_offset - kv_offset + 1).to(torch.int32)
            return written.expand(batch).clone().view(1, 1, 1, batch), True
        if tracing:
            return _DENSE
        q_offset = int(q_offset)
    # query i stands at key i + delta
    delta = q_offset - kv_offset
    if delta < 0 or delta + q_length > kv_length:
        return _DENSE
    start = end = None
    after = False
    if padding is not None:
        padding = padding[:, : delta + q_length]
        start, end, everything, one_run, after = _runs(padding)
        if everything:
            start = end = None
            after = False
        elif not one_run or (after and window is not None):
            return _DENSE
        elif q_length == 1:
            # one row per sequence is small, and Hugging Face's function reads the cache where it lies
            return _DENSE
    at_end = delta + q_length == kv_length
    if start is None:
        if window is None and (at_end if q_length == 1 else delta == 0):
            return None, True
        if at_end:
            width = kv_length if window is None else window
            return torch.empty(1, 1, _BOTTOM_RIGHT, width, dtype=torch.int32, device=device), True
        if q_length == 1:
            if window is not None:
                return _DENSE
            return torch.full((1, 1, _DECODE, batch), delta + 1, dtype=torch.int32, device=device), True
        start = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        end = start + delta + q_length
    return _segments(start, end, delta, after, window, batch, q_length, kv_length, device), True


def _runs(padding: Tensor) -> tuple[Tensor, Tensor, bool, bool, bool]:
    """``[B, 1]`` where the real keys start and end, whether all are real, whether those of each sequence are one run,
    and whether any follow it. Waits for the device once, as Hugging Face's own functions do."""
    start = padding.to(torch.int8).argmax(-1, keepdim=True)
    end = start + padding.sum(-1, keepdim=True)
    keys = torch.arange(padding.shape[1], device=padding.device)
    run = (keys >= start) & (keys < end)
    flags = torch.stack((padding.all(), (run == padding).all(), (end < padding.shape[1]).any()))
    return start, end, *flags.tolist()


def _starts(columns: list[Tensor | int], batch: int, length: int, device: torch.device | str) -> Tensor:
    """``cu_seqlens`` over the flattened batch from the first index of each segment of a sequence."""
    first = torch.arange(batch, device=device)[:, None] * length
    columns = [torch.zeros_like(first) + column for column in columns]
    return torch.nn.functional.pad((torch.cat(columns, 1) + first).flatten(), (0, 1), value=batch * length)


def _code(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).to(torch.int32)[None, None]


def _segments(
    start: Tensor,
    end: Tensor,
    delta: int,
    after: bool,
    window: int | None,
    batch: int,
    q_length: int,
    kv_length: int,
    device: torch.device | str,
) -> Tensor:
    """Causal over the keys ``[start, end)`` of each sequence. Queries before them see nothing."""
    first, stop = (start - delta).clamp(0, q_length), (end - delta).clamp(0, q_length)
    # queries before | keys before | both | queries after | keys after
    rows = [
        _starts([0, first, first, stop, q_length], batch, q_length, device),
        _starts([0, 0, start, end, end], batch, kv_length, device),
    ]
    if window is not None:
        rows.append(torch.full_like(rows[0], window))
    elif after:
        # queries up to the last real one | keys before | queries after, with all real keys | keys after | nothing
        rows.append(_starts([0, stop, stop, q_length, q_length], batch, q_length, device))
        rows.append(_starts([0, 0, start, end, kv_length], batch, kv_length, device))
    return _code(rows)


def _starts_of(mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str) -> Tensor:
    """``cu_seqlens`` of a packed causal mask without a wait for the device: unused segments at the end are empty."""
    rows = torch.arange(batch, device=device)[:, None]
    later = torch.arange(1, length, device=device)[None]
    # a token that does not see the one before it begins a sequence
    sees = mask_function(rows, torch.zeros_like(rows), later, later - 1).expand(batch, length - 1)
    new = torch.nn.functional.pad(~sees, (1, 0), value=True).flatten()
    index = torch.arange(batch * length, device=device)
    starts = torch.where(new, index, batch * length).sort().values
    return torch.nn.functional.pad(starts, (0, 1), value=batch * length)


def _packed(cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Positions restart at each sequence, so a window counts inside of it as it does in the whole."""
    return _code([cu_seqlens] * 2 + ([] if window is None else [torch.full_like(cu_seqlens, window)]))


def _full(start: Tensor, end: Tensor, batch: int, q_length: int, kv_length: int, device: torch.device | str) -> Tensor:
    """Every query of a sequence sees its keys ``[start, end)``."""
    rows = [_starts([0, 0, q_length], batch, q_length, device), _starts([0, start, end], batch, kv_length, device)]
    return _code(rows + [torch.zeros_like(rows[0])] * 3)


def is_code(attention_mask: Tensor | None) -> bool:
    """Masks of users are bool or floating point."""
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


def dense_mask(code: Tensor | None, batch: int, q_length: int, kv_length: int, causal: bool, device: Any) -> Any:
    """The bool mask ``[B or 1, 1, Sq, Sk]`` that a code or None stands for; None if everything is visible."""
    keys = torch.arange(kv_length, device=device)
    if code is None:
        if q_length == 1 or not causal:
            return None
        return (keys <= torch.arange(q_length, device=device)[:, None])[None, None]
    rows, width = code.shape[2:]
    if rows == _BOTTOM_RIGHT:
        distance = torch.arange(q_length, device=device)[:, None] + kv_length - q_length - keys
        return ((distance >= 0) & (distance < width))[None, None]
    if rows == _DECODE:
        return (keys < code.view(batch, 1))[:, None, None]
    code = code[0, 0].long()

    def inside(cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
        """Whether query and key share a segment, and their distance when both are counted from its end."""
        numbers, from_end = [], []
        for cu, length in ((cu_q, q_length), (cu_k, kv_length)):
            index = torch.arange(batch * length, device=device)
            number = torch.searchsorted(cu, index, right=True) - 1
            numbers.append(number.view(batch, length))
            from_end.append((cu[number + 1] - 1 - index).view(batch, length))
        same = numbers[0][:, :, None] == numbers[1][:, None, :]
        return same, from_end[1][:, None, :] - from_end[0][:, :, None]

    same, distance = inside(code[0], code[1])
    if rows == _FULL:
        return same[:, None]
    seen = same & (distance >= 0)
    if rows == _WINDOW:
        seen &= distance < code[2, 0]
    elif rows == _TAIL:
        seen |= inside(code[2], code[3])[0]
    return seen[:, None]


def _stock(
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Hugging Face's own function for this module, on the mask that a code stands for."""
    function = eager_function(module) if eager else None
    if is_code(attention_mask):
        attention_mask = dense_mask(
            attention_mask, query.shape[0], query.shape[2], key.shape[2], is_causal, query.device
        )  # fmt: skip
    if function is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    if attention_mask is None:
        attention_mask = dense_mask(None, query.shape[0], query.shape[2], key.shape[2], is_causal, query.device)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, lowest)
    return function(module, query, key, value, attention_mask, **options)


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """``eager_attention_forward`` of the file that the module's class comes from."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of the registry: q, k, v ``[B, H, S, D]`` to ``[B, Sq, Hq, Dv]``."""
    return _attention(False, module, query, key, value, attention_mask, **options)


def attention_over_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """``attention`` for models that ran on their eager function before."""
    return _attention(True, module, query, key, value, attention_mask, **options)


def _attention(
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    rows = attention_mask.shape[2] if is_code(attention_mask) else None
    needs_grad = errors.needs_grad(query, key, value, s_aux)
    if (
        (options.get("dropout") or 0.0) > 0
        or (attention_mask is not None and rows is None)
        or (eager and options.get("output_attentions"))
        # the kernel of decoding has no backward
        or (rows == _DECODE and needs_grad)
        or options.get("position_bias") is not None
        or options.get("cache") is not None
        or query.device.type not in ("cpu", "cuda")
        or query.dtype not in errors.FLOATS
        or not query.dtype == key.dtype == value.dtype
    ):
        # what these functions do not know must not get lost in theirs
        if softcap is not None or s_aux is not None:
            options |= {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
            eager = True
        options["scaling"] = scaling
        return _stock(eager, module, query, key, value, attention_mask, is_causal, options)

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    batch, q_length, kv_length = q.shape[0], q.shape[1], k.shape[1]
    settings = {"scale": scaling, "softcap": softcap or 0.0}

    if rows is not None and rows >= _CAUSAL:
        code = attention_mask[0, 0]
        window = (-1, 0)
        if rows == _WINDOW:
            size = options.get("sliding_window")
            # a model that does not say its window costs a wait for the device
            window = ((int(code[2, 0]) if size is None else size) - 1, 0)
        elif rows == _FULL:
            window = (-1, -1)
        # [B * S, H, D]
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        out, _ = window_attention(q, k, v, s_aux, None, code[0], code[1], window=window, **settings)
        if rows == _TAIL:
            tail, _ = window_attention(q, k, v, s_aux, None, code[2], code[3], window=(-1, -1), **settings)
            # each is zero where the other is not
            out = out + tail
        return out.view(batch, q_length, *out.shape[1:]), None

    if rows is None:
        window = (-1, 0) if is_causal and q_length > 1 else (-1, -1)
        if window[1] == 0 and kv_length > q_length:
            k, v = k[:, :q_length], v[:, :q_length]
        few = q_length == 1
    else:
        window = (attention_mask.shape[3] - 1, 0) if rows == _BOTTOM_RIGHT else (-1, 0)
        few = q_length <= _FEW
    if few and not needs_grad:
        # every sequence is one page of the cache, wherever that lies
        pages = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
        lengths = attention_mask.view(batch) if rows == _DECODE else torch.full_like(pages[:, 0], kv_length)
        return paged_attention(q, k, v, pages, lengths, s_aux, window=(window[0], 0), **settings)[0], None
    return window_attention(q, k, v, s_aux, window=window, **settings)[0], None
