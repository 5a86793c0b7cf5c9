"""Expert parallelism on ``torch.distributed``: NCCL on GPUs, gloo on CPUs.

Rank r of W owns experts ``[r * E / W, (r + 1) * E / W)``. A layer is three steps, each usable alone:

1. ``dispatch``: every kept (token, slot) row travels to the rank that owns its expert (one all-to-all);
2. the local experts run on the received rows;
3. ``combine``: the results travel back and are summed per token in slot order, as ``moe_combine`` does it, so the
   result has the bits of the single-process layer wherever the local experts have.

The backward of dispatch is a combine and the reverse (the scheme of DeepEP and Megatron-LM): gradients travel through
the same all-to-all with the splits exchanged.

Data parallelism for the rest of the model leaves the experts alone, each rank has its own::

    parallel = ExpertParallel(64, average_gradients=True)
    model = Model(moe=tilefuse.nn.MoE(..., parallel=parallel))
    exclude_experts(model)
    model = DistributedDataParallel(model)

``vocabulary_parallel_logprobs`` is ``tilefuse.linear_logprobs`` of a head whose vocabulary is divided among the ranks.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import errors, library
from .ops.loss.checks import check_linear, check_transform
from .ops.loss.linear_logprobs import backward as linear_logprobs_backward
from .ops.loss.linear_logprobs import head_inputs, linear_logprob_stats_fwd, merge_logprobs_fwd
from .ops.moe.moe_combine import moe_combine, moe_combine_fwd
from .ops.moe.moe_plan import moe_plan

__all__ = ["Dispatched", "ExpertParallel", "exclude_experts", "vocabulary_parallel_logprobs"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived at this rank, and what ``combine`` needs to send their results back.

    Attributes:
        x: ``[R, ...]`` received rows, by source rank, then by expert, then in the source's token order. With a
            capacity, ``R = W * capacity`` and unused rows are zero.
        ids: ``[R, 1]`` int32, *local* expert of each row in ``[0, E / W)``; -1 for an unused row.
        inverse: ``[T * k]`` int32, where each flat slot of this rank's tokens sits among the rows it sent; -1 if
            dropped.
        send_splits, receive_splits: rows per rank; None where every rank gets ``capacity`` rows.
    """

    x: Tensor
    ids: Tensor
    inverse: Tensor
    send_splits: list[int] | None
    receive_splits: list[int] | None


def exclude_experts(model: nn.Module) -> list[str]:
    """Keeps ``DistributedDataParallel(model)`` away from the experts of every ``tilefuse.nn.MoE(parallel=...)`` in it.

    DDP would copy rank 0's experts to every rank when it is made, and average the gradients of different experts. Call
    this on the model before DDP and after adapters; a model under DDP whose experts are not excluded raises.

    Returns:
        The names of the excluded parameters.
    """
    # nn holds this module's callers
    from .nn.moe import MoE

    names = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, MoE) and module.parallel is not None
        for name, _ in module.named_parameters()
        if name.startswith("experts.")
    ]
    others = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if name not in names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*others, *names])
    return names


