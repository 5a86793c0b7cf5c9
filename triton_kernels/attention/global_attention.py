"""Window attention with global tokens.

Local rows run in window_attention's kernels: the global keys are gathered into a prefix that every tile visits, and
a byte per token takes global and padded ones out of the band. Global rows are a dense attention of few rows against
all keys, split over the keys; their results replace the rows' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arch
from ..common.flash import (
    LOG2E,
    Config,
    Head,
    Results,
    Width,
    added,
    constants_of,
    dkdv_step,
    dots,
    dq_step,
    head_of,
    load_head,
    logits,
    padded,
    row_gradients,
    scaled,
    softmax_end,
    softmax_start,
    softmax_step,
    store_head,
    values_of,
    zeros,
)
from ..common.launch import launch_options, on_device
from ..common.rows import Rows
from .chunks import merge_chunks, store_row
from .host import global_positions
from .window_attention import Prefix, Problem, backward, forward
from .window_tiles import UNBOUNDED

# keys of one program of a global row
CHUNK = tl.constexpr(1024)
COUNTS = ("sk", "count", "heads", "kv_heads", "group", "chunks")


class Constants(NamedTuple):
    """Constants of one compiled kernel."""

    QK: Width
    V: Width
    BLOCK_M: Any
    BLOCK_N: Any
    MASKED: Any
    CAUSAL: Any
    DLSE: Any
    ADD_K: Any
    ADD_V: Any


class Places(NamedTuple):
    """Tokens of the global rows, and which keys exist."""

    positions: Any  # int32 [B, count], -1 = none
    key_mask: Any  # bool [B, S]


@triton.jit
def _own_rows(places, count, heads, BLOCK_M: tl.constexpr):
    """(batch, head, numbers of the global rows, their tokens) of this program; heads run fastest."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(count, BLOCK_M)
    g = pid // heads % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (pid // heads // tiles).to(tl.int64)
    return b, pid % heads, g, _tokens(places, b, g, count)


@triton.jit
def _tokens(places, b, g, count):
    """Tokens of the global rows g, -1 where there is none."""
    return tl.load(places.positions + b * count + g, mask=g < count, other=-1).to(tl.int32)


@triton.jit
def _shown(places, b, n, sk, MASKED: tl.constexpr):
    """Which keys n exist and are not padding."""
    shown = n < sk
    if MASKED:
        shown &= tl.load(places.key_mask + b * sk + n, mask=shown, other=0) != 0
    return shown


@triton.jit
def _scores(products, at, n, visible, scale, CAUSAL: tl.constexpr):
    """Base-2 logits of raw dot products; the tokens at and n, and visible, are broadcast already."""
    s, _ = logits(products, scale, 0.0, False)
    s = tl.where(visible, s, float("-inf"))
    if CAUSAL:
        s = tl.where(n <= at, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=COUNTS)
def global_attention_fwd_kernel(
    q_rows, k_rows, v_rows, parts_ptr, part_lse_ptr, places, sk, count, heads, group, scale, C
):
    """A tile of global rows against one chunk of keys: normalised output and lse."""
    b, h, g, at = _own_rows(places, count, heads, C.BLOCK_M)
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    k_head = head_of(k_rows, b, 0, kv)
    v_head = head_of(v_rows, b, 0, kv)
    q = load_head(head_of(q_rows, b, 0, head), at, at >= 0, C.QK, True)  # [BLOCK_M, D]
    top, total = softmax_start(0.0, C.BLOCK_M, False)
    acc = zeros(C.BLOCK_M, C.V)
    start = tl.program_id(1) * CHUNK
    for n0 in tl.range(start, tl.minimum(start + CHUNK, sk), C.BLOCK_N):
        n = n0 + tl.arange(0, C.BLOCK_N)
        shown = _shown(places, b, n, sk, C.MASKED)
        k = load_head(k_head, n, shown, C.QK, True)  # [BLOCK_N, D]
        visible = shown[None, :] & (at >= 0)[:, None]
        s = _scores(dots(q, k), at[:, None], n[None, :], visible, scale, C.CAUSAL)
        v = load_head(v_head, n, shown, C.V, True)  # [BLOCK_N, DV]
        acc, top, total = softmax_step(acc, top, total, s, v)
    out, lse = softmax_end(acc, top, total)
    # [B, count, Hq, chunks, DV] and [B, Hq, count, chunks]
    row = (b * count + g) * heads + h
    parts = Head(parts_ptr + tl.program_id(1) * C.V.D, tl.num_programs(1) * C.V.D)
    store_head(parts, row, g < count, out, C.V)
    row = (b * heads + h) * count + g
    tl.store(part_lse_ptr + row * tl.num_programs(1) + tl.program_id(1), lse, mask=g < count)


