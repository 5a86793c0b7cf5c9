"""Quantisation to e4m3 in blocks, in both directions at once, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm
from ..shapes import DEEPSEEK_V3 as M

F8 = torch.float8_e4m3fn
EPS = 1e-12


def codes(blocks, dims):
    """The exact rule on float32 blocks that ``dims`` run through: codes and dequantisation scales."""
    amax = torch.where(blocks.isfinite(), blocks.abs(), 0.0).amax(dims, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax.clamp(min=EPS) / 448)
    return (blocks / scale).clamp(-448, 448).to(F8), scale


def rows(x):
    """1 x 128 blocks of [M, K]."""
    q, scale = codes(x.float().unflatten(-1, (-1, 128)), (-1,))
    return q.flatten(-2), scale[..., 0]


def tiles(x):
    """128 x 128 blocks of [M, K]."""
    q, scale = codes(x.float().unflatten(-1, (-1, 128)).unflatten(0, (-1, 128)), (1, 3))
    return q.flatten(2, 3).flatten(0, 1), scale[:, 0, :, 0]


def dual(x):
    return (*rows(x), *rows(x.t()))


def widen(q, scale):
    return (q.float().unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2).bfloat16()


def copy(x):
    return x.clone()


def values(rows: int, columns: int):
    def inputs(device, generator):
        return (normal((rows, columns), torch.bfloat16, device, generator),)

    return inputs


def quantised(rows: int, columns: int):
    def inputs(device, generator):
        return tilefuse.fp8_quantize(*values(rows, columns)(device, generator))

    return inputs


def torchao():
    from torchao.kernel.blockwise_quantization import fp8_blockwise_act_quant

    return lambda x: fp8_blockwise_act_quant(x, 128)


def cases() -> Iterator[Case]:
    k = M.hidden
    for tokens, suite, devices in (
        (4096, "quick", ("cpu", "cuda")),
        (1, "full", ("cpu", "cuda")),
        (16384, "full", ("cuda",)),
    ):
        yield Case(
            op="fp8_quantize",
            name=f"{M.name} hidden, {tokens} x {k}, blocks 1 x 128",
            dtype="bfloat16",
            inputs=values(tokens, k),
            oracle_inputs=values(256, k) if tokens > 256 else None,
            run=tilefuse.fp8_quantize,
            exact=True,
            naive=rows,
            peers={
                "eager": rows,
                "torch.compile": compiled(rows),
                "torchao": Peer(load=torchao, devices=("cuda",), package="torchao"),
                "SGLang, by rows": vllm.quantize_fp8e4m3_vec(),
                "copy": Peer(copy, yardstick=True),
            },
            bytes=tokens * (3 * k + k // 32),
            call_cost=tokens == 1,
            suite=suite,
            devices=devices,
        )

    weight = (2 * M.moe_intermediate, k)
    yield Case(
        op="fp8_quantize",
        name=f"{M.name} expert gate and up, {weight[0]} x {weight[1]}, blocks 128 x 128",
        dtype="bfloat16",
        inputs=values(*weight),
        oracle_inputs=values(256, k),
        run=lambda x: tilefuse.fp8_quantize(x, block=(128, 128)),
        exact=True,
        naive=tiles,
        peers={"eager": tiles, "torch.compile": compiled(tiles), "copy": Peer(copy, yardstick=True)},
        bytes=weight[0] * (3 * weight[1] + weight[1] // 128 // 32),
    )

    for tokens, suite, devices in ((1024, "quick", ("cpu", "cuda")), (16384, "full", ("cuda",))):
        yield Case(
            op="fp8_quantize_dual",
            name=f"{M.name} hidden, {tokens} x {k}",
            dtype="bfloat16",
            inputs=values(tokens, k),
            oracle_inputs=values(256, k),
            run=tilefuse.fp8_quantize_dual,
            exact=True,
            naive=dual,
            peers={"eager": dual, "torch.compile": compiled(dual), "copy": Peer(copy, yardstick=True)},
            bytes=tokens * (4 * k + 2 * (k // 32)),
            suite=suite,
            devices=devices,
        )
        yield Case(
            op="fp8_dequantize",
            name=f"{M.name} hidden, {tokens} x {k}",
            dtype="float8_e4m3fn",
            inputs=quantised(tokens, k),
            oracle_inputs=quantised(256, k),
            run=tilefuse.fp8_dequantize,
            exact=True,
            naive=widen,
            peers={"eager": widen, "torch.compile": compiled(widen)},
            bytes=tokens * (3 * k + k // 32),
            suite=suite,
            devices=devices,
        )
