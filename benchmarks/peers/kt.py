"""KTransformers' expert layers: the package ``kt-kernel``.

Its worker threads spin for some milliseconds after each call, so it is timed apart from the others, after them. A layer
that goes away leaves its packed weights behind.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..harness import Peer
from . import find

PACKAGE = "kt-kernel"


@functools.cache
def extension() -> Any:
    """The compiled module of the variant for this CPU, without the package around it, which wants more packages."""
    path = find(PACKAGE).locate_file("kt_kernel/_cpu_detect.py")
    spec = importlib.util.spec_from_file_location("tilefuse_kt_cpu_detect", str(path))
    assert spec is not None and spec.loader is not None
    detect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(detect)
    return detect.initialize()[0]


class Workers:
    """A pool of as many threads as torch has; they poll even when idle, so it lives only as long as layers use it."""

    def __init__(self):
        config = extension().WorkerPoolConfig()
        config.subpool_count = 1
        config.subpool_numa_map = [0]
        config.subpool_thread_count = [torch.get_num_threads()]
        self.pool = extension().CPUInfer(config)

    def __del__(self):
        with quiet():
            self.pool = None

    def do(self, task: Any) -> None:
        self.pool.submit(task)
        self.pool.sync()


# at most one, for all layers that are alive
_workers: weakref.WeakValueDictionary[str, Workers] = weakref.WeakValueDictionary()


def workers() -> Workers:
    return _workers.get("pool") or _workers.setdefault("pool", Workers())


@contextmanager
def quiet() -> Iterator[None]:
    """The library writes greetings and shapes to the standard output, which may carry a command's JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class Experts:
    """One layer's experts; the library keeps bare pointers, so this keeps their tensors."""

    def __init__(self, x, weights, ids, gate_up, down, gate_up_scale=None, down_scale=None):
        experts, hidden, inner = down.shape[0], down.shape[1], down.shape[2]
        self.x, self.weights, self.ids = x, weights.float().contiguous(), ids.long().contiguous()
        self.count = torch.tensor([x.shape[0]], dtype=torch.int32)
        self.nothing_on_gpu = torch.zeros(experts, dtype=torch.bool)
        self.order = torch.arange(experts)
        parts = gate_up[:, :inner], gate_up[:, inner:], down
        self.kept = [[part[e] for e in range(experts)] for part in parts]
        ext, self.workers = extension(), workers()
        config = ext.moe.MOEConfig(experts, ids.shape[1], hidden, inner, self.nothing_on_gpu.data_ptr())
        config.layer_idx = 0
        config.pool = self.workers.pool.backend_
        config.max_len = max(x.shape[0], 16)
        config.gate_projs, config.up_projs, config.down_projs = map(pointers, self.kept)
        if gate_up_scale is None or down_scale is None:
            self.layer = ext.moe.AMXBF16_MOE(config)
        else:
            split = inner // 128
            scales = gate_up_scale[:, :split], gate_up_scale[:, split:], down_scale
            self.scales = [[part[e] for e in range(experts)] for part in scales]
            config.gate_scales, config.up_scales, config.down_scales = map(pointers, self.scales)
            config.quant_config.bits = 8
            config.quant_config.group_size = 128
            config.quant_config.zero_point = False
            self.layer = ext.moe.AMXFP8_MOE(config)
        self.workers.do(self.layer.load_weights_task(self.order.data_ptr()))

    def __call__(self):
        out = torch.empty_like(self.x)
        tensors = self.ids, self.weights, self.x, out
        task = self.layer.forward_task(
            self.count.data_ptr(), self.ids.shape[1], *(t.data_ptr() for t in tensors), False
        )
        self.workers.do(task)
        return out

    def __del__(self):
        # before the pool that it points to
        self.layer = None


def pointers(tensors):
    return [[t.data_ptr() for t in tensors]]


def moe_experts(*, fp8: bool = False, **options: Any) -> Peer:
    """x, weights of the experts (fp8: each with its 128 x 128 scales, and bf16 activations), weights, ids."""

    def prepare(x, *args):
        *experts, weights, ids = args
        gate_up, down = experts[::2] if fp8 else experts
        with quiet():
            return (Experts(x, weights, ids, gate_up, down, *(experts[1::2] if fp8 else ())),)

    def load():
        extension()
        return lambda layer: layer()

    options |= {"apart": True, "keeps_memory": True}
    return Peer(load=load, prepare=prepare, devices=("cpu",), package=PACKAGE, **options)
