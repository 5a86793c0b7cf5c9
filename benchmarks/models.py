"""Whole models of Hugging Face transformers, stock against ``tilefuse.integrations.transformers.patch``.

Layer widths are those of the real models; layers, experts and vocabulary are few and weights random, so that a machine
without a GPU can hold them. Each case says which. Stock is what ``from_config`` gives: Hugging Face's own choice of
attention and experts. The modes:

* *prefill*: one forward over a prompt that also fills the KV cache (encoders have no cache: one forward);
* *decode*: steps of one token per sequence with the cache after a prompt, given tokens instead of greedy ones so that
  both models do the same work;
* *prefill packed*, *decode packed*: the same of a model with experts, patched with ``pack="only"``, on a CPU;
* *train*: forward, loss and backward for all weights; no optimiser step, no dropout.

Before anything is timed, logits are compared on short inputs: in float32 with the stock model's, and in the case's
dtype with float32 (root mean square error over all logits at most twice stock's; a router may decide a near tie
otherwise, so single rows say nothing). Outputs at full size, and all gradients, are compared once more for blunders.

Peak memory is what one call allocates beyond the weights, the inputs and the cache it starts from. On a GPU it is the
caching allocator's peak. On a CPU it is the largest running sum of torch's allocations and frees as the profiler
records them (``profile_memory``), kernels' scratch tensors included; memory that a library takes without torch's
allocator is not in it. The resident set would say less: freed blocks stay in it.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import timing
from .harness import Failure
from .report import MODELS as FAMILY
from .shapes import DEEPSEEK_V2_LITE, GPT_OSS_20B, LLAMA3_8B, LONGFORMER_BASE, QWEN3_30B_A3B, SMOLLM2_135M

VOCAB = 4096
# of a mode whose patched model has packed weights
PACKED = " packed"
STEPS = 4
MIN_ROUNDS, MAX_ROUNDS = 3, 50
COMPARED_ELEMENTS = 2**20
NOISE = 1e-3
# root mean square difference to stock over root mean square of stock: float32 noise through a few layers
SAME_IN_FLOAT32 = 1e-4
# the same in bfloat16 at full size, where only blunders are looked for; with experts near ties are decided otherwise
APART, APART_WITH_EXPERTS = 0.05, 0.3


@dataclass(frozen=True)
class Net:
    """A model: its configuration by number of layers and experts, and the inputs of the comparison."""

    name: str
    build: Callable[[int, int], nn.Module]
    short: int  # tokens of the comparison: more than windows and lists of blocks hold
    all_experts: int = 0
    encoder: bool = False


@dataclass(frozen=True)
class ModelCase:
    """One line of the results. ``harness.discover`` lists it among the ops' cases; ``measure`` runs it."""

    net: Net
    mode: str
    batch: int
    tokens: int
    layers: int = 1
    experts: int = 0
    suite: str = "full"
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtype: str = "bfloat16"
    family: str = field(default=FAMILY, compare=False)
    # what a line of an op has and the table of models does not show
    bytes: int = 0
    flops: int = 0
    call_cost: bool = False
    reads: bool = False
    series: str = ""
    length: int = 0

    @property
    def op(self) -> str:
        return self.net.name

    @property
    def name(self) -> str:
        parts = [f"{self.layers} layer{'s' if self.layers > 1 else ''}"]
        if self.net.all_experts:
            parts.append(f"{self.experts} of {self.net.all_experts} experts")
        if self.kind == "decode":
            return ", ".join((*parts, f"batch {self.batch}, {self.tokens} tokens in the cache"))
        return ", ".join((*parts, f"{self.batch} x {self.tokens} tokens"))

    @property
    def kind(self) -> str:
        """What a call does, however the weights are kept."""
        return self.mode.removesuffix(PACKED)

    @property
    def packed(self) -> bool:
        return self.mode.endswith(PACKED)

    @property
    def id(self) -> str:
        return f"{self.op} | {self.name} | {self.dtype} | {self.mode}"

    @property
    def counted(self) -> int:
        """Tokens that one call handles."""
        return self.batch * (STEPS if self.kind == "decode" else self.tokens)

    def measure(self, runner: Any) -> dict[str, Any]:
        # a call is long and both are alike: half of an op's time is enough rounds
        return _measure(self, runner.device, runner.settings.seconds / 2)


def _causal(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _masked(config: Any) -> nn.Module:
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16)


