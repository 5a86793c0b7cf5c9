"""FP8 matmul of each expert's rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse
from tilefuse import fp8_layout

from ..harness import Case, Peer, normal
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B
from .matmul import expanded


def each_expert(dtype):
    """Widened operands, a matmul per expert; where the rows begin must come to the host."""

    def run(a, a_scale, b, b_scale, offsets):
        wide = expanded(a, a_scale, dtype)
        bounds = offsets.tolist()
        parts = [
            wide[lo:hi] @ expanded(w, s, dtype).mT for lo, hi, w, s in zip(bounds, bounds[1:], b, b_scale) if hi > lo
        ]
        out = torch.cat(parts)
        return out if dtype == torch.float64 else out.bfloat16()

    return run


def bf16_operands(a, a_scale, b, b_scale, offsets):
    wide = torch.stack([expanded(w, s, torch.bfloat16) for w, s in zip(b, b_scale)])
    return expanded(a, a_scale, torch.bfloat16), wide, offsets[1:].int()


def bf16_grouped(a, b, ends):
    return F.grouped_mm(a, b.mT, offs=ends)


def deep_gemm_operands(a, a_scale, b, b_scale, offsets):
    """Its groups begin at multiples of 128 rows; here they all do."""
    experts = torch.arange(b.shape[0], device=a.device, dtype=torch.int32)
    expert_of_row = experts.repeat_interleave(offsets.diff().long())
    out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    return (a, fp8_layout.to_deepgemm(a_scale)), (b, b_scale.contiguous()), out, expert_of_row


def deep_gemm():
    from deep_gemm import m_grouped_fp8_gemm_nt_contiguous

    def run(a, b, out, expert_of_row):
        m_grouped_fp8_gemm_nt_contiguous(a, b, out, expert_of_row)
        return out

    return run


def inputs_of(rows: int, experts: int, n: int, k: int, multiple: int):
    """Uneven groups, of ``multiple`` rows or several times that."""

    def inputs(device, generator):
        a = tilefuse.fp8_quantize(normal((rows, k), torch.bfloat16, device, generator))
        weights = [
            tilefuse.fp8_quantize(normal((n, k), torch.bfloat16, device, generator, k**-0.5), block=(128, 128))
            for _ in range(experts)
        ]
        # float8 tensors have no stack of their own everywhere
        codes = torch.stack([q.view(torch.uint8) for q, _ in weights]).view(torch.float8_e4m3fn)
        scales = torch.stack([s for _, s in weights])
        expert = torch.randint(0, experts, (rows // multiple,), generator=generator, device=device)
        counts = torch.zeros(experts, dtype=torch.int64, device=device)
        counts.index_add_(0, expert, torch.full_like(expert, multiple))
        return *a, codes, scales, F.pad(counts.cumsum(0), (1, 0)).int()

    return inputs


def cases() -> Iterator[Case]:
    for m, experts, rows, multiple, suite, devices in (
        # an eighth of the layer, as one of eight devices holds it
        (QWEN3_30B_A3B, 16, 512, 1, "quick", ("cpu", "cuda")),
        (QWEN3_30B_A3B, 128, 262144, 128, "full", ("cuda",)),
        (DEEPSEEK_V3, 32, 32768, 128, "full", ("cuda",)),
    ):
        n, k = 2 * m.moe_intermediate, m.hidden
        # an expert without rows would not be read; so many rows leave half of them out but never
        read = experts // 2
        yield Case(
            op="fp8_grouped_matmul",
            name=f"{m.name} gate and up, {experts} of {m.experts} experts, {rows} rows",
            dtype="float8_e4m3fn",
            inputs=inputs_of(rows, experts, n, k, multiple),
            oracle_inputs=inputs_of(max(128, 4 * multiple), 4, 256, 512, multiple),
            run=tilefuse.fp8_grouped_matmul,
            oracle=each_expert(torch.float64),
            naive=each_expert(torch.bfloat16),
            peers={
                "eager": each_expert(torch.bfloat16),
                "bfloat16 grouped_mm": Peer(bf16_grouped, prepare=bf16_operands, yardstick=True),
                "DeepGEMM": Peer(load=deep_gemm, prepare=deep_gemm_operands, devices=("cuda",), package="deep-gemm"),
            },
            bytes=rows * (k + k // 32 + 2 * n) + read * n * k,
            flops=2 * rows * n * k,
            suite=suite,
            devices=devices,
        )
