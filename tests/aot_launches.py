"""What Triton's launcher makes of launches, in a process of its own, without the interpreter; prints JSON.

``keys``: for each kernel of the gate's cases, whether the launcher asks for the binary that was recorded.
``binaries``: for each kernel, what its launches with other lengths, batches and windows compile anew.
"""

import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch.utils._pytree import tree_map_only

from tilefuse.testing import aot
from tilefuse.testing.aot import call, tensor, train
from tilefuse.testing.aot.recorder import Launch, gpu_target

TARGET = "sm_90"


def asked(recorded: Launch) -> Launch:
    """What ``JITFunction.run`` compiles for real tensors of the same layout."""

    def real(x: torch.Tensor) -> torch.Tensor:
        size = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 if x.numel() else 0
        return torch.empty(x.storage_offset() + size, dtype=x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())

    compiled = []

    def compile(source, target, options):
        compiled.append(Launch(source, target, types.SimpleNamespace(**options), (), {}))

    recorded.kernel.device_caches.clear()
    with mock.patch("triton.compiler.compile", compile):
        args, keywords = tree_map_only(torch.Tensor, real, (recorded.args, dict(recorded.keywords)))
        recorded.kernel.run(*args, grid=(1,), warmup=True, **keywords)
    (launch,) = compiled
    return launch