@triton.jit(do_not_specialize=COUNTS)
def global_attention_fwd_merge_kernel(parts_ptr, part_lse_ptr, out_rows, lse_ptr, places, sk, count, heads, chunks, C):
    """One global row, merged and written to its token; a row that does not exist is written nowhere."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    g = tl.program_id(0) // heads % count
    b = (tl.program_id(0) // heads // count).to(tl.int64)
    at = tl.load(places.positions + b * count + g).to(tl.int64)
    row, row_lse = (b * count + g) * heads + h, (b * heads + h) * count + g
    out, lse = merge_chunks(parts_ptr, part_lse_ptr, row, row_lse, chunks, chunks, 0.0, C.V, False)
    out_head = head_of(out_rows, b, at, h)
    store_row(out_head.ptr, out, at >= 0, C.V)
    tl.store(values_of(lse_ptr, b, at, h, heads, sk), lse, mask=at >= 0)


@triton.jit(do_not_specialize=COUNTS)
def global_attention_bwd_q_kernel(
    q_rows, k_rows, v_rows, results, parts_ptr, places, sk, count, heads, group, scale, C
):
    """Partial dq of a tile of global rows from one chunk of keys; the first chunk also keeps delta for the key pass."""
    b, h, g, at = _own_rows(places, count, heads, C.BLOCK_M)
    head, kv = h.to(tl.int64), (h // group).to(tl.int64)
    k_head = head_of(k_rows, b, 0, kv)
    v_head = head_of(v_rows, b, 0, kv)
    q = load_head(head_of(q_rows, b, 0, head), at, at >= 0, C.QK, True)  # [BLOCK_M, D]
    do, delta, lse2 = row_gradients(results, b, 0, head, heads, sk, at, at >= 0, C.V, C.DLSE)
    if tl.program_id(1) == 0:
        tl.store(values_of(results.delta, b, 0, head, heads, count) + g, delta, mask=g < count)
    dq = zeros(C.BLOCK_M, C.QK)
    start = tl.program_id(1) * CHUNK
    for n0 in tl.range(start, tl.minimum(start + CHUNK, sk), C.BLOCK_N):
        n = n0 + tl.arange(0, C.BLOCK_N)
        shown = _shown(places, b, n, sk, C.MASKED)
        k = load_head(k_head, n, shown, C.QK, True)  # [BLOCK_N, D]
        visible = shown[None, :] & (at >= 0)[:, None]
        s = _scores(dots(q, k), at[:, None], n[None, :], visible, scale, C.CAUSAL)
        v = load_head(v_head, n, shown, C.V, True)  # [BLOCK_N, DV]
        dq = dq_step(dq, k, v, do, s, s, lse2, delta, False)
    # [B, count, Hq, chunks, D]
    row = (b * count + g) * heads + h
    parts = Head(parts_ptr + tl.program_id(1) * C.QK.D, tl.num_programs(1) * C.QK.D)
    store_head(parts, row, g < count, scaled(dq, scale), C.QK)


@triton.jit(do_not_specialize=COUNTS)
def global_attention_bwd_q_sum_kernel(parts_ptr, dq_rows, places, count, heads, chunks, C):
    """dq of one global row: its parts summed in order, written to its token."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    g = tl.program_id(0) // heads % count
    b = (tl.program_id(0) // heads // count).to(tl.int64)
    at = tl.load(places.positions + b * count + g).to(tl.int64)
    columns = tl.arange(0, C.QK.PAD)
    dq = tl.zeros([C.QK.PAD], tl.float32)
    parts_ptr += ((b * count + g) * heads + h) * chunks * C.QK.D
    for chunk in range(chunks):
        dq += tl.load(parts_ptr + chunk * C.QK.D + columns, mask=columns < C.QK.D, other=0.0)  # [D]
    dq_head = head_of(dq_rows, b, at, h)
    store_row(dq_head.ptr, dq, at >= 0, C.QK)


@triton.jit(do_not_specialize=COUNTS)
def global_attention_bwd_kv_kernel(
    q_rows,
    k_rows,
    v_rows,
    results,
    dk_rows,
    dv_rows,
    places,
    sk,
    count,
    kv_heads,
    group,
    scale,
    C,
):
    """dk and dv of one tile of keys from all global rows, added to float32 ones where k and v are shared."""
    pid = tl.program_id(0)
    kv = pid % kv_heads
    tiles = tl.cdiv(sk, C.BLOCK_N)
    n = pid // kv_heads % tiles * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    b = (pid // kv_heads // tiles).to(tl.int64)
    kv_head = kv.to(tl.int64)
    shown = _shown(places, b, n, sk, C.MASKED)
    k = load_head(head_of(k_rows, b, 0, kv_head), n, shown, C.QK, True)  # [BLOCK_N, D]
    v = load_head(head_of(v_rows, b, 0, kv_head), n, shown, C.V, True)  # [BLOCK_N, DV]
    dk = zeros(C.BLOCK_N, C.QK)
    dv = zeros(C.BLOCK_N, C.V)
    heads = kv_heads * group
    for member in range(group):
        head = (kv * group + member).to(tl.int64)
        q_head = head_of(q_rows, b, 0, head)
        do_head = head_of(results.dout, b, 0, head)
        lse_ptr = values_of(results.lse, b, 0, head, heads, sk)
        delta_ptr = values_of(results.delta, b, 0, head, heads, count)
        for g0 in tl.range(0, count, C.BLOCK_M):
            g = g0 + tl.arange(0, C.BLOCK_M)
            at = _tokens(places, b, g, count)
            live = at >= 0
            q = load_head(q_head, at, live, C.QK, True)  # [BLOCK_M, D]
            lse2 = tl.load(lse_ptr + at, mask=live, other=float("-inf")) * LOG2E
            delta = tl.load(delta_ptr + g, mask=g < count, other=0.0)
            visible = shown[:, None] & live[None, :]
            s = _scores(dots(k, q), at[None, :], n[:, None], visible, scale, C.CAUSAL)  # [BLOCK_N, BLOCK_M]
            do = load_head(do_head, at, live, C.V, True)  # [BLOCK_M, DV]
            dk, dv = dkdv_step(dk, dv, q, v, do, s, s, lse2, delta, False)
    dk = scaled(dk, scale)
    dk_head = head_of(dk_rows, b, 0, kv_head)
    dv_head = head_of(dv_rows, b, 0, kv_head)
    if C.ADD_K:
        dk = added(dk, load_head(dk_head, n, n < sk, C.QK, True))
    if C.ADD_V:
        dv = added(dv, load_head(dv_head, n, n < sk, C.V, True))
    store_head(dk_head, n, n < sk, dk, C.QK)
    store_head(dv_head, n, n < sk, dv, C.V)


def _rows(count: int, most: int) -> int:
    """Rows of a tile: there may be few global ones."""
    return min(max(16, triton.next_power_of_2(count)), most)


def fwd_config(head_dim: int, element_size: int, count: int, target: str) -> Config:
    if element_size > 2:
        return Config(32, 16, 4, 1) if head_dim <= 64 else Config(16, 16, 8, 1)
    # sm_120 needs registers that the others do not
    wide = head_dim <= 128 and not (arch.capability(target) == 120 and head_dim <= 64)
    return Config(_rows(count, 64), 64 if wide else 32, 4 if head_dim <= 64 else 8, 2)


def dq_config(head_dim: int, element_size: int, count: int, target: str) -> Config:
    if element_size > 2:
        return Config(32, 16, 4, 1) if head_dim <= 64 else Config(16, 16, 8, 1)
    wide = head_dim <= 64 or (head_dim <= 128 and not target.startswith("gfx"))
    block_m = 64 if head_dim <= 64 and arch.capability(target) != 120 else 32
    rows = _rows(count, block_m)
    return Config(rows, 64 if wide else 32, 4 if rows == 16 and head_dim <= 64 else 8, 1)


def dkdv_config(head_dim: int, element_size: int, count: int, target: str) -> Config:
    if element_size > 2:
        return Config(32, 16, 8, 1) if head_dim <= 64 else Config(16, 16, 8, 1)
    rows = _rows(count, 32)
    return Config(rows, 64 if head_dim <= 128 else 32, 4 if rows == 16 and head_dim <= 64 else 8, 1)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    key_mask: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    causal: bool,
    scale: float,
) -> Problem:
    batch, length = q.shape[:2]
    count = positions.shape[1]
    spare = torch.where(positions >= 0, positions, length)
    hidden = torch.zeros(batch, length + 1, dtype=torch.uint8, device=q.device).scatter_(1, spare, 1)[:, :length]
    if key_mask is not None:
        hidden = hidden | ~key_mask
    rows = positions.clamp(min=0)[:, :, None, None]
    keys, values = (x.gather(1, rows.expand(-1, -1, *x.shape[2:])) for x in (k, v))
    prefix = Prefix(count, 0 if causal else UNBOUNDED.value, keys, values, positions.int().contiguous())
    prefix = prefix if count else Prefix(0, 0)
    return Problem(q, k, v, left, right, dilation, scale, 0.0, prefix, hidden=hidden.to(torch.uint8).contiguous())


