"""Shapes of real models, from their published configurations (``config.json`` of each release)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What kernels need to know of a model; 0 where it has no such part."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # dense feed-forward
    vocab: int
    rope_theta: float = 10000.0
    # mixture of experts
    experts: int = 0
    top_k: int = 0
    moe_intermediate: int = 0
    shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    score: str = "softmax"
    routed_scale: float = 1.0
    # latent attention
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    v_dim: int = 0
    # local attention: the model's own number (gpt-oss: keys seen, itself included; Longformer: both sides together)
    window: int = 0


DEEPSEEK_V3 = Model(
    "DeepSeek-V3", 7168, 61, 128, 128, 192, 18432, 129280, experts=256, top_k=8, moe_intermediate=2048,
    shared_experts=1, n_group=8, topk_group=4, score="sigmoid", routed_scale=2.5, q_lora_rank=1536,
    kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128,
)  # fmt: skip
DEEPSEEK_V2_LITE = Model(
    "DeepSeek-V2-Lite", 2048, 27, 16, 16, 192, 10944, 102400, experts=64, top_k=6, moe_intermediate=1408,
    shared_experts=2, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128,
)  # fmt: skip
QWEN3_30B_A3B = Model(
    "Qwen3-30B-A3B", 2048, 48, 32, 4, 128, 6144, 151936, rope_theta=1e6, experts=128, top_k=8, moe_intermediate=768,
)  # fmt: skip
MIXTRAL_8X7B = Model(
    "Mixtral-8x7B", 4096, 32, 32, 8, 128, 14336, 32000, rope_theta=1e6, experts=8, top_k=2, moe_intermediate=14336,
)  # fmt: skip
GPT_OSS_20B = Model(
    "gpt-oss-20b", 2880, 24, 64, 8, 64, 2880, 201088, rope_theta=150000.0, experts=32, top_k=4,
    moe_intermediate=2880, window=128,
)  # fmt: skip
LONGFORMER_BASE = Model("Longformer-base-4096", 768, 12, 12, 12, 64, 3072, 50265, window=512)
LLAMA3_8B = Model("Llama-3-8B", 4096, 32, 32, 8, 128, 14336, 128256, rope_theta=500000.0)
SMOLLM2_135M = Model("SmolLM2-135M", 576, 30, 9, 3, 64, 1536, 49152, rope_theta=100000.0)

MODELS = (
    DEEPSEEK_V3,
    DEEPSEEK_V2_LITE,
    QWEN3_30B_A3B,
    MIXTRAL_8X7B,
    GPT_OSS_20B,
    LONGFORMER_BASE,
    LLAMA3_8B,
    SMOLLM2_135M,
)
