"""What a model is asked in the sweep: each mode is a function ``Case -> {name: tensor}``.

A mode raises where the model cannot do it; the sweep asks stock first, and what stock cannot do says nothing. Results
at padding are left out. Every mode starts from the same random state.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .architectures import WORDS, Architecture
from .overrides import EXTRAS, TOKENS

Results = dict[str, Tensor]
MODES: dict[str, Callable[[Case], Results]] = {}
# dynamo takes longer than everything else together: only some rows are asked (``record.QUICK``)
COMPILED: dict[str, Callable[[Case], Results]] = {}
_GENERATION = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "return_dict_in_generate": True,
}
_PADDING = 5
# tokens of a seq2seq model's decoder
_TARGET = 18


class NotAsked(Exception):
    """The mode means nothing for this kind of model."""


def _need(condition: object) -> None:
    if not condition:
        raise NotAsked


@dataclass
class Case:
    """A model and the inputs of one seed."""

    row: Architecture
    model: Any
    seed: int = 1
    # what the model takes as an image: found once, on stock
    images: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def names(self) -> tuple[str, str]:
        """What the model calls its tokens and their mask."""
        return TOKENS.get(self.row.model_type, ("input_ids", "attention_mask"))

    @property
    def seq2seq(self) -> bool:
        """Whether two lists of tokens go in."""
        return bool(self.config.is_encoder_decoder) and self.names[0] == "input_ids"

    def extras(self, batch: int) -> dict[str, Tensor]:
        """What goes in beside tokens."""
        generator = torch.Generator().manual_seed(7)
        return {
            name: torch.randint(WORDS.start, WORDS.stop, (1, *shape), generator=generator).expand(batch, *shape)
            if name.endswith("ids")
            else torch.rand(1, *shape, generator=generator).expand(batch, *shape)
            for name, shape in EXTRAS.get(self.row.model_type, {}).items()
        }

    def takes(self, name: str) -> bool:
        return name in inspect.signature(type(self.model).forward).parameters

    def words(self, batch: int = 2, length: int | None = None) -> Tensor:
        """``[batch, length]`` ordinary tokens; by default more than every window, and than what block-sparse models
        still run dense."""
        if length is None:
            length = 24
            if getattr(self.config, "attention_type", None) == "block_sparse":
                length = int((6 + 2 * self.config.num_random_blocks) * self.config.block_size)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(WORDS.start, WORDS.stop, (batch, length), generator=generator)

    def padded(self, ids: Tensor, side: str) -> Tensor:
        """``[B, S]`` mask with padding in the first sequence."""
        mask = torch.ones_like(ids)
        mask[0, slice(None, _PADDING) if side == "left" else slice(-_PADDING, None)] = 0
        return mask

    def decoder_mask(self, mask: Tensor) -> Tensor:
        return mask[:, :_TARGET] if mask[:, 0].all() else mask[:, -_TARGET:]

    def call(self, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
        """One forward. A seq2seq model's decoder gets tokens and padding of the same kind."""
        arguments: dict[str, Any] = {self.names[0]: ids} | self.extras(ids.shape[0])
        if mask is not None:
            arguments[self.names[1]] = mask
        if self.seq2seq:
            arguments["decoder_input_ids"] = ids[:, :_TARGET].flip(1)
            if mask is not None and mask.dim() == 2 and self.takes("decoder_attention_mask"):
                arguments["decoder_attention_mask"] = self.decoder_mask(mask)
        if self.takes("use_cache"):
            arguments["use_cache"] = False
        return self.model(**arguments | more)

    def real(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Logits where there is no padding."""
        if self.seq2seq:
            mask = self.decoder_mask(mask)
        return logits[mask[:, -logits.shape[1] :].bool()]


def _logits(out: Any) -> Tensor:
    for name in ("logits", "prediction_logits", "prediction_scores"):
        if isinstance(value := getattr(out, name, None), Tensor):
            return value
    return out[0]


def mode(function: Callable[[Case], Results]) -> Callable[[Case], Results]:
    MODES[function.__name__] = function
    return function


def compiled_mode(function: Callable[[Case], Results]) -> Callable[[Case], Results]:
    COMPILED[function.__name__] = function
    return function


@mode
def plain(case: Case) -> Results:
    return {"logits": _logits(case.call(case.words()))}


@mode
def pickled(case: Case) -> Results:
    model = pickle.loads(pickle.dumps(case.model))
    return plain(Case(case.row, model, case.seed))


def _with_padding(case: Case, side: str) -> Results:
    ids = case.words()
    mask = case.padded(ids, side)
    return {"logits": case.real(_logits(case.call(ids, mask)), mask)}


@mode
def left_padding(case: Case) -> Results:
    return _with_padding(case, "left")


@mode
def right_padding(case: Case) -> Results:
    return _with_padding(case, "right")


@mode
def packed(case: Case) -> Results:
    _need(case.takes("position_ids") and not case.seq2seq)
    ids = case.words(1)
    positions = torch.cat([torch.arange(n) for n in (11, 1, ids.shape[1] - 12)])[None]
    return {"logits": _logits(case.call(ids, position_ids=positions))}


@mode
def mask_4d(case: Case) -> Results:
    """An additive mask of the user: causal for decoders, with holes."""
    _need(not case.seq2seq)
    ids = case.words()
    length = ids.shape[1]
    seen = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(3)) > 0.3
    if "masked" not in case.row.kinds:
        seen = seen.tril()
    seen |= torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"logits": _logits(case.call(ids, mask))}


@mode
def last_logits(case: Case) -> Results:
    _need(case.takes("logits_to_keep"))
    ids = case.words()
    return {"logits": _logits(case.call(ids, case.padded(ids, "left"), logits_to_keep=3))}


@mode
def chunked_prefill(case: Case) -> Results:
    """A conversation over one cache: chunks and single tokens, before and past the window."""
    _need(case.takes("past_key_values") and not case.seq2seq and "masked" not in case.row.kinds)
    ids = case.words()
    cache, at, parts = None, 0, []
    for size in (5, 1, 4, 1, ids.shape[1] - 14, 3):
        more = case.extras(ids.shape[0]) | {case.names[0]: ids[:, at : at + size]}
        out = case.model(**more, past_key_values=cache, use_cache=True)
        at += size
        cache = out.past_key_values
        _need(cache is not None)
        parts.append(_logits(out))
    return {"logits": torch.cat(parts, 1)}


def _generate(case: Case, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Results:
    _need(getattr(case.model, "can_generate", bool)())
    more |= {case.names[0]: ids} | case.extras(ids.shape[0])
    if mask is not None:
        more[case.names[1]] = mask
    if "num_beams" in more:
        out = case.model.generate(**_GENERATION, output_scores=True, **more)
        return {"tokens": out.sequences, "beams": out.sequences_scores}
    out = case.model.generate(**_GENERATION, output_logits=True, **more)
    return {"tokens": out.sequences, "steps": torch.stack(out.logits, 1)}


@mode
def greedy(case: Case) -> Results:
    ids = case.words()
    return _generate(case, ids, case.padded(ids, "left"), max_new_tokens=6)


@mode
def greedy_past_the_window(case: Case) -> Results:
    return _generate(case, case.words(length=5), max_new_tokens=8)


@mode
def beam(case: Case) -> Results:
    return _generate(case, case.words(length=9), max_new_tokens=4, num_beams=2)


@mode
def prompt_lookup(case: Case) -> Results:
    ids = case.words(1, 8).repeat(1, 2)
    return _generate(case, ids, max_new_tokens=5, prompt_lookup_num_tokens=3)


@mode
def static_cache(case: Case) -> Results:
    ids = case.words(length=12)
    return _generate(case, ids, max_new_tokens=4, cache_implementation="static", disable_compile=True)


@mode
def static_cache_padded(case: Case) -> Results:
    ids = case.words(length=12)
    mask = case.padded(ids, "left")
    return _generate(case, ids, mask, max_new_tokens=3, cache_implementation="static", disable_compile=True)


def _step(case: Case) -> Results:
    ids = case.words()
    # a seq2seq model reads its decoder's tokens from the labels
    labels = ids[:, :_TARGET].clone() if case.seq2seq else ids.clone()
    labels[0, :3] = -100
    # padding on the right is how models are trained
    arguments: dict[str, Any] = {case.names[0]: ids, case.names[1]: case.padded(ids, "right"), "labels": labels}
    arguments |= case.extras(ids.shape[0])
    if case.takes("use_cache"):
        arguments["use_cache"] = False
    case.model.zero_grad()
    with torch.enable_grad():
        loss = case.model(**arguments).loss
        loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in case.model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    case.model.zero_grad()
    return found


@mode
def gradients(case: Case) -> Results:
    return _step(case)


@mode
def checkpointing(case: Case) -> Results:
    _need(case.model.supports_gradient_checkpointing)
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return _step(case)
    finally:
        case.model.gradient_checkpointing_disable()
        case.model.eval()


def _counts(out: Any) -> Results:
    """How many layers gave their attention weights."""
    found = {}
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        layers = getattr(out, name, None)
        found[f"number of {name}"] = torch.tensor(-1 if layers is None else sum(x is not None for x in layers))
    return found


@mode
def output_attentions(case: Case) -> Results:
    ids = case.words()
    mask = case.padded(ids, "left")
    out = case.call(ids, mask, output_attentions=True)
    return {"logits": case.real(_logits(out), mask)} | _counts(out)


@mode
def config_attentions(case: Case) -> Results:
    """The same, asked for in the config."""
    before = case.config._output_attentions
    case.config._output_attentions = True
    try:
        out = case.call(case.words())
    finally:
        case.config._output_attentions = before
    return {"logits": _logits(out)} | _counts(out)


def _image_inputs(case: Case) -> dict[str, Any]:
    """A prompt with one image in the form that this model takes: the first of the known forms that it runs."""
    size = 8
    vision = getattr(case.config, "vision_config", None) or case.config
    generator = torch.Generator().manual_seed(5)
    patch = getattr(vision, "patch_size", 2)
    patch = patch if isinstance(patch, int) else patch[0]
    depth = getattr(vision, "temporal_patch_size", 1) or 1
    pixels = torch.randn(1, 3, size, size, generator=generator)
    flat = torch.randn(16, 3 * depth * patch * patch, generator=generator)
    forms: list[dict[str, Any]] = [
        {"pixel_values": pixels},
        {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 4, 4]])},
        {"pixel_values": pixels[None], "image_sizes": torch.tensor([[size, size]])},
        {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]])},
        {"pixel_values": pixels[None]},
        {"pixel_values": pixels[None].expand(1, 3, -1, -1, -1), "image_sizes": torch.tensor([[size, size]])},
        {
            "pixel_values": flat[None],
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
        },
        {"pixel_values": flat[None], "image_position_ids": torch.cartesian_prod(*[torch.arange(4)] * 2)[None]},
    ]
    token = next(
        (t for n in ("image_token_id", "image_token_index") if isinstance(t := getattr(case.config, n, None), int)),
        None,
    )
    ids = case.words(1)
    for form in forms:
        try:
            count = 0
            if hasattr(case.model, "get_image_features") and token is not None:
                features = case.model.get_image_features(**form)
                features = getattr(features, "pooler_output", features)
                features = torch.cat([f.flatten(0, -2) for f in features])
                count = features.shape[0]
            before, after = ids[:, :4], ids[:, 4:]
            inputs = dict(form)
            inputs["input_ids"] = torch.cat([before, torch.full((1, count), token or 0), after], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for name in ("mm_token_type_ids", "token_type_ids"):
                if count and case.takes(name):
                    inputs[name] = (inputs["input_ids"] == token).long()
            if case.takes("use_cache"):
                inputs["use_cache"] = False
            if case.seq2seq:
                inputs["decoder_input_ids"] = ids
            case.model(**inputs)
            return inputs
        except Exception:
            continue
    raise NotAsked


@mode
def image(case: Case) -> Results:
    _need("image" in case.row.kinds)
    if not case.images:
        case.images.update(_image_inputs(case))
    return {"logits": _logits(case.model(**case.images))}


@compiled_mode
def compiled(case: Case) -> Results:
    """Three lengths with padding through one compiled model, and how many graphs that took."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    model = torch.compile(case.model, backend="eager", dynamic=True)
    found = {}
    for length in (12, 19, 27):
        ids = case.words(length=length)
        found[f"length {length}"] = _logits(model(ids, **({"use_cache": False} if case.takes("use_cache") else {})))
    found["graphs"] = torch.tensor(dynamo.utils.counters["stats"]["unique_graphs"])
    dynamo.reset()
    return found


@compiled_mode
def exported(case: Case) -> Results:
    """Exported with a dynamic length, run at another."""
    _need(not case.seq2seq)
    length = torch.export.Dim("length", min=4, max=200)
    arguments = (
        {"input_ids": case.words(), "use_cache": False} if case.takes("use_cache") else {"input_ids": case.words()}
    )
    shapes = {"input_ids": {1: length}} | ({"use_cache": None} if "use_cache" in arguments else {})
    program = torch.export.export(case.model, (), arguments, dynamic_shapes=shapes, strict=False)
    return {"logits": _logits(program.module()(**arguments | {"input_ids": case.words(length=17)}))}