def _decoder(m: Any, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": m.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "intermediate_size": m.intermediate,
        "max_position_embeddings": 2**16,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama(m: Any, layers: int, _: int) -> nn.Module:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": m.rope_theta}
    return _causal(LlamaConfig(**_decoder(m, layers), head_dim=m.head_dim, rope_parameters=rope))


def _qwen3_moe(layers: int, experts: int) -> nn.Module:
    from transformers import Qwen3MoeConfig

    m = QWEN3_30B_A3B
    rope = {"rope_type": "default", "rope_theta": m.rope_theta}
    return _causal(
        Qwen3MoeConfig(
            **_decoder(m, layers),
            head_dim=m.head_dim,
            rope_parameters=rope,
            num_experts=experts,
            num_experts_per_tok=m.top_k,
            moe_intermediate_size=m.moe_intermediate,
            norm_topk_prob=True,
        )
    )


def _deepseek_v3(layers: int, experts: int) -> nn.Module:
    """DeepSeek-V3's architecture (sigmoid router with groups, one shared expert) at the widths of V2-Lite."""
    from transformers import DeepseekV3Config

    m = DEEPSEEK_V2_LITE
    return _causal(
        DeepseekV3Config(
            **_decoder(m, layers),
            n_routed_experts=experts,
            num_experts_per_tok=m.top_k,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=0,
            moe_intermediate_size=m.moe_intermediate,
            n_shared_experts=1,
            q_lora_rank=None,
            kv_lora_rank=m.kv_lora_rank,
            qk_nope_head_dim=m.nope_dim,
            qk_rope_head_dim=m.rope_dim,
            v_head_dim=m.v_dim,
        )
    )


def _gpt_oss(layers: int, experts: int) -> nn.Module:
    from transformers import GptOssConfig

    m = GPT_OSS_20B
    return _causal(
        GptOssConfig(
            **_decoder(m, layers),
            head_dim=m.head_dim,
            num_local_experts=experts,
            num_experts_per_tok=m.top_k,
            sliding_window=m.window,
            layer_types=["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
        )
    )


def _encoder(m: Any, layers: int, length: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": m.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": m.heads,
        "intermediate_size": m.intermediate,
        "max_position_embeddings": length,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _longformer(layers: int, _: int) -> nn.Module:
    from transformers import LongformerConfig

    m = LONGFORMER_BASE
    # two positions are taken by padding
    return _masked(LongformerConfig(**_encoder(m, layers, 4098), attention_window=[m.window] * layers))


def _bigbird(layers: int, _: int) -> nn.Module:
    """BigBird-base: the widths of Longformer-base, 3 random blocks of 64 tokens."""
    from transformers import BigBirdConfig

    return _masked(BigBirdConfig(**_encoder(LONGFORMER_BASE, layers, 4096)))


LLAMA = Net(LLAMA3_8B.name, functools.partial(_llama, LLAMA3_8B), 64)
SMOLLM2 = Net(SMOLLM2_135M.name, functools.partial(_llama, SMOLLM2_135M), 64)
QWEN3_MOE = Net(QWEN3_30B_A3B.name, _qwen3_moe, 64, QWEN3_30B_A3B.experts)
DEEPSEEK = Net("DeepSeek-V3 at V2-Lite widths", _deepseek_v3, 64, DEEPSEEK_V2_LITE.experts)
GPT_OSS = Net(GPT_OSS_20B.name, _gpt_oss, 160, GPT_OSS_20B.experts)
LONGFORMER = Net(LONGFORMER_BASE.name, _longformer, 1024, encoder=True)
BIGBIRD = Net("BigBird-base", _bigbird, 1024, encoder=True)


def cases() -> Iterator[ModelCase]:
    """Cases of one model follow each other, so that its weights are made once."""
    cpu, cuda = ("cpu",), ("cuda",)
    for net, experts in ((LLAMA, 0), (QWEN3_MOE, 16), (DEEPSEEK, 16), (GPT_OSS, 8)):
        few = {"experts": experts, "devices": cpu}
        # gpt-oss: more tokens than its window, and its experts are large
        tokens = 256 if net is GPT_OSS else 128
        yield ModelCase(net, "prefill", 1, tokens, suite="quick", **few)
        yield ModelCase(net, "decode", 4, tokens, suite="quick", **few)
        yield ModelCase(net, "train", 1, 64, suite="full" if net is GPT_OSS else "quick", **few)
        if experts:
            yield ModelCase(net, "prefill packed", 1, tokens, suite="quick", **few)
            yield ModelCase(net, "decode packed", 4, tokens, suite="quick", **few)
        yield ModelCase(net, "prefill", 1, 1024, layers=2, **few)
        yield ModelCase(net, "decode", 8, 1024, layers=2, **few)
        all_of_it = {"layers": 4, "experts": net.all_experts, "devices": cuda, "suite": "quick"}
        yield ModelCase(net, "prefill", 1, 4096, **all_of_it)
        yield ModelCase(net, "decode", 32, 2048, **all_of_it)
        yield ModelCase(net, "train", 1, 4096, **all_of_it)
    # all of its layers: what a call costs beside its work shows
    for mode, batch in (("prefill", 1), ("decode", 1), ("decode", 4), ("train", 1)):
        yield ModelCase(SMOLLM2, mode, batch, 128, layers=SMOLLM2_135M.layers, suite="quick")
    for net in (LONGFORMER, BIGBIRD):
        yield ModelCase(net, "prefill", 1, 4096, suite="quick", devices=cpu)
        yield ModelCase(net, "train", 1, 2048, devices=cpu)
        yield ModelCase(net, "prefill", 4, 4096, layers=12, suite="quick", devices=cuda)
        yield ModelCase(net, "train", 4, 4096, layers=12, suite="quick", devices=cuda)


@dataclass
class Pair:
    """A stock model, a patched one with the same weights, and how far their logits are from float32."""

    stock: nn.Module
    patched: nn.Module
    changed: dict[str, int]
    left: dict[str, int]
    error: dict[str, float]


# of the model measured last, so that its cases share it
_kept: dict[tuple[Any, ...], Pair] = {}


def _pair(case: ModelCase, device: torch.device) -> Pair:
    key = (case.net, case.layers, case.experts, case.packed, device)
    if key not in _kept:
        _kept.clear()
        gc.collect()
        _kept[key] = _make(case, device)
    return _kept[key]


def forget() -> None:
    """Frees the weights of the last model."""
    _kept.clear()


def _make(case: ModelCase, device: torch.device) -> Pair:
    try:
        from transformers.initialization import no_init_weights
        from transformers.utils import logging

        from tilefuse.integrations.transformers import patch
    except ImportError as reason:
        raise NotImplementedError(f"needs pip install tilefuse[transformers] ({reason})") from None
    logging.set_verbosity_error()
    with no_init_weights(), device:
        stock = case.net.build(case.layers, case.experts).eval()
    _fill(stock)
    patched = _twin(stock)
    report = patch(patched, pack="only" if case.packed else False)
    error = _compare(case, stock, patched, device)
    return Pair(stock, patched, dict(Counter(report.changed.values())), dict(Counter(report.left.values())), error)


def _fill(model: nn.Module) -> None:
    """Normal weights of the size that models start with, from one block repeated: making them all takes seconds."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    # no divisor of a weight's rows, so that rows differ
    block = torch.randn(2**20 + 7, device=device, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1)
                continue
            flat, part = parameter.view(-1), block.mul(0.02).to(parameter.dtype)
            for start in range(0, flat.numel(), part.numel()):
                flat[start : start + part.numel()].copy_(part[: flat.numel() - start])
        for name, buffer in model.named_buffers():
            # a router's correction bias is left uninitialised too
            if name.endswith("bias"):
                buffer.zero_()


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _inputs(case: ModelCase, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(tokens)
    ids = torch.randint(5, VOCAB, (batch, tokens), device=device, generator=generator)
    inputs = {"input_ids": ids}
    if case.net is LONGFORMER:
        inputs["global_attention_mask"] = torch.zeros_like(ids)
        inputs["global_attention_mask"][:, torch.arange(16, device=device) * (tokens // 16)] = 1
    return inputs


def _compare(case: ModelCase, stock: nn.Module, patched: nn.Module, device: torch.device) -> dict[str, float]:
    from tilefuse.integrations.transformers import patch

    inputs = _inputs(case, 1, case.net.short, device)
    with torch.no_grad():
        logits = [model(**inputs).logits.double() for model in (stock, patched)]
        wide = copy.deepcopy(stock).float()
        exact = wide(**inputs).logits.double()
        patch(wide)
        difference = _distance([wide(**inputs).logits], [exact])
    naive, ours = (_distance([x], [exact]) for x in logits)
    if not difference <= SAME_IN_FLOAT32:
        raise Failure(f"float32 logits differ from stock's by {difference:.2e} of their size")
    if not ours <= 2 * naive:
        raise Failure(f"bfloat16 logits are off by {ours:.2e} of their size, stock's by {naive:.2e}")
    return {"rms": ours, "naive_rms": naive, "float32": difference}


def _distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Root mean square difference over root mean square of the expected, all tensors together.

    Of a weight's gradient every n-th element is enough to find a blunder.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    for g, e in zip(got, expected, strict=True):
        step = max(1, g.numel() // COMPARED_ELEMENTS)
        g, e = g.flatten()[::step], e.flatten()[::step]
        squares += torch.stack([(g.double() - e.double()).square().sum(), e.double().square().sum()]).cpu()
    return math.sqrt(squares[0] / squares[1])


def _worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest distance of one tensor; those that are nothing beside the others (key biases' gradients) are noise."""
    sizes = [float(torch.linalg.vector_norm(e.float())) for e in expected]
    enough = NOISE * max(sizes)
    return max(_distance([g], [e]) for g, e, size in zip(got, expected, sizes, strict=True) if size > enough)


@dataclass
class Job:
    """What is timed: ``run`` on what ``prepare``, untimed, made ready. It returns what is compared."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    outputs: Callable[[Any], list[Tensor]]


def _job(case: ModelCase, model: nn.Module, device: torch.device) -> Job:
    inputs = _inputs(case, case.batch, case.tokens + (STEPS if case.kind == "decode" else 0), device)
    ids = inputs["input_ids"]
    if case.kind == "prefill":
        return Job(lambda: None, lambda _: model(**inputs), lambda out: [out.logits])
    if case.mode == "train":

        def step(_: Any) -> Tensor:
            with torch.enable_grad():
                loss = model(**inputs, labels=ids).loss
                loss.backward()
            return loss

        def gradients(_: Tensor) -> list[Tensor]:
            return [*(p.grad for p in model.parameters() if p.grad is not None)]

        return Job(lambda: model.zero_grad(set_to_none=True), step, gradients)
    cache = model(ids[:, : case.tokens], use_cache=True).past_key_values

    def steps(cache: Any) -> Any:
        for i in range(case.tokens, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        return out

    return Job(lambda: copy.deepcopy(cache), steps, lambda out: [out.logits])


def _measure(case: ModelCase, device: torch.device, seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    pair = _pair(case, device)
    made = time.perf_counter() - began
    jobs = {"stock": _job(case, pair.stock, device), "tilefuse": _job(case, pair.patched, device)}
    peaks, outputs = {}, {}
    for name, job in jobs.items():
        peaks[name], out = peak_bytes(job, device)
        found = job.outputs(out)
        outputs[name] = [x.detach().clone() for x in found] if name == "stock" else found
        del out, found
    apart = _worst(outputs["tilefuse"], outputs["stock"])
    if not apart <= (APART_WITH_EXPERTS if case.experts else APART):
        raise Failure(f"outputs differ from stock's by {apart:.2e} of their size")
    outputs.clear()
    samples = rounds(jobs, device, seconds)
    if case.mode == "train":
        # both models hold the same gradients
        jobs["stock"].prepare()
    result = {name: _numbers(case, taken, peaks[name]) for name, taken in samples.items()}
    speedup = statistics.median(s / t for s, t in zip(samples["stock"], samples["tilefuse"]))
    return {
        **result["tilefuse"],
        "peers": {"stock": result["stock"] | {"speedup": speedup}},
        "error": pair.error | {"apart": apart},
        "weights_bytes": sum(p.numel() * p.element_size() for p in pair.stock.parameters()),
        "changed": pair.changed,
        "left": pair.left,
        "phases": {"model": round(made, 2)},
    }


def _numbers(case: ModelCase, samples: list[float], peak: int) -> dict[str, Any]:
    median = statistics.median(samples)
    return {
        "median_us": median * 1e6,
        "p20_us": timing.percentile(samples, 0.2) * 1e6,
        "p80_us": timing.percentile(samples, 0.8) * 1e6,
        "rounds": len(samples),
        "tokens_per_second": case.counted / median,
        "peak_bytes": peak,
    }


def rounds(jobs: Mapping[str, Job], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call each, in rounds that all take part in, their order alternating."""

    def once(job: Job) -> float:
        ready = job.prepare()
        _synchronize(device)
        before = time.perf_counter()
        out = job.run(ready)
        _synchronize(device)
        took = time.perf_counter() - before
        del out, ready
        return took

    samples: dict[str, list[float]] = {name: [] for name in jobs}
    end = time.perf_counter() + seconds
    order = list(jobs)
    while len(samples[order[0]]) < MIN_ROUNDS or (time.perf_counter() < end and len(samples[order[0]]) < MAX_ROUNDS):
        for name in order:
            samples[name].append(once(jobs[name]))
        order.reverse()
    return samples


def peak_bytes(job: Job, device: torch.device) -> tuple[int, Any]:
    """Most bytes that a call held at once beyond what was there before it, and its output."""
    ready = job.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = job.run(ready)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, out
    # its start and stop would be printed
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = job.run(ready)
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(events):
        held += size
        most = max(most, held)
    return most, out


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
