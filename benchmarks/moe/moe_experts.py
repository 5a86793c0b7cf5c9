"""The whole layer after routing, against Hugging Face's experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, normal
from ..peers import kt, vllm, zentorch
from ..shapes import DEEPSEEK_V3, QWEN3_30B_A3B, Model

# experts that get random weights of their own; the others are scaled copies, which are made much faster
DISTINCT = 8


def loop(x, w_gate_up, w_down, weights, ids):
    """A plain computation in x's dtype, every slot's expert in turn."""
    out = torch.zeros(*ids.shape, w_down.shape[1], dtype=x.dtype, device=x.device)
    for e in range(w_gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        gate, up = F.linear(x[token], w_gate_up[e]).chunk(2, -1)
        out = out.index_put((token, slot), F.linear(F.silu(gate) * up, w_down[e]))
    return (out * weights[..., None]).sum(1).to(x.dtype)


def huggingface(implementation: str, m: Model, *, compile: bool = False) -> Peer:
    """Qwen3MoeExperts on the case's own weights."""

    def load():
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        modules = {}

        def run(x, w_gate_up, w_down, weights, ids):
            shape = w_gate_up.shape
            if shape not in modules:
                config = Qwen3MoeConfig(num_experts=shape[0], hidden_size=shape[2], moe_intermediate_size=shape[1] // 2)
                config._experts_implementation = implementation
                with torch.device("meta"):
                    modules[shape] = Qwen3MoeExperts(config)
            parameters = {"gate_up_proj": w_gate_up, "down_proj": w_down}
            return torch.func.functional_call(modules[shape], parameters, (x, ids, weights))

        return run

    def prepare(x, w_gate_up, w_down, weights, ids):
        return x, w_gate_up, w_down, weights, ids.long()

    # compiling it takes too much of the quick suite's time
    devices = ("cuda",) if compile else ("cpu", "cuda")
    return Peer(load=load, prepare=prepare, compile=compile, devices=devices, package="transformers")


def scaled_copies(experts: int, rows: int, columns: int, device, generator):
    count = min(experts, DISTINCT)
    block = normal((count, rows, columns), torch.bfloat16, device, generator, columns**-0.5)
    out = block.new_empty(experts, rows, columns)
    for e in range(experts):
        # no two experts alike
        torch.mul(block[e % count], 0.5 + (e + 1) / experts, out=out[e])
    return out


def routed(tokens: int, experts: int, hidden: int, top_k: int, device, generator):
    """x, the weights of its slots and their experts."""
    x = normal((tokens, hidden), torch.bfloat16, device, generator)
    if tokens * top_k <= experts:
        # few tokens: every slot another expert, so that it is known how many weights are read
        ids = torch.randperm(experts, generator=generator, device=device)[: tokens * top_k].view(tokens, top_k)
    else:
        ids = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k, -1).indices
    return x, normal((tokens, top_k), torch.float32, device, generator).softmax(-1), ids.int()


def inputs_of(tokens: int, experts: int, hidden: int, intermediate: int, top_k: int):
    def inputs(device, generator):
        x, weights, ids = routed(tokens, experts, hidden, top_k, device, generator)
        w_gate_up = scaled_copies(experts, 2 * intermediate, hidden, device, generator)
        w_down = scaled_copies(experts, hidden, intermediate, device, generator)
        return x, w_gate_up, w_down, weights, ids

    return inputs


def packed(x, w_gate_up, w_down, weights, ids):
    return x, tilefuse.pack_weight(w_gate_up), tilefuse.pack_weight(w_down), weights, ids


def case(m: Model, tokens: int, experts: int, mode: str = "forward", *, pack: bool = False, **options) -> Case:
    slots = tokens * m.top_k
    weights = 2 * 3 * m.moe_intermediate * m.hidden * min(slots, experts)
    forward, both = mode == "forward", mode == "forward+backward"
    activations = 2 * tokens * m.hidden
    part = "" if experts == m.experts else f", {experts} of {m.experts} experts"
    peers = {
        "eager": huggingface("eager", m),
        "grouped_mm experts": huggingface("grouped_mm", m),
        "compiled grouped_mm experts": huggingface("grouped_mm", m, compile=True),
    }
    if pack:
        # all of these pack the weights
        peers["vLLM"] = vllm.cpu_fused_moe()
        peers["SGLang"] = vllm.fused_experts_cpu()
        peers["zentorch"] = zentorch.zentorch_fused_moe()
        peers["kt-kernel"] = kt.moe_experts()
    return Case(
        op="moe_experts",
        name=f"{m.name}{part}, {'packed, ' if pack else ''}{tokens} tokens",
        dtype="bfloat16",
        mode=mode,
        prepare=packed if pack else None,
        oracle=tilefuse.moe_experts if pack else None,
        inputs=inputs_of(tokens, experts, m.hidden, m.moe_intermediate, m.top_k),
        oracle_inputs=inputs_of(128, 4, 256, 128, 2),
        run=tilefuse.moe_experts,
        naive=loop,
        peers=peers,
        grads=(0, 1, 2, 3),
        bytes=2 * activations + weights if forward else 3 * activations + 2 * weights,
        flops=(2 if forward else 6 if both else 4) * slots * 3 * m.moe_intermediate * m.hidden,
        reads=forward and tokens <= 16,
        **options,
    )


def cases() -> Iterator[Case]:
    m = QWEN3_30B_A3B
    for tokens in (1, 16, 512):
        # the library peers pack, so does ours; then the checkpoint's weights
        yield case(m, tokens, m.experts, pack=True, suite="quick" if tokens <= 16 else "full", devices=("cpu",))
        yield case(m, tokens, m.experts, suite="quick" if tokens == 512 else "full")
    # as many experts as a token takes
    for tokens in (1, 16, 128):
        yield case(DEEPSEEK_V3, tokens, DEEPSEEK_V3.top_k, pack=True, devices=("cpu",))
        yield case(DEEPSEEK_V3, tokens, DEEPSEEK_V3.top_k)
    yield case(m, 128, 16, "backward")
    yield case(m, 32768, m.experts, devices=("cuda",))
    yield case(m, 32768, m.experts, "backward", devices=("cuda",))
    yield case(m, 32768, m.experts, "forward+backward", devices=("cuda",))
