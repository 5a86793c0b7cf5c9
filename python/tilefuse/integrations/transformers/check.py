"""A model before and after ``patch`` on a small random input, for types that no one verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import verified
from .swap import undo

# errors of rounding through a whole model, relative to its largest output
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def not_verified(module: nn.Module) -> list[nn.Module]:
    """The models in it, outermost ones with a config, whose type is not verified."""
    config = module.__dict__.get("config")
    if config is not None:
        return [module] if verified.why_not(config) else []
    return [model for child in module.children() for model in not_verified(child)]


def compared(whole: nn.Module, models: list[nn.Module], patch: Callable[[], Any]) -> Any:
    """``patch()`` of the whole, if these models in it then give what they gave before, else RuntimeError and all as
    it was."""
    training = [module for module in whole.modules() if module.training]
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = [(model, each) for model in models for each in _inputs(model, generator)]
    try:
        for model in models:
            model.eval()
        before = [_outputs(model, each) for model, each in inputs]
        state = patch()
        after = [_outputs(model, each) for model, each in inputs]
    except Exception as error:
        undo(whole)
        raise RuntimeError(f"tilefuse: {type(whole).__name__} could not be compared with itself: {error}") from error
    finally:
        for module in training:
            module.training = True
    for (model, each), stock, ours in zip(inputs, before, after):
        for a, b in zip(stock, ours):
            wrong = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            if not wrong <= _TOLERANCE[a.dtype] * a.double().abs().max().clamp(min=1e-6).item():
                undo(whole)
                raise RuntimeError(
                    f"tilefuse: {type(model).__name__} patched differs from Hugging Face's by {wrong:.3g} with "
                    f"{', '.join(each)}"
                )
    return state


def _inputs(model: nn.Module, generator: torch.Generator) -> Any:
    """Token ids, alone and with padding on either side."""
    if getattr(model, "main_input_name", None) != "input_ids":
        raise RuntimeError(f"tilefuse: {type(model).__name__} takes no input_ids, so that it cannot be compared")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    device = next(model.parameters()).device
    length = 24
    ids = torch.randint(config.vocab_size, (2, length), generator=generator, device="cpu").to(device)
    more: dict[str, Tensor] = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    left = torch.ones_like(ids)
    left[0, : length // 3] = 0
    yield {"input_ids": ids, **more}
    yield {"input_ids": ids, "attention_mask": left, **more}
    yield {"input_ids": ids, "attention_mask": left.flip(1), **more}


def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Floating-point outputs; those of tokens at the padding say nothing."""
    with torch.no_grad():
        out = model(**inputs, use_cache=False)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    found = [x for x in pytree.tree_leaves(dict(out)) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x[real] if x.dim() > 2 and x.shape[:2] == real.shape else x for x in found]
