"""FP8 matmul with block scales: DeepSeek-V3's projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse
from tilefuse import fp8_layout

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm, zentorch
from ..shapes import DEEPSEEK_V3 as M
from .quantize import rows


def expanded(q, scale, dtype):
    """Values of codes with 1 x 128 or 128 x 128 scales, told apart as the op does."""
    if scale.shape[-2] != q.shape[-2]:
        scale = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
    scale = scale.to(dtype if dtype == torch.float64 else torch.float32)
    return (q.to(scale.dtype).unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2).to(dtype)


def dequantised(dtype):
    """Both operands widened, then PyTorch's matmul."""

    def run(a, a_scale, b, b_scale):
        return (expanded(a, a_scale, dtype) @ expanded(b, b_scale, dtype).mT).bfloat16()

    return run


def oracle(a, a_scale, b, b_scale):
    return expanded(a, a_scale, torch.float64) @ expanded(b, b_scale, torch.float64).mT


def plain_matmul(dtype) -> Peer:
    """PyTorch's matmul of the same shape on operands that are wide already."""

    def prepare(a, a_scale, b, b_scale):
        return expanded(a, a_scale, dtype), expanded(b, b_scale, dtype)

    return Peer(lambda a, b: a @ b.mT, prepare=prepare, yardstick=True)


def scaled_mm_operands(a, a_scale, b, b_scale):
    return (
        a,
        fp8_layout.to_scaled_mm(a_scale.contiguous()),
        b.t(),
        fp8_layout.to_scaled_mm(b_scale, (128, 128)),
    )


def scaled_mm():
    from torch.nn.functional import ScalingType, SwizzleType
    from torch.nn.functional import scaled_mm as torch_scaled_mm

    def run(a, a_scale, b, b_scale):
        return torch_scaled_mm(
            a,
            b,
            a_scale,
            ScalingType.BlockWise1x128,
            b_scale,
            ScalingType.BlockWise128x128,
            swizzle_a=SwizzleType.NO_SWIZZLE,
            swizzle_b=SwizzleType.NO_SWIZZLE,
            output_dtype=torch.bfloat16,
        )

    return run


def deep_gemm_operands(a, a_scale, b, b_scale):
    out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    left = a, fp8_layout.to_deepgemm(a_scale)
    return left, (b, fp8_layout.to_deepgemm(b_scale, (128, 128))), out


def deep_gemm():
    from deep_gemm import fp8_gemm_nt

    def run(a, b, out):
        fp8_gemm_nt(a, b, out)
        return out

    return run


def inputs_of(m: int, n: int, k: int):
    def inputs(device, generator):
        a = normal((m, k), torch.bfloat16, device, generator)
        b = normal((n, k), torch.bfloat16, device, generator, k**-0.5)
        return *tilefuse.fp8_quantize(a), *tilefuse.fp8_quantize(b, block=(128, 128))

    return inputs


def linear_inputs(m: int, n: int, k: int):
    def inputs(device, generator):
        x = normal((m, k), torch.bfloat16, device, generator)
        w = normal((n, k), torch.bfloat16, device, generator, k**-0.5)
        return x, *tilefuse.fp8_quantize(w, block=(128, 128))

    return inputs


def linear(x, w, scale):
    """An FP8 layer at inference: quantises x, multiplies by weights that are quantised already."""
    return tilefuse.fp8_matmul(*tilefuse.fp8_quantize(x), w, scale)


def linear_on(dtype):
    def run(x, w, scale):
        return dequantised(dtype)(*rows(x.float()), w, scale)

    return run


def linear_oracle(x, w, scale):
    # the codes of the bf16 x: the rule is exact
    return oracle(*rows(x), w, scale)


def wide(w, scale):
    return expanded(w, scale, torch.bfloat16)


def packed(x, w, scale):
    return x, None, tilefuse.pack_weight(w, scale, format="fp8")


def w8a16_oracle(x, w, scale):
    return x.double() @ expanded(w, scale, torch.float64).mT


