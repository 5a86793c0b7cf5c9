"""tilefuse: fused CUDA/Triton kernels for DeepSeek-style language models, as PyTorch ops with CPU parity.

Every op is reachable twice with the same name, argument order and defaults: as the documented function
``tilefuse.<op>`` and as ``torch.ops.tilefuse.<op>``. ``tilefuse.ops()`` lists them.
"""

# first: importing the package `ops` binds its name here, which the function `ops` takes over below
from . import nn
from .backends import backend
from .library import explain, ops
from .ops.attention.block_pattern import BlockPattern, block_pattern
from .ops.attention.block_sparse_attention import block_sparse_attention
from .ops.attention.global_attention import global_attention
from .ops.attention.paged_attention import paged_attention
from .ops.attention.t5_distance_bias import t5_distance_bias
from .ops.attention.window_attention import window_attention, window_from
from .ops.fp8.fused_linear import rms_norm_fp8_linear, silu_mul_fp8_linear
from .ops.fp8.grouped_matmul import fp8_grouped_matmul
from .ops.fp8.linear import fp8_linear
from .ops.fp8.matmul import fp8_matmul
from .ops.fp8.quantize import fp8_dequantize, fp8_quantize, fp8_quantize_dual
from .ops.fp8.rms_norm_quantize import rms_norm_quantize
from .ops.fp8.silu_mul_quantize import silu_mul_quantize
from .ops.loss.cross_entropy import cross_entropy
from .ops.loss.distillation import distillation
from .ops.loss.linear_cross_entropy import linear_cross_entropy
from .ops.loss.linear_distillation import linear_distillation
from .ops.loss.linear_logprobs import linear_logprob_stats, linear_logprobs, merge_logprobs
from .ops.loss.linear_topk_distillation import linear_topk_distillation
from .ops.loss.logprobs import logprobs
from .ops.loss.mtp_targets import mtp_targets
from .ops.loss.policy_loss import policy_loss
from .ops.loss.preference_loss import preference_loss, sequence_logp
from .ops.lowbit.fake_quantize import fake_quantize
from .ops.lowbit.int8_matmul import int8_matmul
from .ops.lowbit.lowbit_matmul import lowbit_matmul
from .ops.lowbit.quantize import int_dequantize, int_quantize
from .ops.mla.merge_attention import merge_attention
from .ops.mla.mla_absorb_query import mla_absorb_query
from .ops.mla.mla_append_kv import mla_append_kv
from .ops.mla.mla_attention import mla_attention
from .ops.mla.mla_compress_kv import mla_compress_kv
from .ops.mla.mla_decode import mla_decode, mla_sparse_decode
from .ops.mla.mla_expand_kv import mla_expand_kv
from .ops.mla.mla_gather_kv import mla_gather_kv
from .ops.moe.grouped_matmul import grouped_matmul
from .ops.moe.moe_apply_capacity import moe_apply_capacity
from .ops.moe.moe_combine import moe_combine
from .ops.moe.moe_experts import moe_experts
from .ops.moe.moe_experts_fp8 import moe_experts_fp8
from .ops.moe.moe_losses import moe_balance_loss, moe_update_bias, moe_z_loss
from .ops.moe.moe_plan import moe_plan
from .ops.moe.moe_route import moe_route
from .ops.norm.gated_activation import gated_activation
from .ops.norm.rms_norm import add_rms_norm, rms_norm
from .ops.norm.rms_norm_gated import rms_norm_gated
from .ops.rope.qk_norm_rope import qk_norm_rope
from .ops.rope.rope import rope, rope_, rope_qk, rope_qk_
from .ops.rope.rope_append_kv import rope_append_kv
from .ops.rope.rope_tables import rope_tables
from .ops.rope.sinusoidal_table import sinusoidal_table
from .packing import PackedWeight, pack_weight

__version__ = "0.2.0.dev0"
__all__ = [
    "BlockPattern",
    "PackedWeight",
    "__version__",
    "add_rms_norm",
    "backend",
    "block_pattern",
    "block_sparse_attention",
    "cross_entropy",
    "distillation",
    "explain",
    "fake_quantize",
    "fp8_dequantize",
    "fp8_grouped_matmul",
    "fp8_linear",
    "fp8_matmul",
    "fp8_quantize",
    "fp8_quantize_dual",
    "gated_activation",
    "global_attention",
    "grouped_matmul",
    "int8_matmul",
    "int_dequantize",
    "int_quantize",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprob_stats",
    "linear_logprobs",
    "linear_topk_distillation",
    "logprobs",
    "lowbit_matmul",
    "merge_attention",
    "merge_logprobs",
    "mla_absorb_query",
    "mla_append_kv",
    "mla_attention",
    "mla_compress_kv",
    "mla_decode",
    "mla_expand_kv",
    "mla_gather_kv",
    "mla_sparse_decode",
    "moe_apply_capacity",
    "moe_balance_loss",
    "moe_combine",
    "moe_experts",
    "moe_experts_fp8",
    "moe_plan",
    "moe_route",
    "moe_update_bias",
    "moe_z_loss",
    "mtp_targets",
    "nn",
    "ops",
    "pack_weight",
    "paged_attention",
    "policy_loss",
    "preference_loss",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_fp8_linear",
    "rms_norm_gated",
    "rms_norm_quantize",
    "rope",
    "rope_",
    "rope_append_kv",
    "rope_qk",
    "rope_qk_",
    "rope_tables",
    "sequence_logp",
    "silu_mul_fp8_linear",
    "silu_mul_quantize",
    "sinusoidal_table",
    "t5_distance_bias",
    "window_attention",
    "window_from",
]
