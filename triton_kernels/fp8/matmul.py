"""Block-scaled e4m3 matmul.

Every kernel starts a fresh accumulator each 128 of K, scales the finished product in float32 and adds it to a float32
sum: Hopper's FP8 tensor cores keep about 14 bits inside one accumulator, and the scales change there anyway.

* ``fp8_matmul_fwd_kernel``: loads through pointers; any GPU, any strides, any sizes. sm_80 has no FP8 at all: codes
  are loaded as bytes and widened to bfloat16, which holds them exactly. For few rows the operands swap places, so that
  the weight fills the matrix unit's 64 rows and the activation its narrow side; where a weight has too few columns for
  all multiprocessors, K is split among programs, and ``fp8_matmul_fwd_sum_kernel`` adds the parts in a fixed order.
* ``fp8_matmul_fwd_tma_kernel``: sm_90; persistent, loads through TMA descriptors made on the device, and
  warp-specialised by the compiler: one warp group loads while two others, out of phase, multiply and add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ... import arch
from ..common import fp8, tuned
from ..common.grouped import tile_order
from ..common.launch import constants, on_device, scratch

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _load_codes(ptr, mask, UPCAST: tl.constexpr):
    """A tile of operands for the matrix unit: e4m3, or bfloat16 from e4m3 bytes."""
    if UPCAST:
        return fp8.decode(tl.load(ptr, mask, 0)).to(tl.bfloat16)
    else:
        return tl.load(ptr, mask, 0.0)


@triton.jit
def _row_factor(sa, sb):
    """Product of two scales, kept finite: zero codes times an overflown product would be NaN."""
    return tl.minimum(sa * sb, FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_scaled(acc, product, sa_ptr, sb_ptr, row_mask, col, n, sb_sn, B_ROWS: tl.constexpr, SWAP: tl.constexpr):
    """acc + product * scales. ``sa_ptr`` [BLOCK_M] points at each row's scale of this K block, ``sb_ptr`` at b's."""
    sa = tl.load(sa_ptr, row_mask, 0.0)
    if B_ROWS:
        sb = tl.load(sb_ptr + col * sb_sn, col < n, 0.0)
        if SWAP:
            return acc + product * _row_factor(sb[:, None], sa[None, :])
        else:
            return acc + product * _row_factor(sa[:, None], sb[None, :])
    else:
        # all columns of the tile share one scale; loaded as a vector, since the pipeliner may race on a scalar
        sb = tl.load(sb_ptr + tl.zeros_like(sa).to(tl.int32))
        factor = _row_factor(sa, sb)
        if SWAP:
            return acc + product * factor[None, :]
        else:
            return acc + product * factor[:, None]


@triton.jit
def accumulate(
    a_ptr,
    a_sm,
    sa_ptr,
    sa_sm,
    sa_sk,
    b_ptr,
    b_sn,
    sb_ptr,
    sb_sn,
    sb_sk,
    row,
    row_mask,
    col,
    n,
    k,
    first,
    last,
    B_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] (SWAP: transposed) of one tile's rows (int64) and columns, K blocks [first, last)."""
    inner = tl.arange(0, 128)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_row = a_ptr + row[:, None] * a_sm + inner[None, :]
    b_row = b_ptr + col.to(tl.int64)[:, None] * b_sn + inner[None, :]
    sa_row = sa_ptr + row * sa_sm
    if not B_ROWS:
        sb_ptr += tl.min(col, 0) // 128 * sb_sn
    a_mask = row_mask[:, None]
    b_mask = (col < n)[:, None]
    for block in range(first, last):
        if not EVEN_K:
            inside = (inner < k - block * 128)[None, :]
            a_mask = row_mask[:, None] & inside
            b_mask = (col < n)[:, None] & inside
        # [BLOCK_M, 128], [BLOCK_N, 128]
        a = _load_codes(a_row + block * 128, a_mask, UPCAST)
        b = _load_codes(b_row + block * 128, b_mask, UPCAST)
        if SWAP:
            product = tl.dot(b, tl.trans(a))
        else:
            product = tl.dot(a, tl.trans(b))
        acc = _add_scaled(
            acc, product, sa_row + block * sa_sk, sb_ptr + block * sb_sk, row_mask, col, n, sb_sn, B_ROWS, SWAP
        )
    return acc


@triton.jit
def store_tile(acc, out_ptr, bias_ptr, row, row_mask, col, n, SWAP: tl.constexpr):
    """Adds the bias and rounds once; out is [M, N] contiguous."""
    if SWAP:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, col < n, 0.0)[None, :]
    mask = row_mask[:, None] & (col < n)[None, :]
    tl.store(out_ptr + row[:, None] * n + col[None, :], acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["m", "sa_sk", "per_part"])
