"""One matrix per expert for its rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B, Model


def sizes(rows: int, experts: int, device, generator):
    """Uneven group sizes that add up to rows: offsets [E + 1] int32."""
    expert = torch.randint(0, experts, (rows,), generator=generator, device=device)
    counts = torch.zeros(experts, dtype=torch.int64, device=device).index_add_(0, expert, torch.ones_like(expert))
    return F.pad(counts.cumsum(0), (1, 0)).int()


def eager(a, b, offsets, a_index=None):
    """A matmul per expert; where the rows begin must come to the host."""
    rows = a if a_index is None else a[a_index.long()]
    bounds = offsets.tolist()
    return torch.cat([rows[lo:hi] @ w.mT for lo, hi, w in zip(bounds, bounds[1:], b)])


def torch_grouped(a, b, offsets, a_index=None):
    rows = a if a_index is None else a[a_index.long()]
    return F.grouped_mm(rows, b.mT, offs=offsets[1:])


def inputs_of(rows: int, experts: int, n: int, k: int, gather: bool):
    def inputs(device, generator):
        tokens = rows // 8 if gather else rows
        a = normal((tokens, k), torch.bfloat16, device, generator)
        b = normal((experts, n, k), torch.bfloat16, device, generator, k**-0.5)
        rest = []
        if gather:
            rest = [torch.randperm(rows, generator=generator, device=device).int() // 8]
        return a, b, sizes(rows, experts, device, generator), *rest

    return inputs


def case(m: Model, experts: int, rows: int, mode: str, *, gather: bool = False, **options) -> Case:
    n, k = 2 * m.moe_intermediate, m.hidden
    forward = mode == "forward"
    tokens = rows // 8 if gather else rows
    activations = 2 * (tokens * k + rows * n)
    # an expert without rows would not be read; so many rows leave none out but by a very rare draw
    weights = 2 * min(experts, rows // 16) * n * k
    return Case(
        op="grouped_matmul",
        name=f"{m.name} gate and up, {experts} of {m.experts} experts, {rows} rows{', gathered' if gather else ''}",
        dtype="bfloat16",
        mode=mode,
        inputs=inputs_of(rows, experts, n, k, gather),
        oracle_inputs=inputs_of(128, 4, 256, 512, gather),
        run=tilefuse.grouped_matmul,
        peers={"eager": eager, "grouped_mm": Peer(torch_grouped)},
        grads=(0, 1),
        bytes=activations + weights if forward else 2 * tokens * k * 2 + 2 * rows * n + 2 * weights,
        flops=(2 if forward else 4) * rows * n * k,
        **options,
    )


def cases() -> Iterator[Case]:
    # an eighth of the layer, as one of eight devices holds it
    yield case(QWEN3_30B_A3B, 16, 512, "forward", gather=True, suite="quick")
    yield case(QWEN3_30B_A3B, 16, 512, "backward")
    for m, experts, rows in ((QWEN3_30B_A3B, 128, 262144), (DEEPSEEK_V3, 32, 32768)):
        for mode in ("forward", "backward"):
            yield case(m, experts, rows, mode, devices=("cuda",))
        yield case(m, experts, rows, "forward", gather=True, devices=("cuda",))
