"""Every language architecture of transformers, tiny: which there are, a small config of each, a random model of it.

A config class says its sizes by name, and the names are few: ``shrink`` gives each a small value, keeps what layers
differ in (one layer of each kind) and goes into the configs inside. What the rules do not get right stands in
``overrides``, by model type.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .overrides import ENCODERS, OVERRIDES, VARIANTS

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
VOCABULARY = 128
# ordinary tokens are drawn from here: special ones stand outside
WORDS = range(3, 96)
# what "sliding window", "attention chunk" and "top-k of an indexer" are: shorter than the inputs
WINDOW = 8

WIDTH, HEADS, GROUPS, HEAD = 64, 4, 2, 16
SIZES = [
    (
        WIDTH,
        """hidden_size d_model n_embd dim embed_dim embedding_size emb_dim hidden_dim embedding_dim
        out_hidden_size projection_dim text_hidden_size output_dim encoder_hidden_size d_latents lru_width
        word_embed_proj_dim image_text_hidden_size qformer_hidden_size pooler_output_size projector_hidden_size
        vision_output_dim true_hidden_size patch_embed_hidden_size backbone_hidden_size
        attention_hidden_size output_embedding_size input_embedding_size decoder_hidden_size hidden_size_global""",
    ),
    (
        2 * WIDTH,
        """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff dim_ff mlp_dim ffn_hidden_size
        d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size mamba_d_ssm""",
    ),
    (
        WIDTH // 2,
        """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size kv_lora_rank codebook_dim
        hidden_size_per_layer_input router_hidden_size o_lora_rank intra_bottleneck_size embedding_rank
        share_expert_dim""",
    ),
    (24, "qk_head_dim q_lora_rank adapter_rank hc_lowrank laurel_rank"),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads
        num_cross_attention_heads linear_num_heads linear_num_value_heads swa_num_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads
        num_sliding_attention_heads conf_num_attention_heads resampler_n_heads""",
    ),
    (
        GROUPS,
        """num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads swa_num_key_value_heads
        num_query_groups n_groups mamba_n_groups mamba_ngroups""",
    ),
    (
        HEAD,
        """head_dim d_kv attention_head_size v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        index_head_dim global_head_dim swa_head_dim kv_channels attention_head_dim d_head dim_head
        mamba_d_head mamba_head_dim mamba_headdim qk_nope_head_dim resampler_head_dim""",
    ),
    (HEAD // 2, "qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size num_landmarks"),
    # with few heads relu makes exact zeros, and a choice among equal scores is nobody's (settled.md, frontier 16)
    (16, "index_n_heads expert_capacity"),
    (
        WINDOW,
        """sliding_window attention_chunk_size index_topk local_attention attention_window sliding_window_size
        attention_window_size local_attention_window_len""",
    ),
    (
        2,
        """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth layers num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k
        n_group topk_group patch_size num_global_layers num_expert_group speech_encoder_layers t2u_encoder_layers
        t2u_decoder_layers conf_num_hidden_layers resampler_depth num_hidden_groups num_blocks""",
    ),
    (1, "n_shared_experts num_shared_experts num_random_blocks num_nextn_predict_layers first_k_dense_replace"),
    (
        8,
        """n_routed_experts num_experts num_local_experts moe_num_experts image_size num_query_tokens num_latents
        mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size""",
    ),
    (
        256,
        """max_position_embeddings n_positions n_ctx max_seq_len seq_len max_source_positions max_target_positions
        model_max_length max_sequence_length max_encoder_position_embeddings max_decoder_position_embeddings
        original_max_position_embeddings context_length""",
    ),
    (
        VOCABULARY,
        "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size",
    ),
]
BY_NAME = {name: size for size, names in SIZES for name in names.split()}
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "depth")
# these mean something else the larger they are
KEPT = ("sampling_rate", "seed", "rotary_embedding_base", "log_scaling_n_floor", "floor_scale", "hop_length")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Architecture:
    """One row of the sweep: a model class on a config class."""

    model_type: str
    class_name: str
    kinds: tuple[str, ...]
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model_type, self.class_name, self.variant) if part)


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """Every row there is, by name: each model class once for each config class that Hugging Face maps to it."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )

    found: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for class_name in (names,) if isinstance(names, str) else names:
                if class_name == getattr(modeling_auto, mapping).get(f"{model_type}_text"):
                    # the language model inside has a row of its own
                    continue
                # several model types may share both classes: the shortest name is the one that the others borrow from
                sharing, kinds = found.setdefault((CONFIG_MAPPING_NAMES[model_type], class_name), ([], []))
                sharing.append(model_type)
                kinds.append(kind)
    rows = [
        Architecture(min(sharing, key=len), name, tuple(dict.fromkeys(kinds)))
        for (_, name), (sharing, kinds) in found.items()
    ]
    rows += [Architecture(model_type, name, ("masked",)) for model_type, name in ENCODERS.items()]
    rows += [replace(row, variant=variant) for row in rows for variant in VARIANTS.get(row.name, ())]
    return tuple(sorted(rows, key=lambda row: row.name))


def _layers(values: dict[str, Any], depth: int) -> tuple[int, dict[str, list[Any]]]:
    """How many layers show every kind of layer once, and the lists that say the kinds, cut to those layers."""
    lists = {name: value for name, value in values.items() if isinstance(value, list | tuple) and len(value) == depth}
    if not lists or depth < 2:
        return 2, {}
    kinds: dict[str, int] = {}
    for layer in range(depth):
        kinds.setdefault(str([value[layer] for value in lists.values()]), layer)
    chosen = sorted(kinds.values())[:4]
    if len(chosen) == 1:
        chosen *= 2
    return len(chosen), {name: [value[layer] for layer in chosen] for name, value in lists.items()}


def _size(name: str, value: Any, index: int) -> Any:
    """The small value of one setting, or None to leave it as it is."""
    if isinstance(value, float):
        return 0.0 if "drop" in name and "token" not in name else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name in SPECIAL:
        return SPECIAL[name]
    if name.endswith(("_token_id", "_token_index", "_id", "_index")) and value >= VOCABULARY - 1:
        return 96 + index % 30
    if name in BY_NAME:
        return BY_NAME[name]
    if name in KEPT or value < VOCABULARY:
        return None
    return WIDTH


def shrink(config_class: type, **given: Any) -> Any:
    """A small config of this class."""
    from transformers import PreTrainedConfig

    override = OVERRIDES.get(config_class.model_type, {}) | given
    # what a config of this class cannot do without, for the configs inside
    inside = {name: override.pop(name) for name in config_class.sub_configs if name in override}
    default = config_class(**inside)
    values = {k: v for k, v in vars(default).items() if not k.startswith("_") or k == "_sliding_window_pattern"}
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), 0)
    settings: dict[str, Any] = {}
    for index, (name, value) in enumerate(values.items()):
        if isinstance(value, PreTrainedConfig):
            settings[name] = shrink(type(value), **inside.get(name, {}))
        elif (size := _size(name, value, index)) is not None:
            settings[name] = size
    count, lists = _layers(values, depth)
    settings |= {name: count for name in DEPTHS if name in settings} | lists
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        # latent attention has a key per head, and calls one part of it or another the head
        settings["num_key_value_heads"] = HEADS
        same = next((n for n in ("qk_rope_head_dim", "qk_head_dim") if values.get(n) == values.get("head_dim")), None)
        settings |= {"head_dim": settings[same]} if same in settings else {}
    if "head_dim" in values and values["head_dim"] is None:
        settings["head_dim"] = HEAD
    if (sections := override.pop("mrope_section", None)) is not None:
        settings["rope_parameters"] = values["rope_parameters"] | {"mrope_section": sections}
    settings |= override
    return config_class(**settings)


def model_types(config: Any) -> list[str]:
    """The types of a config and of all configs inside, the outermost first."""
    from transformers import PreTrainedConfig

    inside = [model_types(value) for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return list(dict.fromkeys([config.model_type, *(name for names in inside for name in names)]))


def tiny_config(row: Architecture) -> Any:
    """A small config of the row."""
    import transformers
    from transformers import CONFIG_MAPPING

    given = VARIANTS.get(f"{row.model_type}-{row.class_name}", {}).get(row.variant, {})
    config_class = CONFIG_MAPPING[row.model_type]
    if "causal" in row.kinds and getattr(config_class, "is_decoder", None) is False:
        # an encoder's language model head
        given = given | {"is_decoder": True}
    config = shrink(config_class, **given)
    model_class = getattr(transformers, row.class_name)
    if model_class.config_class in type(config).sub_configs.values():
        # the language model of a larger one
        config = next(getattr(config, n) for n, c in config.sub_configs.items() if c is model_class.config_class)
    return config


def tiny(row: Architecture, seed: int = 0) -> nn.Module:
    """A random model of the row, in evaluation mode, whose weights show mistakes that initial values would hide."""
    import transformers

    config = tiny_config(row)
    torch.manual_seed(seed)
    model = getattr(transformers, row.class_name)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif (std := float(parameter.std())) > 0 or "norm" not in path:
                # every linear keeps the size of what goes through it
                wanted = 0.5 if "embed" in path else parameter[0].numel() ** -0.5
                if std == 0:
                    parameter.normal_(std=wanted)
                elif std < wanted:
                    parameter.mul_(wanted / std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model.eval()
