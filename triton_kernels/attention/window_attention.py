"""Window attention: tile configurations and launchers of a forward and of a backward without atomics.

The kernels are in `window_forward` and `window_backward`. ``global_attention`` launches the same ones with a gathered
prefix and a byte per token that takes it out of the band.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import triton
from torch import Tensor

from ... import arch
from ..common import tuned
from ..common.flash import Config, Results, constants_of, padded, width
from ..common.launch import TRITON, launch_options, on_device
from ..common.rows import Matrix, Rows
from .window_backward import (
    PREFIX_CHUNK,
    window_attention_bwd_bias_kernel,
    window_attention_bwd_kv_kernel,
    window_attention_bwd_prefix_kernel,
    window_attention_bwd_prefix_sum_kernel,
    window_attention_bwd_q_kernel,
)
from .window_forward import window_attention_fwd_kernel
from .window_tiles import FIRST, GATHERED, NONE, UNBOUNDED, Bounds, Constants, PrefixKeys, Scores

# programs that the bias's gradient is split into at least
BIAS_PROGRAMS = 1024

# the tiles are the largest that do not spill; arguments of the five:
#   head_dim: the larger padded one of k and v
#   span: keys of a window; a narrow one wastes less of a small tile
#   extras: how many of mask, bias, soft cap, dilation, packing, prefix and ragged head dim cost registers
#   target: the architecture; most share a tile


def fwd_config(head_dim: int, element_size: int, span: int, extras: int, target: str) -> Config:
    if element_size > 2:
        return Config(32, 16, 4, 1) if head_dim <= 64 else Config(16, 16, 8, 1)
    if head_dim > 128:
        # a second stage beside a prefix is more shared memory than there is
        return Config(64, 32, 8, 1 if extras and arch.capability(target) in (89, 120) else 2)
    if extras or span <= 256:
        return Config(64, 64 if head_dim <= 64 else 32, 4, 2)
    return Config(128, 64, 8, 3 if head_dim <= 64 else 2)


def dq_config(head_dim: int, element_size: int, span: int, extras: int, target: str) -> Config:
    amd, capability = target.startswith("gfx"), arch.capability(target)
    if element_size > 2:
        return Config(32, 16, 4, 1) if head_dim <= 64 else Config(16, 16, 8, 1)
    if head_dim > 128:
        return Config(32, 16 if capability == 100 else 32, 8 if capability in (90, 120) else 4, 1)
    narrow = amd if head_dim > 64 else extras and (amd or capability == 120)
    return Config(64, 32 if narrow else 64, 8, 2)


def dkdv_config(head_dim: int, element_size: int, span: int, extras: int, target: str) -> Config:
    amd, capability = target.startswith("gfx"), arch.capability(target)
    if element_size > 2:
        return Config(32, 16, 8, 1) if head_dim <= 64 else Config(16, 16, 4, 1)
    if head_dim > 128:
        return Config(16 if amd else 32, 32, 8, 1)
    if head_dim <= 64:
        # with 8 warps the compiler keeps to 128 registers there
        return Config(32, 64, 4 if extras and capability == 100 else 8, 1)
    # each option keeps a few registers alive in the loop, from three on the larger tiles spill
    if extras >= 3:
        return Config(16 if amd else 32, 32, 8, 1)
    if capability == 100:
        return Config(64, 64, 8, 1)
    # older compilers spill where loads are pipelined around wgmma
    unstaged = extras or amd or (capability == 90 and TRITON < (3, 7))
    return Config(32, 64, 8, 1 if unstaged else 2)


def prefix_config(head_dim: int, element_size: int, span: int, extras: int, target: str) -> Config:
    if element_size > 2:
        return Config(32, 16, 8, 1) if head_dim <= 64 else Config(16, 16, 4, 1)
    if head_dim > 128:
        return Config(16 if target.startswith("gfx") or arch.capability(target) == 100 else 32, 32, 8, 1)
    # two tiles of a head leave 8 warps too little to share
    return Config(32, 64 if head_dim <= 64 else 32, 8, 1)


def bias_config(head_dim: int, element_size: int, span: int, extras: int, target: str) -> Config:
    if element_size > 2:
        return Config(32, 32, 8, 1) if head_dim <= 64 else Config(16, 16, 4, 1)
    # 8 warps keep to 128 registers there, and spill where the matrix unit reads registers
    warps = 4 if head_dim <= 64 and arch.capability(target) not in (90, 100) else 8
    return Config(32, 64 if head_dim <= (64 if target.startswith("gfx") else 128) else 32, warps, 1)


CHOICES = {"fwd": fwd_config, "dq": dq_config, "dkdv": dkdv_config, "prefix": prefix_config, "bias": bias_config}

# what `python -m tilefuse tune` tries
TILES = {
    "fwd": (
        (64, 32, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ),
    "dq": ((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)),
    "dkdv": ((32, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)),
}
CONFIGS = {
    f"window_attention_{kernel}": tuple(asdict(Config(*tile)) for tile in tiles) for kernel, tiles in TILES.items()
}


@dataclass(frozen=True)
class Prefix:
    """Keys that rows see beside their band: the first ``count`` tokens, or gathered ones at ``positions``."""

    count: int
    reach: int  # how far past a query a prefix key may lie
    keys: Tensor | None = None  # [B, G, Hkv, D]
    values: Tensor | None = None
    positions: Tensor | None = None  # [B, G] int32, -1 = none

    @property
    def kind(self) -> int:
        return (NONE if self.count == 0 else FIRST if self.keys is None else GATHERED).value


@dataclass(frozen=True)
class Problem:
    """One call's tensors and options, shared by its kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: int
    right: int
    dilation: int
    scale: float
    softcap: float
    prefix: Prefix
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    bias: Tensor | None = None  # [Hq, L] contiguous
    hidden: Tensor | None = None  # uint8 [B, S], nonzero = not in the band, neither as key nor as query

    @property
    def packed(self) -> bool:
        return self.q.dim() == 3

    @property
    def window(self) -> tuple[int, int]:
        return tuple(UNBOUNDED.value if w < 0 else min(w, UNBOUNDED.value) for w in (self.left, self.right))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens of q and of k, in each sequence or packed; number of sequences."""
        return self.q.shape[-3], self.k.shape[-3], self.cu_q.shape[0] - 1 if self.packed else self.q.shape[0]

    def tiles(self, queries: bool, block: int, dilation: int) -> int:
        """Upper bound on the tiles of all sequences, known without reading their lengths."""
        rows_q, rows_k, n_seq = self.sizes
        rows = rows_q if queries else rows_k
        if self.packed:
            return rows // block + n_seq * dilation
        return n_seq * dilation * triton.cdiv(triton.cdiv(rows, dilation), block)

    def config(self, kernel: str) -> Config:
        left, right = self.window
        d, dv = self.q.shape[-1], self.v.shape[-1]
        ragged, options = any(x.D.value < x.PAD.value for x in (width(d), width(dv))), (self.slopes, self.hidden)
        numbers = (self.dilation > 1, self.softcap > 0, self.prefix.kind != NONE.value)
        extras = ragged + self.packed + sum(x is not None for x in options) + sum(numbers)
        # its index and its load are as many registers as three others
        extras += 3 * (self.bias is not None)
        dim, size, span = max(padded(d), padded(dv)), self.q.element_size(), left + right + 1
        choose = CHOICES[kernel]
        tile = choose(dim, size, span, extras, arch.of(self.q.device))
        key = f"d={dim},bytes={size},span<={min(4096, triton.next_power_of_2(span))},extras={extras}"
        return tuned.choose(f"window_attention_{kernel}", key, self.q.device, tile)

    def constants(self, tile: Config, dlse: bool = False) -> Constants:
        biases = (*(x is not None for x in (self.sinks, self.slopes, self.bias)), self.softcap > 0)
        flags = (self.packed, self.dilation > 1, self.prefix.kind, self.hidden is not None, *biases, dlse)
        return constants_of(Constants, self.q.shape[-1], self.v.shape[-1], tile.block_m, tile.block_n, *flags)

    @property
    def rows(self) -> tuple[Rows, Rows, Rows]:
        return Rows.of(self.q), Rows.of(self.k), Rows.of(self.v)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.cu_q, self.cu_k)

    @property
    def prefix_keys(self) -> PrefixKeys:
        prefix = self.prefix
        keys, values = (self.k, self.v) if prefix.keys is None else (prefix.keys, prefix.values)
        return PrefixKeys(Rows.of(keys), Rows.of(values), prefix.positions)

    @property
    def scores(self) -> Scores:
        bias = None if self.bias is None else Matrix.of(self.bias)
        return Scores(self.scale, self.softcap, self.sinks, self.slopes, self.hidden, bias)

    def counts(self, heads: int) -> tuple[int, ...]:
        """Sizes, heads that programs run over (of q or of k), heads of q per head of k."""
        return *self.sizes, heads, self.q.shape[-2] // self.k.shape[-2]

    @property
    def band(self) -> tuple[int, ...]:
        return *self.window, self.prefix.reach, self.dilation, self.prefix.count


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    q, v = problem.q, problem.v
    # a packed batch may leave tokens to no sequence
    new = torch.zeros if problem.packed else torch.empty
    out = new((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32, device=q.device)
    if problem.packed:
        lse.fill_(float("-inf"))
    tile = problem.config("fwd")
    heads = q.shape[-2]
    programs = problem.tiles(True, tile.block_m, problem.dilation) * heads
    if programs == 0 or problem.sizes[2] == 0:
        return out, lse
    tables = (problem.bounds, problem.prefix_keys, problem.scores)
    counts = (*problem.counts(heads), *problem.band)
    with on_device(q):
        window_attention_fwd_kernel[(programs,)](
            *problem.rows, Rows.of(out), lse, *tables, *counts, problem.constants(tile), **launch_options(tile)
        )
    return out, lse


def backward(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    key_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv (in ``key_dtype``), delta (float32, as lse), float32 gradients of gathered prefix keys and values."""
    # no kernel here reads the sinks
    problem = replace(problem, sinks=None)
    q, k, v, prefix, n_seq = problem.q, problem.k, problem.v, problem.prefix, problem.sizes[2]
    heads, kv_heads = q.shape[-2], k.shape[-2]
    new = torch.zeros if problem.packed else torch.empty
    dq = new(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (new(x.shape, dtype=key_dtype or x.dtype, device=x.device) for x in (k, v))
    delta = new(lse.shape, dtype=torch.float32, device=q.device)
    results = Results.of(out, dout, lse, dlse, delta)
    rows = (*problem.rows, results)

    tile = problem.config("dq")
    programs = problem.tiles(True, tile.block_m, problem.dilation) * heads
    if programs > 0 and n_seq > 0:
        tables = (problem.bounds, problem.prefix_keys, problem.scores)
        counts, compiled = (*problem.counts(heads), *problem.band), problem.constants(tile, dlse is not None)
        with on_device(q):
            window_attention_bwd_q_kernel[(programs,)](
                *rows, Rows.of(dq), *tables, *counts, compiled, **launch_options(tile)
            )
    tile = problem.config("dkdv")
    programs = problem.tiles(False, tile.block_n, problem.dilation) * kv_heads
    if programs > 0 and n_seq > 0:
        outs, tables = (Rows.of(dk), Rows.of(dv)), (problem.bounds, problem.scores)
        counts = (*problem.counts(kv_heads), *problem.window, problem.dilation, prefix.count)
        with on_device(q):
            window_attention_bwd_kv_kernel[(programs,)](
                *rows, *outs, *tables, *counts, problem.constants(tile), **launch_options(tile)
            )
    if prefix.kind == NONE.value:
        return dq, dk, dv, delta, None, None
    # the first tokens' gradients are rows of dk and dv, those of gathered keys are tensors of their own
    dpk, dpv = dk, dv
    if prefix.kind == GATHERED.value:
        dpk, dpv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (prefix.keys, prefix.values))
    if n_seq > 0 and k.numel() > 0:
        _prefix_backward(problem, results, dpk, dpv)
    return dq, dk, dv, delta, *((dpk, dpv) if prefix.kind == GATHERED.value else (None, None))


