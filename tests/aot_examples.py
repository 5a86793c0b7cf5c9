"""Kernels that the resource gate's own tests compile: clean, narrow, spilling, unsupported, and one in no case."""

import triton
import triton.language as tl

from tilefuse.testing.aot import AotCase, launch, tensor


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


def launch_scale(x, out, block):
    scale[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), BLOCK=block)


def launch_narrow(x, out):
    # the second element is not aligned
    launch_scale(x[1:], out[1:], 1024)


def launch_matmul(a, b, c, k):
    matmul[(1,)](a, b, c, a.shape[1], M=a.shape[0], N=b.shape[0], K=k, num_stages=2)


def aot_cases():
    x = tensor("bf16", 4096)
    yield AotCase("wide", launch(launch_scale, x, x, 1024), expect=("LDG.128",))
    # without known alignment the accesses are 16 bits wide
    yield AotCase("narrow", launch(launch_narrow, x, x), expect=("LDG.128",))
    tile = tensor("bf16", 64, 256), tensor("bf16", 64, 256), tensor("fp32", 64, 64)
    yield AotCase(
        "tile",
        launch(launch_matmul, *tile, 64),
        expect={
            "sm_80": ("HMMA",),
            "sm_90": ("HGMMA",),
            "sm_100": ("UTCHMMA|HMMA",),
            "nvidia": ("MMA",),
            "gfx942": ("MMA",),
        },
    )
    big = tensor("bf16", 256, 256), tensor("bf16", 256, 256), tensor("fp32", 256, 256)
    yield AotCase("spilling", launch(launch_matmul, *big, 64), targets=("sm_80",))
    yield AotCase("unsupported", launch(launch_scale, tensor("fp8", 4096), x, 64), targets=("sm_80",))
