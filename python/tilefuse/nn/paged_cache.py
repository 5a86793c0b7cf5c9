"""Paged caches that the attention modules read and write: pages, block tables and lengths of a batch of sequences.

A model makes one cache for all of its layers. Before each forward it says how many tokens come::

    cache.extend(x.shape[1])
    for layer in layers:
        x = layer(x, cache=cache)

``extend`` takes pages from the pool, moves the lengths on and computes where the new tokens go. All of it is queued on
the device; the host never waits for it. The host only knows upper bounds of the lengths, from which it takes pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import errors
from ..ops.fp8.quantize import fp8_quantize
from ..ops.mla.layout import LAYOUTS, RowLayout, fp8_parts
from .common import check_positive

__all__ = ["PagedKVCache", "PagedLatentCache"]


# steps of decode size keep their tensors, so that a CUDA graph of one serves all
_KEPT_TOKENS = 16


class _Step:
    """Where the tokens of one forward go."""

    def __init__(self, batch: int, tokens: int, device: torch.device):
        self.positions = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        self.slots = torch.full((batch, tokens), -1, dtype=torch.int64, device=device)
        self.starts = torch.zeros(batch, dtype=torch.int32, device=device)
        self.ends = torch.zeros(batch, dtype=torch.int32, device=device)


class _PagedCache:
    """Allocation, block table and lengths; subclasses add the storage."""

    def __init__(
        self,
        name: str,
        batch_size: int,
        max_length: int,
        page_size: int,
        num_pages: int | None,
        num_layers: int,
        device: torch.device | str | None,
    ):
        check_positive(name, batch_size=batch_size, max_length=max_length, page_size=page_size, num_layers=num_layers)
        self._name = name
        self.batch_size, self.page_size, self.num_layers = batch_size, page_size, num_layers
        self.max_pages = -(-max_length // page_size)
        self.max_length = max_length
        self.num_pages = batch_size * self.max_pages if num_pages is None else num_pages
        check_positive(name, num_pages=self.num_pages)
        self.device = torch.device(torch.get_default_device() if device is None else device)
        self.block_table = torch.full((batch_size, self.max_pages), -1, dtype=torch.int32, device=self.device)
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._bounds = [0] * batch_size
        self._steps: dict[int, _Step] = {}
        self._step: _Step | None = None
        self._tokens = 0
        self._prefix_bound = 0

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence has."""
        return len(self._free)

    def extend(self, tokens: int, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Makes room for the next ``tokens`` tokens of every sequence: once per forward of the whole model.

        Args:
            tokens: S of the following forward's ``[B, S, hidden]``.
            lengths: ``[B]``, how many of the S tokens of each sequence are real, the first ones (right padding); 0
                lets a finished sequence rest. A list of ints takes just the pages that it needs; a tensor is not read
                by the host, which then takes pages as if all S were real. None: all of them. Rows of padding come out
                of a module as finite numbers without a meaning.

        Raises:
            ValueError: a sequence would grow past ``max_length``, the pool has too few pages, wrong lengths.
        """
        check_positive(self._name, tokens=tokens)
        grow = [tokens] * self.batch_size
        if isinstance(lengths, Tensor):
            if tuple(lengths.shape) != (self.batch_size,):
                errors.value_error(self._name, "lengths", f"[{self.batch_size}] int32 or int64", lengths)
            errors.check_dtype(self._name, "lengths", lengths, errors.INDEX_DTYPES)
            new = lengths.to(self.device, torch.int32, non_blocking=True).clamp(0, tokens)
        elif lengths is not None:
            grow = [int(n) for n in lengths]
            if len(grow) != self.batch_size or min(grow) < 0 or max(grow) > tokens:
                errors.value_error(self._name, "lengths", f"{self.batch_size} numbers in [0, {tokens}]", grow)
            new = torch.tensor(grow, dtype=torch.int32, device="cpu").to(self.device, non_blocking=True)
        else:
            new = None
        # rows of padding take part in the alignment of queries and keys, so they must fit too
        longest = max(bound + (tokens if n else 0) for bound, n in zip(self._bounds, grow))
        if longest > self.max_pages * self.page_size or max(map(sum, zip(self._bounds, grow))) > self.max_length:
            errors.value_error(self._name, "max_length", f"at least {longest} for these tokens", self.max_length)
        prefix_bound = max(self._bounds)
        self._take_pages([bound + n for bound, n in zip(self._bounds, grow)])
        self._prefix_bound = prefix_bound
        step = self._steps.get(tokens) or _Step(self.batch_size, tokens, self.device)
        if tokens <= _KEPT_TOKENS:
            self._steps[tokens] = step
        step.starts.copy_(self.seq_lens)
        torch.add(step.starts, tokens, out=step.ends)
        offset = torch.arange(tokens, dtype=torch.int32, device=self.device)
        torch.add(step.starts[:, None], offset, out=step.positions)
        page = (step.positions // self.page_size).clamp(max=self.max_pages - 1).long()
        pages = self.block_table.gather(1, page).long()
        slots = pages * self.page_size + step.positions % self.page_size
        real = pages >= 0
        if new is not None:
            real &= offset < new[:, None]
            # a position of padding may lie past the rotary tables
            step.positions.copy_(torch.where(offset < new[:, None], step.positions, 0))
        step.slots.copy_(torch.where(real, slots, -1))
        self.seq_lens.add_(tokens if new is None else new)
        self._step, self._tokens = step, tokens

    def _take_pages(self, bounds: list[int]) -> None:
        need = [-(-bound // self.page_size) - len(pages) for bound, pages in zip(bounds, self._pages)]
        if sum(max(0, n) for n in need) > len(self._free):
            used = self.num_pages - len(self._free)
            least = used + sum(max(0, n) for n in need)
            errors.value_error(self._name, "num_pages", f"at least {least} for these tokens", self.num_pages)
        for b, count in enumerate(need):
            if count > 0:
                taken = [self._free.pop() for _ in range(count)]
                first = len(self._pages[b])
                self._pages[b] += taken
                row = torch.tensor(taken, dtype=torch.int32, device="cpu")
                self.block_table[b, first : first + count] = row.to(self.device, non_blocking=True)
        self._bounds = bounds

    def reset(self, sequences: Iterable[int] | None = None) -> None:
        """Forgets these sequences of the batch (None: all of them) and returns their pages to the pool."""
        which = range(self.batch_size) if sequences is None else [int(b) for b in sequences]
        for b in which:
            if not 0 <= b < self.batch_size:
                errors.value_error(self._name, "sequences", f"in [0, {self.batch_size})", b)
            self._free += reversed(self._pages[b])
            self._pages[b], self._bounds[b] = [], 0
            self.block_table[b].fill_(-1)
            self.seq_lens[b].zero_()
        self._step, self._tokens = None, 0

    def _planned(self, module: str, x: Tensor, layer: int) -> _Step:
        """The step that ``x [B, S, hidden]`` belongs to."""
        if not 0 <= layer < self.num_layers:
            errors.value_error(module, "layer_idx", f"below the cache's num_layers {self.num_layers}", layer)
        if self._step is None or tuple(x.shape[:2]) != (self.batch_size, self._tokens):
            expected = f"[{self.batch_size}, {self._tokens}, ..], as cache.extend({self._tokens}) announced"
            errors.value_error(module, "x", expected if self._step else "announced by cache.extend(S) first", x)
        return self._step

    def _repr(self, rest: str) -> str:
        return (
            f"{type(self).__name__}(batch_size={self.batch_size}, max_length={self.max_length}, "
            f"page_size={self.page_size}, pages={self.num_pages - len(self._free)} of {self.num_pages} used, "
            f"num_layers={self.num_layers}, {rest}, device={self.device})"
        )


class PagedLatentCache(_PagedCache):
    """The paged latent cache of ``MultiheadLatentAttention``: one row ``[normed latent | rotated part]`` per token.

    Args:
        batch_size: sequences B.
        max_length: longest sequence in tokens.
        kv_lora_rank, qk_rope_head_dim: R and r; 512 and 64 for DeepSeek.
        page_size: tokens of a page.
        num_pages: pages of the pool, shared by all sequences; None is enough for all of them at full length.
        num_layers: layers of the model; each has its own storage, all share pages and lengths.
        layout: ``"bf16"`` (R + r elements of ``dtype``) or ``"fp8"`` (656 bytes at R = 512, r = 64: e4m3 codes, scales,
            bfloat16 rotated part). Byte by byte: ``tilefuse/ops/mla/layout.py``.
        dtype: of the ``"bf16"`` layout: bfloat16, float16 or float32, that of the module. Ignored for ``"fp8"``.
        device: of everything.

    Attributes:
        seq_lens: ``[B]`` int32, tokens of each sequence. block_table: ``[B, max_pages]`` int32, -1 = none.
        rows: ``[num_layers, num_pages, page_size, width]``; a layer's ``cache`` argument of the ops is ``rows[i]``.

    Raises:
        ValueError: a size below 1, an unknown layout, an odd r, R no multiple of 128 for ``"fp8"``. TypeError: dtype.

    Example::

        cache = tilefuse.nn.PagedLatentCache(2, 4096, num_layers=4)
        cache.extend(512)      # then forward 512 tokens; afterwards cache.extend(1) and one token at a time
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        kv_lora_rank: int = 512,
        qk_rope_head_dim: int = 64,
        page_size: int = 64,
        num_pages: int | None = None,
        num_layers: int = 1,
        layout: str = "bf16",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        name = "nn.PagedLatentCache"
        super().__init__(name, batch_size, max_length, page_size, num_pages, num_layers, device)
        check_positive(name, kv_lora_rank=kv_lora_rank, qk_rope_head_dim=qk_rope_head_dim)
        if qk_rope_head_dim % 2:
            errors.value_error(name, "qk_rope_head_dim", "even", qk_rope_head_dim)
        if layout not in LAYOUTS:
            errors.value_error(name, "layout", f"one of {', '.join(LAYOUTS)}", layout)
        if layout == "fp8" and kv_lora_rank % 128:
            errors.value_error(name, "kv_lora_rank", "a multiple of 128 for layout fp8", kv_lora_rank)
        if dtype not in errors.FLOATS:
            errors.type_error(name, "dtype", "a floating dtype of the ops", dtype)
        self.kv_lora_rank, self.qk_rope_head_dim, self.layout = kv_lora_rank, qk_rope_head_dim, layout
        width = RowLayout(layout, kv_lora_rank, qk_rope_head_dim).width
        # zeros: rows that padding reads before anything was written are finite
        self.rows = torch.zeros(
            num_layers, self.num_pages, page_size, width, dtype=torch.uint8 if layout == "fp8" else dtype,
            device=self.device,
        )  # fmt: skip

    def _store(self, layer: int, latent: Tensor, slots: Tensor) -> None:
        """What ``mla_append_kv`` does, of rows ``[T, R + r]`` that are normed and rotated already."""
        stored = self.rows[layer].view(-1, self.rows.shape[-1])
        row = RowLayout(self.layout, self.kv_lora_rank, self.qk_rope_head_dim)
        if row.is_fp8:
            rows = stored.new_empty(latent.shape[0], row.width)
            codes, scale = fp8_quantize(latent[:, : row.rank], scale_format="pow2")
            for part, value in zip(fp8_parts(rows, row), (codes.view(torch.uint8), scale, latent[:, row.rank :])):
                part.copy_(value)
        else:
            rows = latent.to(stored.dtype)
        # the host does not know which tokens have a slot: those without repeat the write of one that has; if none
        # has, the first row is written back as it is
        kept = slots >= 0
        source = torch.where(kept, torch.arange(slots.shape[0], device=slots.device), kept.byte().argmax())
        target = slots[source].clamp(min=0)
        stored.index_copy_(0, target, torch.where(kept.any(), rows[source], stored[target]))

    def __repr__(self) -> str:
        return self._repr(f"layout={self.layout}, dtype={errors.dtype_name(self.rows.dtype)}")


class PagedKVCache(_PagedCache):
    """The paged key/value cache of ``WindowAttention``.

    Pages stay with their sequence also when its window has left them behind; they are not read any more.

    Args:
        batch_size, max_length, page_size, num_pages, num_layers, device: as in ``PagedLatentCache``.
        num_kv_heads, head_dim: Hkv and D. v_head_dim: width of values, None is D.
        dtype: that of the module, or float8_e4m3fn.
        k_scale, v_scale: dequantisation scales of a float8 cache.

    Attributes:
        seq_lens, block_table: as in ``PagedLatentCache``.
        k, v: ``[num_layers, num_pages, page_size, Hkv, D]``.

    Raises:
        ValueError: a size below 1, a scale that is not positive, or other than 1 without float8. TypeError: dtype.

    Example::

        cache = tilefuse.nn.PagedKVCache(2, 4096, num_kv_heads=8, head_dim=128, num_layers=32)
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        page_size: int = 64,
        num_pages: int | None = None,
        num_layers: int = 1,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        name = "nn.PagedKVCache"
        super().__init__(name, batch_size, max_length, page_size, num_pages, num_layers, device)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_positive(name, num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim)
        if dtype not in (*errors.FLOATS, torch.float8_e4m3fn):
            errors.type_error(name, "dtype", "a floating dtype of the ops or float8_e4m3fn", dtype)
        for arg, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if not 0 < scale < float("inf") or (scale != 1 and dtype != torch.float8_e4m3fn):
                errors.value_error(name, arg, "positive, and 1 unless dtype is float8_e4m3fn", scale)
        self.k_scale, self.v_scale = float(k_scale), float(v_scale)
        shape = (num_layers, self.num_pages, page_size, num_kv_heads)
        self.k = torch.zeros(*shape, head_dim, device=self.device).to(dtype)
        self.v = torch.zeros(*shape, v_head_dim, device=self.device).to(dtype)

    def __repr__(self) -> str:
        return self._repr(f"heads={self.k.shape[3]}, dtype={errors.dtype_name(self.k.dtype)}")
