"""tilefuse under Hugging Face transformers: ``register()``, ``patch(model)``, ``unpatch(model)``.

Needs ``pip install tilefuse[transformers]`` (transformers 5.23 or newer). ``import tilefuse`` never imports it.

===================  =========================================  ==================================================
part                 what runs on tilefuse                      models
===================  =========================================  ==================================================
attention            ``window_attention``, ``paged_attention``  all that use Hugging Face's attention registry and
                                                                are verified
rotary embedding     ``rope_qk``, ``qk_norm_rope``              Llama, Mistral, Qwen3, Gemma-3, gpt-oss, DeepSeek-V2
                                                                and V3, and all with the same functions
routers              ``moe_route``                              Mixtral, Qwen3-MoE, gpt-oss, DeepSeek-V2 and V3
experts              ``moe_experts``, ``grouped_matmul``        all that use Hugging Face's experts registry
FP8 linears          ``fp8_matmul``                             checkpoints with ``weight_scale_inv``
sparse attention     ``global_attention``,                      Longformer, BigBird
                     ``block_sparse_attention``
norms, gated MLPs    ``rms_norm``, ``gated_activation``         with ``norm=True``: Llama, Gemma, gpt-oss, OLMo-2,
                                                                Phi-3, and all with the same code
head and loss        ``linear_cross_entropy``                   with ``loss=True``: Llama, Mixtral, Gemma-2, Granite,
                                                                Cohere, Qwen3-VL, and all with the same code
===================  =========================================  ==================================================

Results differ from Hugging Face's by rounding only. Two things follow from that and are not errors: where bfloat16
logits of two experts are exactly tied, ``moe_route`` takes the lower index and ``torch.topk`` either; and caches hold
what Hugging Face's hold up to rounding, so that a model may be patched or unpatched in the middle of a generation.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import errors
from . import attention, bigbird, check, experts, fp8_linear, longformer, router
from . import loss as losses
from . import norm as norms
from .swap import STATE, Change, Left, Options, Report, Swap, apply, undo

__all__ = ["Change", "Left", "Report", "Swap", "patch", "register", "unpatch"]


def register() -> None:
    """Adds ``"tilefuse"`` to Hugging Face's attention, attention mask and experts registries.

    After that a model can be built with it, or switched to it. No existing model changes, and calling it again is
    harmless. Rotary embedding, routers, FP8 linears, Longformer and BigBird have no registry: ``patch`` swaps those.

    The attention registered under this name takes verified model types (``patch`` says which those are); the first
    forward of another raises ValueError. So does one of a model whose code asks for ``"sdpa"`` or ``"eager"`` by name:
    such a model would leave the branch that makes it right, while ``patch`` keeps its config as it is.

    Raises:
        ImportError: transformers is not installed, when this package is imported.

    Example::

        import torch
        import transformers
        import tilefuse.integrations.transformers as integration

        integration.register()
        config = transformers.MixtralConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, vocab_size=100,
        )
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="tilefuse", experts_implementation="tilefuse"
        )
        logits = model(torch.randint(100, (1, 32))).logits
    """
    attention.register()
    fp8_linear.register()
    experts.register()


def patch(
    model: nn.Module,
    *,
    unverified: bool = False,
    pack: bool | str = False,
    norm: bool = False,
    loss: bool = False,
) -> Report:
    """Runs what it can of one live model on tilefuse, and says what that is.

    Each module that a part of tilefuse knows gets a new forward on the *instance*. Configs, parameters,
    ``state_dict``, hooks, module classes, device placement and other models, of the same class or built from the same
    config object, stay as they are. Works in training (gradient checkpointing, autocast), with every cache of
    ``generate``, under ``torch.compile`` and ``torch.export`` and with the hooks of ``device_map``, in either order. A
    patched model that is pickled or copied comes back patched. Patching a patched model changes nothing and returns
    its report again.

    The attention of a model runs on tilefuse if its type is *verified*: if it was compared with Hugging Face's, with
    this version of transformers, in every mode of use. On other types only rotary embedding, routers, experts and
    linears are swapped, and the report says so.

    What tilefuse does not compute exactly stays with Hugging Face, at the module or for the call: attention dropout in
    training, position biases, masks of the user, masks with holes, padding under ``torch.compile``, attention weights
    of an eager model, ``generate_batch``, and every call with an argument that tilefuse does not know. The report
    names modules; ``report.calls()`` counts what their attention and loss calls ran on. A second derivative raises.

    Args:
        model: any module. Usually a ``transformers.PreTrainedModel``; wrapped ones (DDP, PEFT, ``torch.compile``)
            are searched too.
        unverified: swap the attention of models whose type is not verified all the same, after their outputs for a
            small random input were compared with Hugging Face's.
        pack: pack the weights of experts and FP8 linears for inference on a CPU (``tilefuse.pack_weight``), one matrix
            at a time. True keeps the parameters beside the packs, for training too; ``"only"`` frees them:
            ``state_dict``, ``save_pretrained``, ``load_state_dict`` and ``.to`` still see them as the checkpoint has
            them, and a call that needs a gradient raises RuntimeError. ``tilefuse.nn.MoE.pack`` says how a weight that
            changed is noticed. Calls under ``torch.no_grad()`` or without trainable weights use the packs. A patched
            model is patched anew where it was packed otherwise. ``report.memory`` has the bytes before and after.

    Returns:
        A mapping from module path to ``Change(changed, left)``: what runs on tilefuse now, and what was left with the
        reason. ``report.changed`` and ``report.left`` hold one of the two; ``print(report)`` shows equal layers once.

    Raises:
        ValueError: pack is none of False, True and "only".
        RuntimeError: with ``unverified``, if the outputs differ or could not be compared. The model is then as before.
            With ``loss``, when logits are looked at whose head has changed since, as by an optimizer's step.

    Example::

        import torch
        import transformers
        from tilefuse.integrations.transformers import patch, unpatch

        config = transformers.Qwen3Config(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=100, pad_token_id=0,
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        report = patch(model)
        print(report)
        tokens = model.generate(torch.randint(1, 100, (1, 8)), max_new_tokens=8, do_sample=False)
        unpatch(model)
    """
    if pack not in (False, True, "only"):
        errors.value_error("integrations.transformers.patch", "pack", 'one of False, True, "only"', pack)
    options = Options(pack, norm, loss)
    state = model.__dict__.get(STATE)
    if state is None or options.and_before(state.options) != state.options:
        if state is not None:
            options = options.and_before(state.options)
        # a part of it may be patched on its own
        undo(model)
        parts = [
            longformer.swap,
            bigbird.swap,
            fp8_linear.swap,
            attention.part(model, unverified),
            router.swap,
            experts.swap,
            *([norms.swap] if options.norm else []),
        ]
        also = [losses.part(model)] if options.loss else []

        def swap_all() -> Any:
            return apply(model, parts, options, also)

        unknown = check.not_verified(model) if unverified else []
        state = check.compared(model, unknown, swap_all) if unknown else swap_all()
    state.report.belongs_to(model)
    return state.report


def unpatch(model: nn.Module) -> nn.Module:
    """Takes ``patch`` back: the model computes what it did before, bit for bit.

    Also takes back what was patched in a part of the model. A model that was never patched is left alone.

    Args:
        model: what was given to ``patch``, or something that contains it.

    Returns:
        The model.

    Example::

        import transformers
        from tilefuse.integrations.transformers import patch, unpatch

        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        patch(model)
        model = unpatch(model)
    """
    undo(model)
    return model
