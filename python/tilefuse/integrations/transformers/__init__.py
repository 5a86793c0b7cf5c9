"""tilefuse under Hugging Face transformers: ``register()``, ``patch(model)``, ``unpatch(model)``.

Needs ``pip install tilefuse[transformers]``.
"""

from __future__ import annotations

from torch import nn

from . import attention, bigbird, experts, fp8_linear, longformer, router
from .swap import STATE, Change, Left, Report, Swap, apply, undo

__all__ = ["Change", "Left", "Report", "Swap", "patch", "register", "unpatch"]

# asked in this order about every module
PARTS = [longformer.swap, bigbird.swap, fp8_linear.swap, attention.swap, router.swap, experts.swap]


def register() -> None:
    attention.register()
    fp8_linear.register()
    experts.register()


def patch(model: nn.Module) -> Report:
    register()
    state = model.__dict__.get(STATE)
    if state is None:
        # a part of it may be patched on its own
        undo(model)
        state = apply(model, PARTS, attention.adopt)
    return state.report


def unpatch(model: nn.Module) -> nn.Module:
    undo(model)
    return model
