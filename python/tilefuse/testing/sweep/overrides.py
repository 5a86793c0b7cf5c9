"""What the rules of ``architectures.shrink`` do not get right, by model type (of a config or of one inside it)."""

from typing import Any

_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_GEMMA3N = {
    **_SHARED,
    "intermediate_size": [128] * 4,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    "altup_num_inputs": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"mrope_section": [4, 2, 2], "head_dim": 16}
_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "beam": {"n_group": 2, "topk_group": 1},
    "chameleon": {"vocabulary_map": {"<image>": 100, **{f"IMGIMGBS{c}Z": 101 + i for i, c in enumerate("ABCD")}}},
    "chameleon_vqgan": {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": _ROPE | {"mrope_section": [4, 2, 2]},
            "sliding_attention": _ROPE | {"mrope_section": [4, 2, 2]},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "head_dim": 16},
    "diffusion_gemma_text": {
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_hidden_layers": 3,
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "head_dim": 24,
        "rope_parameters": None,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "feature_size": 128},
    "emu3": {
        "vocabulary_map": {
            "<image>": 100,
            "<|extra_200|>": 99,
            **{f"<|visual token {i:06}|>": 101 + i for i in range(8)},
        }
    },
    "emu3_vqgan": {
        "codebook_size": 8,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
    },
    "ernie4_5_vl_moe_text": {"mrope_section": [3, 3, 2]},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen3_vl_text": _MROPE,
    "qwen3_vl_moe_text": _MROPE,
    "qwen3_omni_moe_text": _MROPE,
    "paddleocr_vl_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "glm4v_text": _MROPE,
    "glm4v_moe_text": {"mrope_section": [2, 1, 1]},
    "qwen3_5_text": {"mrope_section": [1, 1, 0]},
    "qwen3_5_moe_text": {"mrope_section": [1, 1, 0]},
    "esmc": {"num_key_value_heads": 4},
    "big_bird": {"block_size": 4},
    "bigbird_pegasus": {"block_size": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "cosmos3_edge_text": _MROPE,
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 96},
    "florence_vision": {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 32, 32, 64],
        "num_heads": [2, 2, 2, 4],
        "num_groups": [2, 2, 2, 4],
        "window_size": 2,
    },
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": {"global_head_dim": 32, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "glm5_next_text": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "index_kpool": 2,
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
    },
    "hunyuan_vl_text": {"head_dim": 16, "mrope_section": [2, 2, 2, 2]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "blip-2": {"image_token_index": 100, "image_token_id": 100},
    "instructblip": {"image_token_index": 100, "image_token_id": 100},
    "instructblipvideo": {"video_token_index": 100, "video_token_id": 100},
    "step3p5": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "deepseek_v2": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "mobilebert": {"true_hidden_size": 32},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 24},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "molmo2_text": {"rope_scaling_layers": [0]},
    "qwen4_exp_text": {
        **_INDEXER,
        "head_dim": 16,
        "rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]},
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "attention_head_size": 16,
    },
    "muse_spark_audio": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "qwen2": _SLIDING,
    "qwen2_moe": _SLIDING,
    "qwen3": _SLIDING,
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 32},
}

# configs of the same architecture that do something else: row -> {name of the variant: what differs}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4_text-Gemma4ForCausalLM": {"shared": _SHARED},
    "gemma4_unified_text-Gemma4UnifiedForCausalLM": {"shared": _SHARED},
    "mistral-MistralForCausalLM": {"full": {"sliding_window": None}},
}

# encoders that no mapping of language models names, with what they did wrong once (issue 13)
ENCODERS: dict[str, str] = {
    "splinter": "SplinterModel",
    "clap_text_model": "ClapTextModel",
    "align_text_model": "AlignTextModel",
}

# what a model wants beside tokens: name -> shape without the batch
EXTRAS: dict[str, dict[str, tuple[int, ...]]] = {
    "blip": {"pixel_values": (3, 8, 8)},
    "blip-2": {"pixel_values": (3, 8, 8)},
    "instructblip": {"pixel_values": (3, 8, 8), "qformer_input_ids": (4,)},
    "instructblipvideo": {"pixel_values": (4, 3, 8, 8), "qformer_input_ids": (4,)},
    "idefics": {"pixel_values": (1, 3, 8, 8), "image_attention_mask": (24, 1)},
    "kosmos-2": {"pixel_values": (3, 8, 8)},
    "pix2struct": {"flattened_patches": (16, 66)},
    "pp_formulanet": {"pixel_values": (3, 8, 8)},
    "udop": {"bbox": (24, 4)},
    "vision-encoder-decoder": {"pixel_values": (3, 8, 8)},
}

# what a model calls its tokens and their mask, where not input_ids and attention_mask
TOKENS: dict[str, tuple[str, str]] = {
    "perceiver": ("inputs", "attention_mask"),
    "pix2struct": ("decoder_input_ids", "decoder_attention_mask"),
    "pp_formulanet": ("decoder_input_ids", "decoder_attention_mask"),
    "vision-encoder-decoder": ("decoder_input_ids", "decoder_attention_mask"),
}