def w8a16_naive(x, w, scale):
    return F.linear(x, wide(w, scale))


def linear_cases() -> Iterator[Case]:
    for m, n, k in ((1, 2048, 7168), (16, 2048, 7168), (64, 7168, 2048), (512, 2048, 7168)):
        for w8a16 in (True, False):
            # none of the peers rounds x to FP8, as W8A8 does: by that rounding they are off from it
            other = {} if w8a16 else {"error": 0.04}
            form = "W8A16, packed" if w8a16 else "with fp8_quantize"
            yield Case(
                op="fp8_matmul",
                name=f"{M.name} linear, {form}, {m} x {n} x {k}",
                dtype="bfloat16",
                inputs=linear_inputs(m, n, k),
                oracle_inputs=linear_inputs(min(m, 64), 256, 1024),
                run=tilefuse.fp8_matmul if w8a16 else linear,
                prepare=packed if w8a16 else None,
                oracle=w8a16_oracle if w8a16 else linear_oracle,
                upcast=(),
                naive=w8a16_naive if w8a16 else linear_on(torch.bfloat16),
                peers={
                    "eager": Peer(w8a16_naive) if w8a16 else linear_on(torch.bfloat16),
                    "torch.compile": compiled(w8a16_naive if w8a16 else linear_on(torch.bfloat16)),
                    "bfloat16 linear": Peer(F.linear, prepare=lambda x, *w: (x, wide(*w)), **other),
                    "SGLang W8A16": vllm.fp8_scaled_mm_cpu(**other),
                    "SGLang bf16": vllm.weight_packed_linear(wide, **other),
                    "SGLang int8": vllm.int8_scaled_mm_with_quant(wide, yardstick=True),
                    "zentorch bf16": zentorch.zentorch_linear_unary(wide, **other),
                },
                bytes=2 * m * k + n * k + 2 * m * n,
                flops=2 * m * n * k,
                reads=m <= 16,
                suite="quick" if w8a16 else "full",
                devices=("cpu",) if w8a16 else ("cpu", "cuda"),
            )


def cases() -> Iterator[Case]:
    yield from linear_cases()
    shapes = [
        # CPU, and decode
        (512, 2048, 7168, "full", ("cpu",)),
        (512, 2048, 7168, "quick", ("cuda",)),
        (1, 2048, 7168, "full", ("cpu", "cuda")),
        (64, 7168, 2048, "full", ("cpu", "cuda")),
    ]
    # output of attention, gate and up, down-projection of queries and keys, down
    gpu = ((7168, 16384), (4096, 7168), (2112, 7168), (7168, 2048))
    shapes += [(m, n, k, "full", ("cuda",)) for m in (64, 4096) for n, k in gpu if (m, n, k) != (64, 7168, 2048)]
    for m, n, k, suite, devices in shapes:
        yield Case(
            op="fp8_matmul",
            name=f"{M.name}, {m} x {n} x {k}",
            dtype="float8_e4m3fn",
            inputs=inputs_of(m, n, k),
            oracle_inputs=inputs_of(min(m, 64), 256, 1024),
            run=tilefuse.fp8_matmul,
            oracle=oracle,
            naive=dequantised(torch.bfloat16),
            peers={
                "eager": dequantised(torch.bfloat16),
                "torch.compile": compiled(dequantised(torch.bfloat16)),
                "float32 matmul": plain_matmul(torch.float32),
                "bfloat16 matmul": plain_matmul(torch.bfloat16),
                "scaled_mm": Peer(load=scaled_mm, prepare=scaled_mm_operands, devices=("cuda",)),
                "DeepGEMM": Peer(load=deep_gemm, prepare=deep_gemm_operands, devices=("cuda",), package="deep-gemm"),
            },
            bytes=m * k + n * k + 2 * m * n + m * k // 32,
            flops=2 * m * n * k,
            reads=m <= 16,
            suite=suite,
            devices=devices,
        )
