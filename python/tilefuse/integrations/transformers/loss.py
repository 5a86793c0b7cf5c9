"""Head and loss: ``linear_cross_entropy`` in place of logits and their cross-entropy, where labels are given.

The model's own forward runs. Its head gives logits without entries (``logits``), and its ``loss_function``, if they
still say what they are of when they get there, calls the op.
"""

from __future__ import annotations

import inspect
import threading
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.import_utils import is_tracing

from ...ops.loss.linear_cross_entropy import linear_cross_entropy
from . import calls, rebuild
from .logits import head_of, lazy_logits
from .swap import Left, Part, Swap, original, replaced, same_code

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# models whose forward makes logits and loss in a known way: the head's result, times a factor and softly capped, goes
# to loss_function and to the outputs. Others are known by having the very same code
_KNOWN = tuple(
    (model, name, True)
    for model, name in (
        ("llama", "LlamaForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("granitemoe", "GraniteMoeForCausalLM"),
        ("cohere", "CohereForCausalLM"),
        ("nemotron", "NemotronForCausalLM"),
        ("granite", "GraniteForCausalLM"),
        ("afmoe", "AfmoeForCausalLM"),
        ("stablelm", "StableLmForCausalLM"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
        ("glm4v", "Glm4vForConditionalGeneration"),
        ("gptj", "GPTJForCausalLM"),
    )
)


class _Armed(threading.local):
    """The head whose next result may be without entries, in each thread; why it was not."""

    head: nn.Module | None = None
    why: str = ""


_armed = _Armed()


def fuse(otherwise: types.FunctionType) -> types.FunctionType:
    """A model's forward, with its head armed where there are labels."""
    place = list(inspect.signature(otherwise).parameters).index("labels") - 1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a graph cannot have results that may or may not be made
        if torch.compiler.is_compiling():
            return otherwise(self, *args, **kwargs)
        if kwargs.get("labels", args[place] if place < len(args) else None) is None:
            return otherwise(self, *args, **kwargs)
        before = _armed.head, _armed.why
        _armed.head, _armed.why = self.get_output_embeddings(), "its head is another"
        try:
            return otherwise(self, *args, **kwargs)
        finally:
            _armed.head, _armed.why = before

    return forward


def head_forward(self: Any, input: Tensor) -> Tensor:
    """``nn.Linear.forward``, without entries if it is armed."""
    if not torch.compiler.is_compiling() and _armed.head is self:
        _armed.why = _why_dense(self, input)
        if not _armed.why:
            return lazy_logits(input, self.weight, self.bias)
    return F.linear(input, self.weight, self.bias)


def _why_dense(head: Any, x: Tensor) -> str:
    """Why this call of a head has to give logits, "" if it may do without."""
    weight = head.weight
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return "hooks of the head"
    # sharded, gathered for the call alone, fake or traced
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or hasattr(weight, "ds_id"):
        return "a head or hidden states of another kind"
    if is_tracing(x) or torch._C._are_functorch_transforms_active():
        return "a trace or a transform"
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if not same or x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"dtypes {x.dtype} and {weight.dtype}"
    return "" if x.device.type in ("cpu", "cuda") and x.device == weight.device else f"device {x.device}"


def loss_function(
    self: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``ForCausalLMLoss``."""
    head = head_of(logits)
    target = labels if shift_labels is None else shift_labels
    # a loss divided by a tensor with dims has them
    dims = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim() > 0
    if head is None or dims or logits.shape[-1] != vocab_size or target.numel() != logits.shape[:-1].numel():
        why = _armed.why or ("num_items_in_batch with dims" if dims else "logits that were looked at")
        calls.count(self, f"stock loss: {why}")
        more = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **more)
    calls.count(self, "linear_cross_entropy")
    if shift_labels is None:
        # tokens < n predict n
        target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = target.reshape(-1).to(head.x.device)
    loss = linear_cross_entropy(
        head.x.reshape(-1, head.x.shape[-1]),
        head.weight,
        target,
        head.bias,
        num_items=num_items_in_batch,
        scale=head.scale,
        softcap=head.softcap,
        ignore_index=ignore_index,
        recompute=False,
    )
    # the op gives 0 where nothing is to be divided
    items = (target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    nothing = torch.as_tensor(items, device=loss.device) == 0
    return loss + torch.where(nothing, torch.nan, 0.0).to(loss.dtype)


def part(model: nn.Module) -> Part:
    """The part for one model."""
    heads: set[nn.Module] = set()

    def swap(module: Any, config: Any) -> Swap | Left | None:
        if module in heads:
            return Swap(head_forward, "")
        head = _head_with_a_loss(module)
        if head is None:
            return None
        why = _why_left(module, head)
        if why:
            return Left(f"loss: {why}")
        heads.add(head)
        return Swap(
            rebuild.method(type(module), "forward", ("loss",)), "loss", methods={"_loss_function": loss_function}
        )

    return swap


def _head_with_a_loss(module: Any) -> nn.Module | None:
    """The head of a model that takes labels, if it has one."""
    if not isinstance(module, PreTrainedModel):
        return None
    try:
        head = module.get_output_embeddings()
        return head if "labels" in inspect.signature(type(module).forward).parameters else None
    except (AttributeError, NotImplementedError):
        return None


def _why_left(module: Any, head: Any) -> str:
    """Why logits and loss of a model stay with Hugging Face, "" if they do not."""
    if not original(type(module)) or same_code(module, _KNOWN, bare=True) is None:
        return "its forward makes logits and loss in a way that is not known"
    if module.loss_function is not ForCausalLMLoss:
        return f"its loss function is {getattr(module.loss_function, '__name__', 'of its own')}"
    if replaced(module, "forward") or replaced(head, "forward"):
        return "someone replaced its forward"
    if type(head) is not nn.Linear:
        return f"its head is {type(head).__name__}"
    return "" if any(each is head for each in module.modules()) else "its head is not part of it"