def fp8_matmul_fwd_kernel(
    a_ptr,
    a_sm,
    sa_ptr,
    sa_sm,
    sa_sk,
    b_ptr,
    b_sn,
    sb_ptr,
    sb_sn,
    sb_sk,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    per_part,
    B_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of out. SPLIT: of parts [parts, M, N] float32, each the sum over ``per_part`` K blocks."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = 0
    last = tl.cdiv(k, 128)
    if SPLIT:
        part = tl.program_id(1)
        first = part * per_part
        last = tl.minimum(first + per_part, last)
        out_ptr += part.to(tl.int64) * m * n
    acc = accumulate(
        a_ptr,
        a_sm,
        sa_ptr,
        sa_sm,
        sa_sk,
        b_ptr,
        b_sn,
        sb_ptr,
        sb_sn,
        sb_sk,
        row,
        row < m,
        col,
        n,
        k,
        first,
        last,
        B_ROWS,
        UPCAST,
        SWAP,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
    )
    store_tile(acc, out_ptr, bias_ptr, row, row < m, col, n, SWAP)


@triton.jit(do_not_specialize=["m", "parts"])
def fp8_matmul_fwd_sum_kernel(part_ptr, bias_ptr, out_ptr, m, n, parts, BLOCK: tl.constexpr):
    """out [M, N] from parts [parts, M, N], added in their order, with the bias and one rounding."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < m * n
    acc = tl.load(part_ptr + at, mask, 0.0)  # [BLOCK]
    for _ in range(1, parts):
        part_ptr += m * n
        acc += tl.load(part_ptr + at, mask, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % n, mask, 0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["m", "sa_sk"])
def fp8_matmul_fwd_tma_kernel(
    a_ptr,
    a_sm,
    sa_ptr,
    sa_sm,
    sa_sk,
    b_ptr,
    b_sn,
    sb_ptr,
    sb_sn,
    sb_sk,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    B_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Tiles program_id, program_id + programs, ..; TMA fills what lies outside of a or b with zeros."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [m, k], [a_sm, 1], [BLOCK_M, 128])
    b_desc = tl.make_tensor_descriptor(b_ptr, [n, k], [b_sn, 1], [BLOCK_N, 128])
    m_tiles = tl.cdiv(m, BLOCK_M)
    n_tiles = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        tile_m, tile_n = tile_order(tile, m_tiles, n_tiles, GROUP_M)
        row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(tl.cdiv(k, 128)):
            a = a_desc.load([tile_m * BLOCK_M, block * 128])  # [BLOCK_M, 128]
            b = b_desc.load([tile_n * BLOCK_N, block * 128])
            product = tl.dot(a, b.T)
            sb = sb_ptr + block * sb_sk
            if not B_ROWS:
                sb += tile_n * BLOCK_N // 128 * sb_sn
            acc = _add_scaled(
                acc, product, sa_ptr + row * sa_sm + block * sa_sk, sb, row < m, col, n, sb_sn, B_ROWS, False
            )
        store_tile(acc, out_ptr, bias_ptr, row, row < m, col, n, False)


@dataclass(frozen=True)
class Config:
    """Tile of one program. ``tma``: the persistent kernel, warp-specialised where it runs with 4 warps. ``split``:
    programs that share the K of a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swap: bool = False
    tma: bool = False
    split: int = 1


def narrow(m: int, capability: int, b_rows: bool = False) -> Config:
    """Few rows: the weight takes the matrix unit's wide side. sm_80 widens 64 rows in registers and needs 8 warps."""
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n = 32 if capability == 80 and block_m == 64 and b_rows else 64
    warps = 8 if capability == 80 and block_m == 64 else 4
    return Config(block_m, block_n, warps, 3 if capability in (0, 80) else 4, swap=True)


def split_of(n: int, k: int, num_sms: int) -> int:
    """Parts of K for few rows: two programs for each multiprocessor, of 8 K blocks at least, so that what the parts
    write stays well below the weight. The same for every M <= 64, whose rows so keep their bits."""
    parts = min(2 * num_sms // triton.cdiv(n, 64), triton.cdiv(k, 128) // 8, 8)
    return 1 << (parts.bit_length() - 1) if parts > 1 else 1


def config(
    m: int, n: int, capability: int, *, tma: bool, num_sms: int = 132, b_rows: bool = False, k: int = 0
) -> Config:
    """The tile for a shape on an architecture (90 for sm_90; 0 for AMD and the interpreter)."""
    if m <= 64:
        # decode reads the weight once: narrow column tiles make enough programs to fill the memory system
        return replace(narrow(m, capability, b_rows), split=split_of(n, k, num_sms))
    if capability == 80 and b_rows:
        # a scale for each column: wider tiles spill
        return Config(64, 32, 8, 3)
    if capability < 89:
        return Config(64, 64, 8 if capability else 4, 3 if capability else 2)
    if capability in (89, 120):
        # 99 KiB of shared memory; 4 warps would spill
        return Config(64, 128, 8, 3)
    # sm_100 spills on the larger tile with a scale for each column
    if triton.cdiv(m, 128) * triton.cdiv(n, 128) < num_sms or (capability >= 100 and b_rows):
        return Config(64, 128, 4, 4)
    # without descriptors 8 warps hold the tile without spilling; with them the compiler makes 12 of 4
    return Config(128, 128, 4, 4, tma=True) if tma else Config(128, 128, 8, 3)


# what `python -m tilefuse tune` tries; all columns of a tile share one scale, so none is wider than 128
TILES = ((16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4))
CONFIGS = {
    "fp8_matmul": tuple(
        {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
        for block_m, block_n, warps in (*TILES, (128, 128, 8))
        for stages in (3, 4, 5)
    )
}


def fits_tma(capability: int, *tensors: torch.Tensor) -> bool:
    """Whether the TMA kernel takes these e4m3 tensors: sm_90 (it spills on sm_100), 16-byte aligned base and rows."""
    return 90 <= capability < 100 and all(
        t.stride(-2) % 16 == 0 and t.stride(-2) > 0 and t.data_ptr() % 16 == 0 and t.shape[-1] > 0 for t in tensors
    )


def capability_of(device: torch.device) -> int:
    return arch.capability(arch.of(device)) if device.type == "cuda" else 0


def upcasts(device: torch.device) -> bool:
    """Whether e4m3 operands must be widened for the matrix unit."""
    return device.type == "cuda" and capability_of(device) < 89


def operand(x: torch.Tensor) -> torch.Tensor:
    """What a kernel gets for e4m3 codes: bytes where it widens them."""
    return x.view(torch.uint8) if upcasts(x.device) else x


def fp8_matmul_fwd(a, a_scale, b, b_scale, bias, out_dtype):
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    capability = capability_of(a.device)
    num_sms = 132
    if a.device.type == "cuda":
        num_sms = arch.multiprocessors(a.device)
    b_rows = b_scale.shape[0] == n
    tile = config(m, n, capability, tma=fits_tma(capability, a, b), num_sms=num_sms, b_rows=b_rows, k=k)
    key = f"n={n},k={k},m<={min(8192, max(16, triton.next_power_of_2(m)))},b_rows={b_rows}"
    tile = tuned.choose("fp8_matmul", key, a.device, tile)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    scaled_a = operand(a), a.stride(0), a_scale, *a_scale.stride()
    scaled_b = operand(b), b.stride(0), b_scale, *b_scale.stride()
    if tile.tma:
        with on_device(a), scratch(a.device):
            fp8_matmul_fwd_tma_kernel[(min(tiles, num_sms),)](
                *scaled_a,
                *scaled_b,
                bias,
                out,
                m,
                n,
                k,
                B_ROWS=b_rows,
                GROUP_M=8,
                SPECIALIZE=tile.num_warps == 4,
                **constants(tile),
            )
        return out
    split = tile.split > 1
    parts = out.new_empty((tile.split, m, n), dtype=torch.float32) if split else out
    with on_device(a):
        fp8_matmul_fwd_kernel[(tiles, tile.split)](
            *scaled_a,
            *scaled_b,
            None if split else bias,
            parts,
            m,
            n,
            k,
            triton.cdiv(triton.cdiv(k, 128), tile.split),
            B_ROWS=b_rows,
            UPCAST=upcasts(a.device),
            SWAP=tile.swap,
            EVEN_K=k % 128 == 0,
            GROUP_M=8,
            SPLIT=split,
            **constants(tile),
        )
        if split:
            fp8_matmul_fwd_sum_kernel[(triton.cdiv(m * n, 512),)](
                parts, bias, out, m, n, tile.split, BLOCK=512, num_warps=4
            )
    return out


MATRIX_UNIT = {"sm_80": ("HMMA",), "sm_89": ("QMMA",), "sm_90": ("QGMMA",), "sm_100": ("UTCQMMA",), "sm_120": ("QMMA",)}


def aot_cases():
    from ...testing.aot import AotCase, call, tensor

    k = 7168
    # 7168 columns are few enough to split 7168 of K, 24576 are not
    for m, n in ((1, 24576), (1, 7168), (64, 24576), (64, 7168), (128, 7168), (4096, 7168)):
        for name, b_rows in (("tiles", n // 128), ("rows", n)):
            a, b = tensor("fp8", m, k), tensor("fp8", n, k)
            scales = tensor("fp32", m, k // 128), tensor("fp32", b_rows, k // 128)
            yield AotCase(
                f"m{m}_n{n}_{name}",
                call("fp8_matmul", a, scales[0], b, scales[1], tensor("fp32", n)),
                expect=MATRIX_UNIT | {"fp8_matmul_fwd_sum_kernel": ()},
            )