class ExpertParallel:
    """Dispatches tokens to the ranks of a process group that own their experts, and combines the results.

    Args:
        num_experts: E, over all ranks; a multiple of the group's size.
        group: process group; None is the default group.
        capacity: None sends exactly the rows that are there, which needs their counts on the host (one synchronisation
            per layer). A number fixes the rows per pair of ranks instead, and nothing synchronises: of the rows for
            one rank, those past the capacity in the order of ``moe_plan`` (by expert, then by flat slot) are dropped
            and count as zero in the sum.
        timeout: seconds that a collective may take before it raises; None takes the group's own limit. On NCCL the
            group's watchdog enforces the limit.
        average_gradients: of the experts in ``tilefuse.nn.MoE``. An expert sees the tokens of all ranks, so its
            gradient is that of the *sum* of the ranks' losses. DDP and FSDP give the rest of a model the gradient of
            their *mean*: with True the experts' is divided by W to match. (Experts of a caller's own function keep the
            sum.)

    Under DDP, ``exclude_experts`` is needed, ``average_gradients=True``, and a DDP group of the same ranks: each is
    checked in the forward. Under FSDP nothing can be checked: keep the experts out of ``fully_shard``, or shard them
    over other ranks than those of this group.

    Every rank of the group must make the same calls, also with zero tokens. Deterministic: results and gradients of a
    token's rows are summed in float32 in slot order, without atomics.

    Raises:
        ValueError: E is not a multiple of the group's size, or capacity < 1.
        RuntimeError: a rank left or did not answer in time; the message names the step.
    """

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        *,
        capacity: int | None = None,
        timeout: float | None = None,
        average_gradients: bool = False,
    ):
        self.group = group
        self.world = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if num_experts < 1 or num_experts % self.world:
            errors.value_error(
                "ExpertParallel", "num_experts", f"a positive multiple of the group size {self.world}", num_experts
            )
        if capacity is not None and capacity < 1:
            errors.value_error("ExpertParallel", "capacity", "at least 1, or None", capacity)
        self.num_experts = num_experts
        self.local_experts = num_experts // self.world
        self.capacity = capacity
        self.timeout = None if timeout is None else datetime.timedelta(seconds=timeout)
        self.average_gradients = average_gradients

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Runs a whole expert-parallel layer.

        Args:
            x: ``[T, H]`` tokens of this rank.
            weights: ``[T, k]`` float32 routing weights.
            ids: ``[T, k]`` global expert ids; outside ``[0, E)`` = dropped.
            experts: ``experts(rows [R, H], local_ids [R, 1]) -> [R, H']``; rows with id -1 are unused. Usually
                ``lambda rows, ids: tilefuse.moe_experts(rows, w_gate_up, w_down, ones [R, 1], ids)`` on local weights.

        Returns:
            ``[T, H']`` in x's dtype. Gradients flow to x, weights and whatever ``experts`` closes over.
        """
        dispatched = self.dispatch(x, ids)
        return self.combine(experts(dispatched.x, dispatched.ids), weights, dispatched)

    def check_ddp(self, experts: nn.Module) -> None:
        """Raises RuntimeError inside of a DDP that does, or leaves undone, what makes experts wrong."""
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None:
            return
        synchronised = {id(p) for p in ddp._module_parameters}
        if any(id(p) in synchronised for p in experts.parameters()):
            why = (
                "DDP has copied rank 0's experts to every rank; call tilefuse.distributed.exclude_experts(model) before"
                " DistributedDataParallel(model)"
            )
        elif not self.average_gradients:
            why = "DDP averages gradients, so average_gradients must be True for the experts"
        elif dist.get_process_group_ranks(ddp.process_group) != dist.get_process_group_ranks(self.group):
            why = "DDP's process group must have the ranks of the experts' group, which has no copies to average over"
        else:
            return
        raise RuntimeError(f"tilefuse.ExpertParallel: {why}")

    def dispatch(self, x: Tensor, ids: Tensor) -> Dispatched:
        """Sends every kept row of ``x [T, ...]`` to the rank that owns its expert ``ids [T, k]``.

        Any row width and dtype; FP8 codes travel as bytes (and, like integers, carry no gradient).
        """
        if ids.dim() != 2 or x.dim() < 1 or ids.shape[0] != x.shape[0]:
            errors.value_error("ExpertParallel.dispatch", "ids", f"[T, k] with T = {x.shape[0]}", ids)
        order, inverse, offsets = moe_plan(ids, self.num_experts)
        counts = offsets.diff()
        sources = order.long() // max(ids.shape[1], 1)
        if self.capacity is not None:
            return self._dispatch_fixed(x, sources, inverse, counts, ids.shape[1])

        received = self._exchange(counts.view(self.world, -1), None, None, "dispatch (row counts)").view(self.world, -1)
        # the one synchronisation: torch.distributed takes the splits from the host
        per_rank = torch.stack([counts.view(self.world, -1).sum(1), received.sum(1)]).tolist()
        send, receive = ([int(n) for n in row] for row in per_rank)
        rows = _gather(x, sources[: sum(send)], None, inverse, ids.shape[1])
        arrived = _AllToAll.apply(rows, self, send, receive, "dispatch")
        local = torch.arange(self.local_experts, device=x.device, dtype=torch.int32).repeat(self.world)
        local_ids = local.repeat_interleave(received.reshape(-1).long(), output_size=sum(receive))
        return Dispatched(arrived, local_ids[:, None], inverse, send, receive)

    def _dispatch_fixed(self, x: Tensor, sources: Tensor, inverse: Tensor, counts: Tensor, top_k: int) -> Dispatched:
        assert self.capacity is not None
        capacity, total = self.capacity, sources.shape[0]
        per_rank = counts.view(self.world, -1).sum(1).long()
        first = per_rank.cumsum(0) - per_rank
        # row p of the plan goes to slot p - first[rank] of its rank; dropped slots sort behind all kept ones
        position = torch.arange(total, device=x.device)
        rank = torch.searchsorted(per_rank.cumsum(0), position, right=True)
        within = position - first[rank.clamp(max=self.world - 1)]
        kept = (rank < self.world) & (within < capacity)
        slots = self.world * capacity
        target = torch.where(kept, rank * capacity + within, slots)
        # gather form: which plan row fills each slot, `total` for none
        filled = torch.full((slots + 1,), total, device=x.device, dtype=torch.long)
        filled.scatter_(0, target, position)
        filled[slots] = total
        sources = torch.cat([sources, sources.new_zeros(1)])[filled[:slots]]
        expert = torch.searchsorted(counts.long().cumsum(0), filled[:slots], right=True)
        used = filled[:slots] < total
        ids = torch.where(used, expert % self.local_experts, -1).to(torch.int32)
        inverse = torch.where(inverse >= 0, target[inverse.long().clamp(min=0)] if total else inverse.long(), slots)
        inverse = torch.where(inverse < slots, inverse, -1).to(torch.int32)
        arrived = _AllToAll.apply(_gather(x, sources, used, inverse, top_k), self, None, None, "dispatch")
        ids = self._exchange(ids, None, None, "dispatch (ids)")
        return Dispatched(arrived, ids[:, None], inverse, None, None)

    def combine(self, y: Tensor, weights: Tensor, dispatched: Dispatched) -> Tensor:
        """Sends the result ``y [R, H']`` of each received row back and sums ``weights [T, k]`` of them per token."""
        if y.shape[0] != dispatched.x.shape[0]:
            errors.value_error("ExpertParallel.combine", "y", f"[{dispatched.x.shape[0]}, H']", y)
        back = _AllToAll.apply(y, self, dispatched.receive_splits, dispatched.send_splits, "combine")
        return moe_combine(back, dispatched.inverse, weights)

    def _exchange(self, rows: Tensor, send: list[int] | None, receive: list[int] | None, step: str) -> Tensor:
        count = rows.shape[0] if receive is None else sum(receive)
        payload = rows.contiguous()
        if payload.dtype in _FP8:
            payload = payload.view(torch.uint8)
        out = payload.new_empty((count, *payload.shape[1:]))
        try:
            work = dist.all_to_all_single(out, payload, receive, send, group=self.group, async_op=True)
            assert work is not None
            if self.timeout is None or payload.is_cuda:
                # waiting with a limit would block the host on NCCL
                work.wait()
            elif not work.wait(self.timeout):
                raise RuntimeError(f"no answer within {self.timeout.total_seconds()} s")
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"tilefuse.ExpertParallel: rank {self.rank} of {self.world} failed in {step}; a rank of the group has"
                f" probably died or stopped calling ({error})"
            ) from error
        return out.view(rows.dtype)


def _gather(x: Tensor, sources: Tensor, used: Tensor | None, inverse: Tensor, top_k: int) -> Tensor:
    """``x[sources]`` with unused rows zero; ``inverse [T * k]`` is the row of each slot, for the gradient."""
    if not x.is_floating_point() or x.dtype in _FP8:
        bits = x.view(torch.uint8) if x.dtype in _FP8 else x
        return _rows_or_zero(bits, sources, used).view(x.dtype)
    return _Gather.apply(x, sources, used, inverse, top_k)


def _rows_or_zero(x: Tensor, sources: Tensor, used: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((sources.shape[0], *x.shape[1:]))
    rows = x.index_select(0, sources)
    if used is None:
        return rows
    # selects instead of multiplying, so that NaN cannot leak in
    return torch.where(used.view(-1, *[1] * (x.dim() - 1)), rows, rows.new_zeros(()))


class _Gather(torch.autograd.Function):
    """Rows of tokens; a token's gradient is the sum of its rows in slot order, where an index_add would be atomic."""

    @staticmethod
    def forward(ctx, x, sources, used, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.options = (top_k, x.shape)
        return _rows_or_zero(x, sources, used)

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dout):
        (inverse,) = ctx.saved_tensors
        top_k, shape = ctx.options
        rows = dout.reshape(dout.shape[0], math.prod(shape[1:]))
        return moe_combine_fwd(rows, inverse, None, top_k).view(shape), None, None, None, None


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx, rows, parallel, send, receive, step):
        ctx.parallel, ctx.send, ctx.receive, ctx.step = parallel, send, receive, step
        out = parallel._exchange(rows, send, receive, step)
        if not rows.is_floating_point() or rows.dtype in _FP8:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, dout):
        back = ctx.parallel._exchange(dout, ctx.receive, ctx.send, f"backward of {ctx.step}")
        return back, None, None, None, None


def vocabulary_parallel_logprobs(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tilefuse.linear_logprobs`` where each rank holds consecutive rows of the head, in the order of the ranks.

    One all-gather of the ranks' ``linear_logprob_stats`` in the forward, five numbers per token and 4,096 ids; one
    all-reduce of x's gradient, in float32, in the backward.

    Args:
        x: ``[..., H]``, the same on every rank. target: ``[...]`` ids in the whole vocabulary, the same on every rank.
        weight: ``[V_rank, H]``, this rank's rows, as many blocks of 4,096 (the last may be ragged) as every other's.
        bias: ``[V_rank]`` or None.
        vocab_start: id of this rank's first row; a multiple of 4,096 for the bits of the undivided head.
        group: process group; None is the default group.
        scale, softcap, temperature, ignore_index: as in ``tilefuse.linear_logprobs``.

    Returns:
        logp, lse, entropy and argmax of ``tilefuse.linear_logprobs``, the same bits on every rank. The logp of a target
        that no rank holds is NaN.

    Gradients: for x, whole on every rank, and for this rank's weight and bias, which have the bits of the undivided
    head's. Every rank must make the same calls, the backward included.

    Raises:
        ValueError, TypeError: as ``tilefuse.linear_logprobs``.
    """
    name = "vocabulary_parallel_logprobs"
    x, weight = library.autocast(x, weight)
    check_linear(name, x, weight, target, bias)
    check_transform(name, softcap, temperature)
    if vocab_start < 0:
        errors.value_error(name, "vocab_start", "at least 0", vocab_start)
    transform = (scale, softcap, temperature, ignore_index)
    args = head_inputs(x, weight, target, bias)
    results = _VocabularyParallel.apply(*args, group, vocab_start, transform)
    return tuple(result.view(target.shape) for result in results)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, group, vocab_start, transform):
        stats = linear_logprob_stats_fwd(x, weight, target, bias, None, vocab_start, *transform, False)
        parts = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, stats, group=group)
        logp, lse, entropy, argmax, _, norm = merge_logprobs_fwd(torch.cat(parts, 1))
        ctx.save_for_backward(x, weight, target, bias, None, norm, entropy)
        ctx.group, ctx.vocab_start, ctx.transform = group, vocab_start, transform
        ctx.mark_non_differentiable(argmax)
        return logp, lse, entropy, argmax

    @staticmethod
    @library.once_differentiable
    def backward(ctx, dlogp, dlse, dentropy, _argmax):
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        upstream = (dlogp, dlse, dentropy, None)
        dx, dweight, dbias = linear_logprobs_backward(
            ctx.saved_tensors, upstream, needs, ctx.vocab_start, 0.0, ctx.transform
        )
        if dx is not None and dist.get_world_size(ctx.group) > 1:
            total = dx if dx.dtype == torch.float64 else dx.float()
            dist.all_reduce(total, group=ctx.group)
            dx = total.to(dx.dtype)
        return dx, dweight, None, dbias, None, None, None