def _prefix_backward(problem: Problem, results: Results, dk: Tensor, dv: Tensor) -> None:
    """Gradients of the prefix keys and values, into their rows of dk and dv."""
    q, prefix, kv_heads = problem.q, problem.prefix, problem.k.shape[-2]
    tile = problem.config("prefix")
    chunks = problem.tiles(True, PREFIX_CHUNK.value, 1)
    dk_parts, dv_parts = (
        torch.empty((chunks, kv_heads, prefix.count, x.shape[-1]), dtype=torch.float32, device=q.device)
        for x in (dk, dv)
    )
    keys = (Rows.of(q), problem.prefix_keys)
    parts, tables = (dk_parts, dv_parts), (problem.bounds, problem.scores)
    counts = (*problem.counts(kv_heads), prefix.reach, prefix.count)
    grid = (chunks * kv_heads, triton.cdiv(prefix.count, tile.block_n))
    sums = replace(tile, block_n=16, num_warps=4, num_stages=1)
    with on_device(q):
        if chunks > 0:
            window_attention_bwd_prefix_kernel[grid](
                *keys, results, *parts, *tables, *counts, problem.constants(tile), **launch_options(tile)
            )
        outs, counts = (Rows.of(dk), Rows.of(dv)), (*problem.sizes[:2], kv_heads, prefix.count)
        window_attention_bwd_prefix_sum_kernel[(problem.sizes[2] * kv_heads, triton.cdiv(prefix.count, sums.block_n))](
            *parts, *outs, problem.bounds, *counts, problem.constants(sums), **launch_options(sums)
        )


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    distance_bias: Tensor | None,
    left: int,
    right: int,
    dilation: int,
    scale: float,
    softcap: float,
    sink_tokens: int,
) -> Problem:
    reach = UNBOUNDED.value if right < 0 else min(right * dilation, UNBOUNDED.value)
    # no sequence is longer than all keys together
    prefix = Prefix(min(sink_tokens, k.shape[-3]), reach)
    bias = distance_bias
    if bias is not None:
        # three equal ones are as good as one, whose stride of 1 would be a constant
        bias = (bias.expand(-1, 3) if bias.shape[1] == 1 else bias).contiguous()
    return Problem(q, k, v, left, right, dilation, scale, softcap, prefix, sinks, alibi_slopes, cu_q, cu_k, bias)