def keys() -> dict[str, bool]:
    """kernel of a case -> whether both are the same."""
    device = types.SimpleNamespace(
        get_current_target=lambda: gpu_target(TARGET), get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    triton.runtime.driver.set_active(device)
    found = {}
    for family, op, module in aot.modules():
        for case in aot.cases(module):
            for launch in aot.record(case, TARGET, f"{family}/{op}"):
                real = asked(launch)
                same = (real.source.hash(), vars(real.options)) == (launch.source.hash(), vars(launch.options))
                found[f"{family}/{op}/{case.name}/{launch.name}"] = same
    return found


def calls(batch: int, length: int, window: int) -> Iterator[tuple[str, Any]]:
    """(path of an op, a call of it) of every op with Triton kernels, in one dtype and one width."""

    def x(*shape: int) -> Any:
        return tensor("bf16", batch, length, *shape)

    def tokens(*shape: int, dtype: str = "bf16") -> Any:
        return tensor(dtype, batch * length, *shape)

    qkv = x(8, 64), x(2, 64), x(2, 64)
    packed = (tokens(8, 64), tokens(2, 64), tokens(2, 64), None, None, *(tensor("i32", batch + 1),) * 2)
    per_head = tensor("fp32", 8)
    band = {"window": (window, window + 1)}
    every = {"dilation": window % 7 + 2, "sink_tokens": window % 5 + 1, "softcap": 30.0}
    yield "attention/window_attention", train("window_attention", *qkv, **band)
    yield "attention/window_attention", train("window_attention", *packed, **band)
    yield "attention/window_attention", train("window_attention", *qkv, per_head, per_head, **band, **every)
    table = tensor("fp32", 8, 2 * length - 1)
    yield "attention/window_attention", train("window_attention", *qkv, *(None,) * 4, table, **band, **every)
    index, mask = tensor("i64", batch, window % 40 + 1), tensor("bool", batch, length)
    yield "attention/global_attention", train("global_attention", *qkv, index, *qkv, mask, **band)
    rows = -(-length // 64)
    lists = tensor("i32", 1, 8, rows + 1), tensor("i32", 8 * rows + window), mask
    yield "attention/block_sparse_attention", train("block_sparse_attention", *qkv, *lists, causal=True)
    pages, table, lengths = tensor("bf16", window, 64, 2, 64), tensor("i32", batch, window), tensor("i32", batch)
    decode = tensor("bf16", batch, 1, 8, 64), pages, pages, table, lengths
    yield "attention/paged_attention", call("paged_attention", *decode, window=(window, 0))

    half, where, codes = (
        tensor("fp32", length + window, 32),
        tensor("i64", batch, length),
        tensor("u8", window, 64, 656),
    )
    bounds = tensor("i32", batch + 1)
    yield "rope/rope", train("rope_qk", *qkv[:2], half, half, where)
    yield "rope/rope", call("rope", tokens(8, 64), half, half, None, bounds)
    yield "rope/rope", call("rope_qk_", *qkv[:2], half, half, tensor("i64", 3, batch, length), mrope_section=(16, 8, 8))
    yield "rope/qk_norm_rope", train("qk_norm_rope", *qkv[:2], *(tensor("bf16", 64),) * 2, half, half, where)
    cache = tensor("bf16", window, 64, 2, 64)
    yield "rope/rope_append_kv", call("rope_append_kv", *qkv, half, half, where, cache, cache, where)

    place = tokens(dtype="i64")
    latent = tokens(576), tensor("bf16", 512), half, half, place
    yield "mla/mla_compress_kv", train("mla_compress_kv", *latent)
    yield "mla/mla_append_kv", call("mla_append_kv", *latent, codes, place, layout="fp8")
    yield (
        "mla/mla_absorb_query",
        train("mla_absorb_query", tokens(8, 192), tensor("bf16", 8, 128, 512), half, half, place),
    )
    dims = {"kv_lora_rank": 512, "nope_dim": 128, "v_dim": 128}
    yield "mla/mla_expand_kv", train("mla_expand_kv", tokens(576), tensor("bf16", 8 * 256, 512), **dims)
    yield "mla/mla_gather_kv", call("mla_gather_kv", codes, table, bounds, total_tokens=batch * length, layout="fp8")
    yield "mla/mla_attention", train("mla_attention", x(8, 192), x(8, 192), x(8, 128), softmax_scale=0.1)
    yield (
        "mla/mla_attention",
        train("mla_attention", tokens(8, 192), tokens(8, 192), tokens(8, 128), bounds, bounds, softmax_scale=0.1),
    )
    scaled = {"softmax_scale": 0.1, "layout": "fp8"}
    query = tensor("bf16", batch, 1, 16, 576)
    yield "mla/mla_decode", call("mla_decode", query, codes, table, lengths, window=window, **scaled)
    yield "mla/mla_decode", call("mla_sparse_decode", query, codes, tensor("i32", batch, 1, window), **scaled)
    out, lse = x(8, 64), tensor("fp32", batch, 8, length)
    yield "mla/merge_attention", train("merge_attention", out, lse, out, lse)

    head = tokens(256), tensor("bf16", 32000, 256), tokens(dtype="i64"), tensor("bf16", 32000)
    yield "loss/linear_logprobs", train("linear_logprobs", *head, softcap=30.0)
    yield "loss/linear_logprobs", train("linear_cross_entropy", *head[:3], label_smoothing=0.1)
    teacher = tokens(8, dtype="fp32"), tokens(8, dtype="i64")
    yield "loss/linear_topk_distillation", train("linear_topk_distillation", *head[:2], *teacher, *head[2:])
    answers, each = tensor("fp32", batch, length), tokens(dtype="fp32")
    grpo = {"kl_beta": 0.04, "reduction": "sequence"}
    yield "loss/policy_loss", train("policy_loss", answers, tensor("fp32", batch), answers, answers, mask, **grpo)
    yield "loss/policy_loss", train("policy_loss", each, each, each, None, None, each, bounds, dual_clip=3.0)
    yield "loss/policy_loss", train("policy_loss", each, each, kind="reinforce")
    logits = tokens(32000)
    yield "loss/linear_distillation", train("linear_distillation", *head[:2], *head[:3])
    yield "loss/distillation", train("distillation", logits, logits, tokens(dtype="i64"))

    # a slice, whose rows are not those of a matrix
    logits = tensor("bf16", batch, length, 32000, strides=((length + 1) * 32000, 32000, 1))
    yield "loss/logprobs", train("logprobs", logits, tensor("i64", batch, length), softcap=30.0)
    yield "loss/logprobs", train("cross_entropy", tokens(32000), tokens(dtype="i64"), label_smoothing=0.1)

    ids, weights = tokens(4, dtype="i32"), tokens(4, dtype="fp32")
    up, down, ends = tensor("bf16", 16, 512, 256), tensor("bf16", 16, 256, 256), tensor("i32", 17)
    yield "moe/moe_plan", call("moe_plan", ids, 16)
    yield "moe/moe_route", train("moe_route", tokens(16, dtype="fp32"), top_k=4)
    slots = batch * length * 4
    yield "moe/moe_combine", train("moe_combine", tensor("bf16", slots, 256), tensor("i32", slots), weights)
    yield "moe/moe_experts", train("moe_experts", tokens(256), up, down, weights, ids)
    yield "moe/grouped_matmul", train("grouped_matmul", tokens(256), up, ends, tensor("i32", slots))
    yield "moe/grouped_matmul", train("grouped_matmul", tokens(256), up, ends)

    a, a_scale = tokens(256, dtype="fp8"), tokens(2, dtype="fp32")
    yield "fp8/matmul", call("fp8_matmul", a, a_scale, tensor("fp8", 512, 256), tensor("fp32", 4, 2))
    experts = tensor("fp8", 16, 512, 256), tensor("fp32", 16, 4, 2)
    yield "fp8/grouped_matmul", call("fp8_grouped_matmul", a, a_scale, *experts, ends)
    yield "fp8/quantize", call("fp8_quantize", tokens(256))
    yield "fp8/quantize", call("fp8_quantize", tokens(256), block=(128, 128))
    yield "fp8/quantize", call("fp8_quantize_dual", tokens(256))
    yield "fp8/quantize", call("fp8_dequantize", a, a_scale)
    yield "fp8/rms_norm_quantize", call("rms_norm_quantize", tokens(256), tensor("bf16", 256), tokens(256))
    yield "fp8/silu_mul_quantize", call("silu_mul_quantize", tokens(512))

    byte, few = (tensor("i8", 512, 256), tensor("fp32", 512, 2)), (tensor("u8", 512, 128), tensor("bf16", 512, 2))
    yield "lowbit/int8_matmul", call("int8_matmul", tokens(256, dtype="i8"), tokens(2, dtype="fp32"), *byte)
    yield from (("lowbit/lowbit_matmul", call("lowbit_matmul", x(256), *few, activation=a)) for a in ("float", "int8"))
    groups = {"bits": 4, "group_size": 64}
    values = tokens(4, dtype="fp32"), tokens(4, dtype="u8")
    yield "lowbit/quantize", call("int_quantize", tokens(256), **groups)
    yield "lowbit/quantize", call("int_quantize", tokens(256), symmetric=False)
    yield "lowbit/quantize", call("int_dequantize", tokens(128, dtype="u8"), *values, **groups)
    yield "lowbit/fake_quantize", train("fake_quantize", x(256), symmetric=False)
    yield "lowbit/fake_quantize", train("fake_quantize", x(256), tensor("fp32", batch, length, 4), group_size=64)
    yield "lowbit/fake_quantize", train("fake_quantize", x(256), scale_gradient=True)

    yield "norm/gated_activation", train("gated_activation", x(512))
    yield "norm/rms_norm_gated", train("rms_norm_gated", x(8, 256), x(8, 256), tensor("bf16", 256))
    yield "norm/rms_norm", train("rms_norm", x(256), tensor("bf16", 256))
    yield "norm/rms_norm", train("add_rms_norm", x(256), x(256), tensor("bf16", 256))


# lengths and windows beside and at multiples of 16, and one, which Triton makes a constant
SIZES = ((1, 1, 1), (1, 1000, 511), (2, 1024, 512), (3, 1025, 33), (16, 4096, 4097))


def arguments_of(launch: Launch) -> tuple[dict[str, str], dict[str, str]]:
    """(constants by name, other arguments by name: types, alignment and values that Triton made constants)."""
    source, names = launch.source, launch.kernel.arg_names
    passed = dict(zip(names, launch.args)) | launch.keywords
    declared = {names[p.num] for p in launch.kernel.params if p.is_constexpr}
    chosen: dict[str, str] = {}
    rest = {name: f"{kind} " for name, kind in source.signature.items() if name not in declared}
    for path, alignment in source.attrs.items():
        if alignment:
            rest[names[path[0]]] += f"{path} {alignment} "
    for path, value in source.constants.items():
        label = name = names[path[0]]
        given = passed.get(name)
        for place in path[1:]:
            label, given = getattr(given, "_fields", {place: str(place)})[place], given[place]
        if name in declared or isinstance(given, tl.constexpr):
            chosen[label] = str(value)
        else:
            rest[name] += f"{path} {value} "
    return chosen, rest


def binaries() -> dict[str, dict[str, list[str]]]:
    """kernel -> ``arguments`` that make binaries of equal constants differ, and ``constants`` that differ."""
    groups: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    constants: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for size in SIZES:
        for number, (module, run) in enumerate(calls(*size)):
            times: Counter[str] = Counter()
            for launch in aot.record(aot.AotCase("", run), TARGET, module):
                chosen, rest = arguments_of(launch)
                # the n-th launch of a kernel by a call, such as the one of its backward
                name = (f"{module}/{launch.name}", number, times[launch.name])
                times[launch.name] += 1
                constants.setdefault(name, []).append(chosen)
                groups.setdefault((*name, str(chosen), str(launch.options)), []).append(rest)
    found: dict[str, dict[str, set[str]]] = {}
    for kind, described in (("arguments", groups), ("constants", constants)):
        for (kernel, *_), launches in described.items():
            differing = {name for name in set().union(*launches) if len({launch.get(name) for launch in launches}) > 1}
            found.setdefault(kernel, {}).setdefault(kind, set()).update(differing)
    return {kernel: {kind: sorted(names) for kind, names in kinds.items()} for kernel, kinds in found.items()}


if __name__ == "__main__":
    json.dump({"keys": keys, "binaries": binaries}[sys.argv[1]](), sys.stdout)