@dataclass(frozen=True)
class RowsProblem:
    """The dense attention of the global rows: tensors and options shared by its kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor  # int32 [B, count], -1 = none
    key_mask: Tensor | None
    causal: bool
    scale: float

    @property
    def rows(self) -> tuple[Rows, Rows, Rows]:
        return Rows.of(self.q), Rows.of(self.k), Rows.of(self.v)

    @property
    def places(self) -> Places:
        return Places(self.positions, self.key_mask)

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.q.shape[1], CHUNK.value)

    def counts(self, heads: int) -> tuple[int, ...]:
        """Tokens, global rows, heads that programs run over (of q or of k), heads of q per head of k."""
        return self.q.shape[1], self.positions.shape[1], heads, self.q.shape[2] // self.k.shape[2]

    def config(
        self,
        choose: Callable[[int, int, int, str], Config],
        *,
        dlse: bool = False,
        add: tuple[bool, bool] = (False,) * 2,
    ) -> tuple[Config, Constants]:
        d, dv = self.q.shape[-1], self.v.shape[-1]
        sizes = max(padded(d), padded(dv)), self.q.element_size(), self.positions.shape[1]
        tile = choose(*sizes, arch.of(self.q.device))
        flags = (self.key_mask is not None, self.causal, dlse, *add)
        return tile, constants_of(Constants, d, dv, tile.block_m, tile.block_n, *flags)


def _rows_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor | None, ...],
    positions: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
) -> RowsProblem:
    tensors = (a if a is not None else b for a, b in zip(own, (q, k, v)))
    key_mask = key_mask if key_mask is None else key_mask.contiguous()
    return RowsProblem(*tensors, positions.int().contiguous(), key_mask, causal, scale)


def global_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_index: Tensor,
    q_global: Tensor | None,
    k_global: Tensor | None,
    v_global: Tensor | None,
    key_mask: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    positions = global_positions(global_index, key_mask, q.shape[1])
    out, lse = forward(_problem(q, k, v, positions, key_mask, left, right, dilation, causal, scale))
    batch, length, heads, _ = q.shape
    count = positions.shape[1]
    if count == 0 or out.numel() == 0:
        return out, lse
    problem = _rows_problem(q, k, v, (q_global, k_global, v_global), positions, key_mask, causal, scale)
    chunks = problem.chunks
    shapes = ((batch, count, heads, chunks, v.shape[-1]), (batch, heads, count, chunks))
    parts = tuple(torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes)
    tile, compiled = problem.config(fwd_config)
    with on_device(q):
        global_attention_fwd_kernel[(batch * heads * triton.cdiv(count, tile.block_m), chunks)](
            *problem.rows, *parts, problem.places, *problem.counts(heads), scale, compiled, **launch_options(tile)
        )
        global_attention_fwd_merge_kernel[(batch * count * heads,)](
            *parts, Rows.of(out), lse, problem.places, length, count, heads, chunks, compiled, num_warps=1
        )
    return out, lse


def global_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    global_index: Tensor,
    q_global: Tensor | None,
    k_global: Tensor | None,
    v_global: Tensor | None,
    key_mask: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    positions = global_positions(global_index, key_mask, q.shape[1])
    local = _problem(q, k, v, positions, key_mask, left, right, dilation, causal, scale)
    dq, dk, dv, _, dpk, dpv = backward(local, dout, dlse, out, lse, torch.float32)
    batch, length, heads, _ = q.shape
    kv_heads, count = k.shape[2], positions.shape[1]
    own = (q_global is not None, k_global is not None, v_global is not None)
    if count and q.numel():
        # a global key is out of the band, so its row is still zero
        spare = torch.where(positions >= 0, positions, length)[:, :, None, None]
        dk, dv = (_with_rows(x, spare, part) for x, part in ((dk, dpk), (dv, dpv)))
    dqg, dkg, dvg = dq, dk, dv
    if own[0]:
        dqg = torch.zeros_like(q, memory_format=torch.contiguous_format)
    new = torch.empty if count and q.numel() else torch.zeros
    if own[1]:
        dkg = new(k.shape, dtype=k.dtype, device=k.device)
    if own[2]:
        dvg = new(v.shape, dtype=v.dtype, device=v.device)
    if count and q.numel():
        problem = _rows_problem(q, k, v, (q_global, k_global, v_global), positions, key_mask, causal, scale)
        chunks = problem.chunks
        parts = torch.empty((batch, count, heads, chunks, q.shape[-1]), dtype=torch.float32, device=q.device)
        delta = torch.empty((batch, heads, count), dtype=torch.float32, device=q.device)
        rows = (*problem.rows, Results.of(out, dout, lse, dlse, delta))
        outs = (Rows.of(dkg), Rows.of(dvg))
        tile, compiled = problem.config(dq_config, dlse=dlse is not None)
        with on_device(q):
            global_attention_bwd_q_kernel[(batch * heads * triton.cdiv(count, tile.block_m), chunks)](
                *rows, parts, problem.places, *problem.counts(heads), scale, compiled, **launch_options(tile)
            )
            global_attention_bwd_q_sum_kernel[(batch * count * heads,)](
                parts, Rows.of(dqg), problem.places, count, heads, chunks, compiled, num_warps=1
            )
        tile, compiled = problem.config(dkdv_config, add=(not own[1], not own[2]))
        with on_device(q):
            global_attention_bwd_kv_kernel[(batch * kv_heads * triton.cdiv(length, tile.block_n),)](
                *rows, *outs, problem.places, *problem.counts(kv_heads), scale, compiled, **launch_options(tile)
            )
    results = [dq, dk.to(k.dtype), dv.to(v.dtype)]
    results += [g if there else q.new_empty(0) for g, there in zip((dqg, dkg, dvg), own)]
    return tuple(results)


def _with_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [B, S, H, D] with ``values`` in the given rows; row S takes what belongs nowhere."""
    wide = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
    return wide.scatter_(1, rows.expand(-1, -1, *x.shape[2:]), values)[:, :-1].contiguous()


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    plain = dict.fromkeys(
        (
            "global_attention_fwd_merge_kernel",
            "global_attention_bwd_q_sum_kernel",
            "window_attention_bwd_prefix_sum_kernel",
        ),
        (),
    )
    shapes = (("bf16", 64, 16), ("bf16", 64, 256), ("bf16", 128, 64), ("bf16", 256, 16), ("fp32", 64, 16))
    for dtype, d, count in shapes:
        x = [tensor(dtype, 2, 4096, 12, d) for _ in range(6)]
        index, mask = tensor("i64", 2, count), tensor("bool", 2, 4096)
        yield AotCase(
            f"{dtype}_d{d}_g{count}",
            train("global_attention", *x[:3], index, *x[3:], mask, window=(256, 256), outputs=1),
            expect={"nvidia": ("MMA",), **plain} if dtype == "bf16" else (),
        )
    x = [tensor("bf16", 2, 4096, 12, 64) for _ in range(3)]
    yield AotCase("bf16_d64_shared", train("global_attention", *x, tensor("i64", 2, 16), window=(256, 256), outputs=1))