def window_attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    return forward(_problem(q, k, v, *options))


def window_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, *options)
    dq, dk, dv, delta, _, _ = backward(problem, dout, dlse, out, lse)
    return dq, dk, dv, q.new_empty(0) if problem.sinks is None else sink_gradient(problem.sinks, lse, delta)


def window_attention_bwd_bias(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options
) -> Tensor:
    distance_bias = options[4]
    # the kernel does not read the sinks
    problem = replace(_problem(q, k, v, *options), sinks=None)
    dbias = torch.zeros(distance_bias.shape, dtype=torch.float32, device=q.device)
    rows_q, rows_k, n_seq = problem.sizes
    if min(rows_q, rows_k, n_seq, q.shape[-2]) > 0:
        results, prefix = Results.of(out, dout, lse, dlse, None), problem.prefix
        _add_diagonals(dbias, problem, results, prefix.count, UNBOUNDED.value)
        if prefix.count:
            first = replace(problem, left=-1, right=prefix.reach, dilation=1)
            _add_diagonals(dbias, first, results, 0, prefix.count)
    return dbias.to(distance_bias.dtype)


def _add_diagonals(dbias: Tensor, problem: Problem, results: Results, first_key: int, stop_key: int) -> None:
    """Adds the sums of the scores' gradients by distance, of the keys from ``first_key`` up to ``stop_key``."""
    rows_q, rows_k, _ = problem.sizes
    (left, right), dilation, heads = problem.window, problem.dilation, problem.q.shape[-2]
    tile, block = problem.config("bias"), problem.config("bias").block_n
    nearest, farthest = -min(right, (rows_q - 1) // dilation), min(left, (rows_k - 1) // dilation)
    blocks = triton.cdiv(farthest - nearest + 1, block)
    # queries are split where heads and diagonals alone are few programs; the parts depend on sizes only
    total = problem.tiles(True, tile.block_m, dilation)
    tiles = triton.cdiv(total, triton.cdiv(BIAS_PROGRAMS, heads * blocks))
    parts = triton.cdiv(total, tiles)
    sums = torch.empty((parts, heads, blocks * block), dtype=torch.float32, device=dbias.device)
    counts = (*problem.counts(heads), *problem.window, dilation, nearest, first_key, stop_key, tiles)
    compiled = problem.constants(tile, results.dlse is not None)
    with on_device(problem.q):
        window_attention_bwd_bias_kernel[(heads * blocks, parts)](
            *problem.rows, results, sums, problem.bounds, problem.scores, *counts, compiled, **launch_options(tile)
        )
    by_steps = sums.sum(0)[:, : farthest - nearest + 1]
    # distances past an end of the bias share it; what lies between is `dilation` apart
    half = dbias.shape[1] // 2
    end = triton.cdiv(half, dilation)
    low = min(max(1 - end - nearest, 0), by_steps.shape[1])
    high = min(max(end - nearest, low), by_steps.shape[1])
    dbias[:, 0] += by_steps[:, :low].sum(1)
    dbias[:, -1] += by_steps[:, high:].sum(1)
    if low < high:
        middle = half + (nearest + low) * dilation
        dbias[:, middle : middle + (high - low) * dilation : dilation] += by_steps[:, low:high]


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum exp(sink - lse) * delta over batch and rows: a small ordered sum."""
    p = torch.exp(sinks.float()[:, None] - lse).masked_fill_(lse == float("-inf"), 0)
    return -(p * delta).transpose(0, -2).flatten(1).sum(1).to(sinks.dtype)


def aot_cases():
    from ...testing.aot import AotCase, tensor, train

    packed = (*(tensor("i32", 9) for _ in range(2)),)

    def case(name, dtype, d, dv, window, *, slopes=False, bias=0, varlen=False, outputs=1, sinks=False, **options):
        size = (8192,) if varlen else (2, 4096)
        q, k, v = tensor(dtype, *size, 16, d), tensor(dtype, *size, 4, d), tensor(dtype, *size, 4, dv)
        heads = (tensor("fp32", 16) if given else None for given in (sinks, slopes))
        bounds = packed if varlen else (None, None)
        table = tensor("fp32", 16, bias) if bias else None
        return AotCase(
            name,
            train("window_attention", q, k, v, *heads, *bounds, table, window=window, outputs=outputs, **options),
            expect={"nvidia": ("MMA",), "window_attention_bwd_prefix_sum_kernel": ()} if dtype != "fp32" else (),
        )

    wide, narrow = (1023, 0), (127, 0)
    yield case("bf16_d128", "bf16", 128, 128, wide)
    yield case("bf16_d128_prefix", "bf16", 128, 128, wide, sink_tokens=4)
    for d, dv in ((64, 64), (256, 256), (96, 96), (192, 128)):
        yield case(f"bf16_d{d}", "bf16", d, dv, wide, sink_tokens=4)
    yield case("bf16_d64_narrow", "bf16", 64, 64, narrow, sinks=True)
    yield case("bf16_d128_narrow", "bf16", 128, 128, narrow, sinks=True)
    yield case("fp16_d128_packed", "fp16", 128, 128, wide, varlen=True, slopes=True)
    for d in (64, 128):
        yield case(f"bf16_d{d}_bias", "bf16", d, d, (-1, -1), bias=8191)
    every = {"dilation": 2, "softcap": 30.0, "slopes": True, "varlen": True, "sink_tokens": 4}
    yield case("bf16_d128_all", "bf16", 128, 128, wide, outputs=None, **every)
    for d in (64, 128):
        yield case(f"fp32_d{d}", "fp32", d, d, wide, sink_tokens=4)
