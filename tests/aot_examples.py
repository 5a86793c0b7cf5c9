"""Kernels that the resource gate's own tests compile: clean, narrow, spilling, unsupported, and one in no case."""

import triton
import triton.language as tl

from tilefuse.testing.aot import AotCase


@triton.jit
def scale(x, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


@triton.jit
def matmul(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + start + inner[None, :])
        right = tl.load(b + cols[:, None] * k + start + inner[None, :])
        total = tl.dot(left, right.T, total)
    tl.store(c + rows[:, None] * N + cols[None, :], total)


@triton.jit
def forgotten(x):
    tl.store(x, 0.0)


def launch_forgotten(x):
    forgotten[(1,)](x)


def aot_cases():
    pointers = {"x": "*bf16", "out": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    yield AotCase(
        "wide", scale, pointers, {"BLOCK": 1024}, {"num_warps": 4}, divisible=("x", "out", "n"), expect=("LDG.128",)
    )
    # without known alignment the accesses are 16 bits wide
    yield AotCase("narrow", scale, pointers, {"BLOCK": 1024}, {"num_warps": 4}, divisible=(), expect=("LDG.128",))
    tiles = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "k": "i32"} | dict.fromkeys("MNK", "constexpr")
    yield AotCase(
        "tile",
        matmul,
        tiles,
        {"M": 64, "N": 64, "K": 64},
        {"num_warps": 4, "num_stages": 2},
        divisible=("a", "b", "c", "k"),
        expect={
            "sm_80": ("HMMA",),
            "sm_90": ("HGMMA",),
            "sm_100": ("UTCHMMA|HMMA",),
            "nvidia": ("MMA",),
            "gfx942": ("MMA",),
        },
    )
    big = {"M": 256, "N": 256, "K": 64}
    yield AotCase("spilling", matmul, tiles, big, {"num_warps": 4, "num_stages": 2}, targets=("sm_80",))
    yield AotCase("unsupported", scale, {**pointers, "x": "*fp8e4nv"}, {"BLOCK": 64}, targets=("sm_80",))
