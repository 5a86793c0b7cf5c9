"""Modules over the ops of tilefuse, state-dict compatible with the Hugging Face modules that they replace.

Parameters have Hugging Face's names and shapes, so ``load_state_dict`` works in both directions. Constructors take
``device`` and ``dtype`` like those of ``torch.nn`` (also the meta device), ``reset_parameters(generator)`` draws the
same weights from the same seed, and nothing here imports ``transformers``.
"""

from .block_sparse_attention import BlockSparseAttention
from .distillation_loss import DistillationLoss
from .fp8_linear import FP8Linear
from .gated_mlp import GatedMLP
from .linear_cross_entropy import LinearCrossEntropy
from .moe import MoE, Routing
from .mtp_loss import MTPLoss
from .multihead_latent_attention import MultiheadLatentAttention
from .paged_cache import PagedKVCache, PagedLatentCache
from .policy_loss import PolicyLoss
from .qat_linear import QATLinear
from .rms_norm import RMSNorm
from .rotary_embedding import RotaryEmbedding
from .window_attention import WindowAttention

__all__ = [
    "BlockSparseAttention",
    "DistillationLoss",
    "FP8Linear",
    "GatedMLP",
    "LinearCrossEntropy",
    "MTPLoss",
    "MoE",
    "MultiheadLatentAttention",
    "PagedKVCache",
    "PagedLatentCache",
    "PolicyLoss",
    "QATLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "Routing",
    "WindowAttention",
]
