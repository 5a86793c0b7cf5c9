"""A mask in a few numbers, as calls of the attention ops, from the rule and the padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .rules import Rule


class Segments(NamedTuple):
    """One call of ``window_attention`` over the flattened batch: ``cu_seqlens`` of queries and keys.

    ``backwards``: the call takes the tokens in reversed order.
    """

    cu_q: Tensor
    cu_k: Tensor
    window: tuple[int, int]
    backwards: bool = False


class Compact(NamedTuple):
    """A mask ``[B, 1, Sq, Sk]``.

    With ``segments``: the sum of those calls, each of which gives zero to the rows of the others. With ``lengths``
    ``[B]``: one query per sequence, which sees so many keys. Otherwise the window, the last query at the last of the
    keys ``[first, stop)``.
    """

    window: tuple[int, int] = (-1, -1)
    first: int = 0
    stop: int | None = None
    lengths: Tensor | None = None
    segments: tuple[Segments, ...] = ()

    def to(self, device: torch.device) -> Compact:
        """The same with its index data on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        moved = [s._replace(cu_q=s.cu_q.to(device), cu_k=s.cu_k.to(device)) for s in self.segments]
        return self._replace(lengths=lengths, segments=tuple(moved))


def describe(
    rule: Rule,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    padding: Tensor | None,
    tracing: bool,
    device: torch.device,
) -> Compact | None:
    """The compact form of a rule with padding ``[B, Sk]`` (True: a key), or None if there is none.

    Query i stands at position ``q_offset + i``, key j at ``kv_offset + j``. A graph cannot depend on the contents of
    tensors: while ``tracing`` none are looked at.
    """
    if rule.packed is not None:
        plain = isinstance(q_offset, int) and q_offset == 0 and padding is None and 1 < q_length == kv_length
        return _packed(rule, batch, q_length, tracing) if plain else None
    if isinstance(q_offset, Tensor):
        if q_length == 1 and padding is None and rule.plain and rule.right == 0:
            written = (q_offset - kv_offset + 1).to(torch.int32)
            return Compact((-1, 0), lengths=written.expand(batch).clone())
        if tracing:
            return None
        q_offset = int(q_offset)
    if tracing and (padding is not None or rule.chunk is not None):
        return None
    # query i stands at key i + delta
    delta = q_offset - kv_offset
    if padding is None:
        return _unpadded(rule, batch, q_length, kv_length, delta, kv_offset, device)
    if rule.right == 0:
        padding = padding[:, : delta + q_length]
    runs = _runs(padding, rule.origin)
    if runs is None:
        return None
    if all((start, end) == (0, padding.shape[1]) and origin == 0 for start, end, origin in runs):
        return _unpadded(rule, batch, q_length, kv_length, delta, kv_offset, device)
    if q_length == 1:
        # one row per sequence is small, and Hugging Face's function reads the cache where it lies
        return None
    return _padded(rule, runs, q_length, kv_length, delta, kv_offset, device)


def _unpadded(
    rule: Rule, batch: int, q_length: int, kv_length: int, delta: int, kv_offset: int, device: torch.device
) -> Compact | None:
    if rule.left == rule.right == -1:
        return Compact()
    stop = delta + q_length
    if delta < 0 or stop > kv_length or (rule.right != 0 and stop != kv_length):
        return None
    if q_length == 1 and stop != kv_length:
        # the slots of a static cache behind the last key: a graph that decodes must not depend on the number of keys
        lengths = torch.full((batch,), stop, dtype=torch.int32, device=device)
        return Compact((rule.left, 0), lengths=lengths) if rule.chunk is None else None
    if rule.chunk is None:
        return Compact((rule.left, rule.right), stop=None if stop == kv_length else stop)
    # positions of the first key that the first and the last query see
    first, last = ((kv_offset + at) // rule.chunk * rule.chunk for at in (delta, stop - 1))
    if first == last:
        return Compact((-1, 0), first=max(first - kv_offset, 0), stop=stop)
    return _padded(rule, [(0, stop, 0)] * batch, q_length, kv_length, delta, kv_offset, device)


def _runs(padding: Tensor, origin: Tensor | None) -> list[tuple[int, int, int]] | None:
    """Where the keys of each sequence start and end and where its chunks are counted from, or None if keys are
    missing between others. Waits for the device once, as Hugging Face's own functions do."""
    start = padding.to(torch.int8).argmax(-1)
    count = padding.sum(-1)
    last = padding.shape[1] - padding.flip(-1).to(torch.int8).argmax(-1)
    # nothing is counted from there without chunks
    origin = torch.zeros_like(start) if origin is None else origin
    rows = torch.stack((start, count, last, origin), 1).tolist()
    if any(count > 0 and last - start != count for start, count, last, _ in rows):
        return None
    return [(start, start + count, origin) for start, count, _, origin in rows]


# of one sequence: queries [q0, q1) and keys [k0, k1) that see each other by a window
_Piece = tuple[int, int, int, int]


def _padded(
    rule: Rule,
    runs: list[tuple[int, int, int]],
    q_length: int,
    kv_length: int,
    delta: int,
    kv_offset: int,
    device: torch.device,
) -> Compact | None:
    """Sequences whose keys are ``[start, end)``: queries among them see them by the rule, others what is near."""
    if rule.left == rule.right == -1:
        pieces = [[(0, q_length, start, end)] for start, end, _ in runs]
        return _compact([((-1, -1), False, pieces)], q_length, kv_length, device)
    if delta < 0 or delta + q_length > kv_length or (rule.right != 0 and delta + q_length != kv_length):
        return None

    def query(key: int) -> int:
        return min(max(key - delta, 0), q_length)

    among, behind, far_behind, before, far_before = ([[] for _ in runs] for _ in range(5))
    for at, (start, end, origin) in enumerate(runs):
        for k0, k1, stop in _chunks(rule, start, end, origin - kv_offset, delta + q_length):
            q0, q1, q2 = query(k0), query(k1), query(stop)
            among[at].append((q0, q1, k0, q1 + delta))
            # of the queries after the last key, those that see all keys, and those that see some
            skipped = q1 + delta - k1
            near, far = _split(q2 - q1, skipped, k1 - k0, rule.left)
            behind[at].append((q1, q1 + near, k0, k1))
            q1 += near
            far_behind[at].append((q1, q1 + far, k1 - (rule.left - skipped - near), k1))
        if rule.right > 0:
            # the mirror image: queries before the first key
            q1 = query(start)
            skipped = start - delta - q1
            near, far = _split(q1, skipped, end - start, rule.right)
            before[at].append((q1 - near, q1, start, end))
            q1 -= near
            far_before[at].append((q1 - far, q1, start, start + rule.right - skipped - near))
    calls = [
        ((rule.left, rule.right), False, among),
        ((-1, -1), False, behind),
        ((-1, -1), False, before),
        # the further away a query is, the fewer keys it sees: a causal triangle, the one behind read from the end
        ((-1, 0), True, far_behind),
        ((-1, 0), False, far_before),
    ]
    return _compact(calls, q_length, kv_length, device)


def _chunks(rule: Rule, start: int, end: int, origin: int, length: int) -> Iterator[tuple[int, int, int]]:
    """First and last key of each chunk, and the end of the queries that may see them."""
    if rule.chunk is None or start == end:
        yield start, end, length
        return
    at = origin + (start - origin) // rule.chunk * rule.chunk
    while at < end:
        yield max(at, start), min(at + rule.chunk, end), at + rule.chunk
        at += rule.chunk


def _split(queries: int, skipped: int, keys: int, reach: int) -> tuple[int, int]:
    """How many of the queries beyond the keys see all of them, and how many of the next see some.

    The query next to the keys sees ``reach`` of them, each further one sees one less; ``skipped`` are not there.
    """
    if reach == -1:
        return queries, 0
    near = min(max(reach - keys + 1 - skipped, 0), queries)
    return near, min(max(reach - skipped - near, 0), queries - near)


def _compact(
    calls: list[tuple[tuple[int, int], bool, list[list[_Piece]]]], q_length: int, kv_length: int, device: torch.device
) -> Compact:
    segments = []
    for window, backwards, pieces in calls:
        flat = [
            (b * q_length + q0, b * q_length + q1, b * kv_length + k0, b * kv_length + k1)
            for b, of_one in enumerate(pieces)
            for q0, q1, k0, k1 in of_one
            if q0 < q1 and k0 < k1
        ]
        if not flat and segments:
            continue
        ends = len(pieces) * q_length, len(pieces) * kv_length
        if backwards:
            flat = [(ends[0] - q1, ends[0] - q0, ends[1] - k1, ends[1] - k0) for q0, q1, k0, k1 in reversed(flat)]
        cu_q, cu_k = [0], [0]
        for q0, q1, k0, k1 in flat:
            # queries in front without keys | keys in front without queries | both
            cu_q += (q0, q0, q1)
            cu_k += (cu_k[-1], k0, k1)
        cu_q += (ends[0], ends[0])
        cu_k += (cu_k[-1], ends[1])
        both = torch.tensor([cu_q, cu_k], dtype=torch.int32, device="cpu").to(device)
        segments.append(Segments(both[0], both[1], window, backwards))
    return Compact(segments=tuple(segments))


def _packed(rule: Rule, batch: int, length: int, tracing: bool) -> Compact:
    """Positions restart at each sequence, so a window counts inside of it as it does in the whole."""
    ids = rule.packed
    assert ids is not None
    new = torch.cat((torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]), 1).flatten()
    index = torch.arange(batch * length, device=ids.device)
    if tracing:
        # without a wait for the device: segments at the end are empty
        starts = torch.where(new, index, batch * length).sort().values
    else:
        starts = new.nonzero().flatten()
    cu_seqlens = torch.cat((starts, index[-1:] + 1)).to(torch.int32)
    # dynamo takes no tensor twice
    return Compact(segments=(Segments(cu_seqlens, cu_seqlens.clone(), (rule.left, rule.right)),))
