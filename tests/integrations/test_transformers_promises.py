"""What ``patch`` promises besides the numbers of a forward: where it works, what it leaves alone, what lasts."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from tilefuse.testing import assert_bit_equal

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

import transformers
from transformers.activations import ACT2FN

from tilefuse.integrations.transformers import experts, patch, rebuild, register, rope, unpatch, verified
from tilefuse.testing import sweep


@pytest.fixture(autouse=True)
def _auto_backend():
    import tilefuse

    tilefuse.backend("auto")


def tokens(seed=0, batch=2, length=18):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, *ids, **more):
    with torch.no_grad():
        return model(*ids, **more).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def attention_calls(report):
    """What all attention calls ran on, over all modules."""
    return {what for counts in report.calls().values() for what in counts}


def test_configs_are_not_touched(tiny):
    model = tiny("mixtral", attn_implementation="eager")
    before = model.config.to_dict()
    owners = [module.__dict__.get("config") for module in model.modules()]
    patch(model)
    assert all(module.__dict__.get("config") is config for module, config in zip(model.modules(), owners))
    assert model.config.to_dict() == before and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_a_pickled_model_comes_back_patched(tiny, name):
    model = tiny(name)
    ids = tokens()
    stock = logits(model, ids)
    report = patch(model)
    patched = logits(model, ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert_bit_equal(logits(twin, ids), patched)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert not logits(twin, ids).any() and logits(model, ids).any()
        twin.lm_head.load_state_dict(model.lm_head.state_dict())
        again = patch(twin)
        assert dict(again) == dict(report)
        assert attention_calls(again) == {"window_attention"}
        unpatch(twin)
        assert_bit_equal(logits(twin, ids), stock)


def replica_of(model):
    """As ``nn.DataParallel`` makes them, but on the same device and with weights that are twice as large."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = child and copies[child]
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else 2 * parameter.detach())
    return copies[model]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_replicas_compute_with_their_own_weights(tiny, name):
    model = tiny(name)
    ids = tokens()
    expected, stock = logits(replica_of(model), ids), logits(model, ids)
    assert (expected - stock).abs().max() > 1e-3
    patch(model)
    close(logits(replica_of(model), ids), expected)
    close(logits(model, ids), stock)
    unpatch(model)
    assert not any("_replicate_for_data_parallel" in module.__dict__ for module in model.modules())


def test_another_process_loads_it_patched(tiny, tmp_path):
    model = tiny("qwen3")
    patch(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
        "from tilefuse.integrations.transformers import patch; "
        "print(len(patch(m).changed), 'forward' in m.model.layers[0].self_attn.__dict__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.split() == ["2", "True"]


def test_a_copy_that_cannot_be_made_again_is_stock(tiny, monkeypatch):
    model = tiny("llama")
    ids = tokens()
    stock = logits(model, ids)
    patch(model)
    data = pickle.dumps(model)
    monkeypatch.setattr(rebuild, "_built", {})
    monkeypatch.setattr(rebuild, "copy", lambda *arguments: None)
    with pytest.warns(UserWarning, match="is loaded as Hugging Face's own"):
        twin = pickle.loads(data)
    assert_bit_equal(logits(twin, ids), stock)


@pytest.mark.parametrize("where", ["meta", "default dtype", "default device"])
def test_where_patch_may_be_called(tiny, where, monkeypatch):
    """A probe that fails here must not stand for the rest of the process either."""
    monkeypatch.setattr(rope, "_found", {})
    monkeypatch.setattr(rebuild, "_built", {})
    models = [tiny(name) for name in ("qwen3", "deepseek_v2", "gpt_oss")]
    expected = [logits(model, tokens()) for model in models]
    try:
        if where == "default dtype":
            torch.set_default_dtype(torch.bfloat16)
        elif where == "default device":
            torch.set_default_device("meta")
        with torch.device("meta" if where == "meta" else "cpu"):
            reports = [patch(model) for model in models]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
        torch.set_default_device(None)
    for model, report, stock in zip(models, reports, expected):
        assert "rope" in report["model.layers.0.self_attn"].changed
        close(logits(model, tokens()), stock)
        assert attention_calls(report) == {"window_attention"}


def test_one_graph_for_all_lengths(tiny):
    model = tiny("llama")
    expected = [logits(model, tokens(length=length), use_cache=False) for length in range(18, 30)]
    patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for length, stock in zip(range(18, 30), expected):
        close(logits(compiled, tokens(length=length), use_cache=False), stock)
    torch._dynamo.reset()
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert not any("scaled_dot_product" in name for name in called)


def test_packed_sequences_in_one_graph(tiny):
    model = tiny("mistral")
    cases = []
    for lengths in ((7, 11), (9, 12), (3, 8, 13)):
        ids = tokens(length=sum(lengths))
        positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
        cases.append((ids, positions, logits(model, ids, position_ids=positions, use_cache=False)))
    patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for ids, positions, stock in cases:
        close(logits(compiled, ids, position_ids=positions, use_cache=False), stock)
    torch._dynamo.reset()
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_length(tiny, strict):
    model = tiny("mistral")
    ids = tokens()
    patch(model)
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(
        model,
        (),
        {"input_ids": ids, "use_cache": False},
        strict=strict,
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    assert any("window_attention" in name for name in called)
    assert not any("scaled_dot_product" in name for name in called)
    unpatch(model)
    for other in (18, 33):
        ids = tokens(1, length=other)
        close(program.module()(input_ids=ids, use_cache=False).logits, logits(model, ids, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3"])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_attention_weights_of_an_eager_model(tiny, name, how):
    model = tiny(name, attn_implementation="eager")
    more = {"output_attentions": True} if how == "argument" else {}
    model.config.output_attentions = how == "config"
    with torch.no_grad():
        expected = model(tokens(), **more).attentions
        report = patch(model)
        found = model(tokens(), **more).attentions
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected):
        close(a, b)
    assert attention_calls(report) == {"eager: attention weights are asked for"}


def test_implementations_that_are_chosen_after_patch(tiny, monkeypatch):
    model = tiny("mixtral")
    ids = tokens()
    stock = logits(model, ids)
    report = patch(model)
    model.set_experts_implementation("eager")
    with monkeypatch.context() as context:
        context.setattr(experts, "moe_experts", pytest.fail)
        close(logits(model, ids), stock)
    model.set_attn_implementation("eager")
    close(logits(model, ids), stock)
    assert attention_calls(report) == {"window_attention"}


def experts_of(name):
    """The expert layer of a tiny model and inputs that reach any clamp, with gradients."""
    row = next(row for row in sweep.architectures() if row.name.startswith(name))
    module = next(m for m in sweep.tiny(row).modules() if hasattr(m, "_apply_gate"))
    generator = torch.Generator().manual_seed(0)
    hidden = (module.gate_up_proj.shape[1 if module.is_transposed else 2]) if module.has_gate else 0
    x = 40 * torch.randn(12, hidden, generator=generator)
    weights = torch.rand(12, 2, generator=generator)
    ids = torch.rand(12, module.num_experts, generator=generator).topk(2).indices
    return module, (x.requires_grad_(), ids, weights.requires_grad_())


def forward_and_gradients(module, inputs):
    out = module(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wanted = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, dout)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mixtral", {}),
        ("mixtral", {"act_fn": ACT2FN["gelu"]}),
        ("mixtral", {"act_fn": ACT2FN["gelu_pytorch_tanh"]}),
        ("mixtral", {"act_fn": torch.nn.GELU()}),
        ("lfm2_moe", {}),
        ("beam", {}),
        ("deepseek_v4", {"limit": 3.0}),
        ("deepseek_v4", {}),
        ("glm5_next", {"swiglu_limit": 3.0}),
        ("hy_v4", {"swiglu_limit": 3.0}),
        ("minimax_m3_vl_text", {"swiglu_limit": 3.0, "swiglu_alpha": 1.3}),
    ],
)
def test_gates_of_experts_are_one_kernel(name, change, monkeypatch):
    module, inputs = experts_of(name)
    for attribute, value in change.items():
        delattr(module, attribute)
        setattr(module, attribute, value)
    expected = forward_and_gradients(module, inputs)
    assert patch(module)[""].changed == "experts"
    monkeypatch.setattr(experts, "grouped_matmul", pytest.fail)
    for ours, stock in zip(forward_and_gradients(module, inputs), expected):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5 * stock.abs().max().item())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek_v4", {"limit": 0.0}),
        ("deepseek_v4", {"act_fn": ACT2FN["gelu"], "limit": 3.0}),
        ("mixtral", {"act_fn": ACT2FN["quick_gelu"]}),
        ("mixtral", {"act_fn": torch.nn.GELU("tanh")}),
    ],
)
def test_gates_that_no_kernel_has(name, change, monkeypatch):
    module, inputs = experts_of(name)
    for attribute, value in change.items():
        setattr(module, attribute, value)
    expected = forward_and_gradients(module, inputs)
    assert patch(module)[""].changed == "experts (activation as in the model)"
    monkeypatch.setattr(experts, "moe_experts", pytest.fail)
    for ours, stock in zip(forward_and_gradients(module, inputs), expected):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5 * stock.abs().max().item())


def test_hooks_on_the_activation_of_experts_run():
    module, inputs = experts_of("mixtral")
    patch(module)
    before = module(*inputs)
    module.act_fn.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    close(module(*inputs) / before, torch.full_like(before, 2.0))


def test_a_keyword_that_no_one_knows_goes_to_stock_whole(tiny):
    model = tiny("llama")
    report = patch(model)
    attention = model.model.layers[0].self_attn
    hidden, tables = torch.randn(1, 5, 64), (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))
    expected = attention(hidden, position_embeddings=tables, attention_mask=None)[0]
    bias = torch.randn(1, 4, 5, 5)
    biased = attention(hidden, position_embeddings=tables, attention_mask=None, position_bias=bias)[0]
    assert (biased - expected).abs().max() > 1e-3
    assert report.calls()["model.layers.0.self_attn"] == {
        "window_attention": 1,
        "sdpa: it has the argument position_bias": 1,
    }
    unpatch(model)
    assert patch(model).calls() == {}


def test_generate_batch(tiny):
    model = tiny("llama")
    prompts = [ids.tolist() for ids in (tokens(0, 1, 5)[0], tokens(1, 1, 9)[0])]
    settings = transformers.GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0, num_blocks=8, max_batch_tokens=64
    )
    results = []
    for _ in range(2):
        out = model.generate_batch(prompts, generation_config=settings)
        results.append([request.generated_tokens for request in out.values()])
        patch(model)
    assert results[0] == results[1] and all(len(found) == 4 for found in results[0])


def test_types_that_are_not_verified(tiny, monkeypatch):
    monkeypatch.setattr(verified, "record", lambda: {"transformers": ["5.23"], "types": {}})
    model = tiny("qwen3_moe")
    ids = tokens()
    stock = logits(model, ids)
    report = patch(model)
    assert report["model.layers.0.self_attn"].changed == "rope"
    assert report["model.layers.0.self_attn"].left == "attention: qwen3_moe is not verified"
    assert {"experts", "router"} <= set(report.changed.values())
    close(logits(model, ids), stock)
    assert not report.calls()
    unpatch(model)
    report = patch(model, unverified=True)
    assert "attention" in report["model.layers.0.self_attn"].changed and not report.left
    close(logits(model, ids), stock)
    unpatch(model)
    monkeypatch.setattr(verified, "record", lambda: {"transformers": ["4.0"], "types": {"qwen3_moe": {}}})
    assert "verified with transformers 4.0, this is 5." in str(patch(model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_whole_model_has_to_be_verified(tiny, wrapped):
    """What surrounds a model of a verified type may hand it other masks, whatever is wrapped around that."""
    model = torch.nn.Module()
    model.config = transformers.LlavaConfig()
    model.config.model_type = "of_someone"
    model.language_model = tiny("llama")
    report = patch(torch.nn.ModuleList([tiny("llama"), model]) if wrapped else model)
    left = {path: why for path, why in report.left.items() if "language_model" in path}
    assert len(left) == 2 and set(left.values()) == {"attention: of_someone is not verified"}
    assert len(report.left) == 2


def test_a_difference_is_found_before_anyone_uses_it(tiny, monkeypatch):
    from tilefuse.integrations.transformers import attention

    monkeypatch.setattr(verified, "record", lambda: {"transformers": ["5.23"], "types": {}})
    model = tiny("llama").train()
    ours = attention.window_attention
    monkeypatch.setattr(attention, "window_attention", lambda *a, window, **more: ours(*a, window=(3, 0), **more))
    with pytest.raises(RuntimeError, match="LlamaForCausalLM patched differs from Hugging Face's by"):
        patch(model, unverified=True)
    assert "forward" not in model.model.layers[0].self_attn.__dict__ and model.training
    with pytest.raises(RuntimeError, match="could not be compared"):
        patch(tiny("llama").to("meta"), unverified=True)


def test_what_is_wrapped_is_compared(tiny, monkeypatch):
    from tilefuse.integrations.transformers import attention

    monkeypatch.setattr(verified, "record", lambda: {"transformers": ["5.23"], "types": {"mistral": {}}})
    ids = tokens()
    wrapped = torch.nn.ModuleDict({"one": tiny("llama"), "two": tiny("mistral")})
    stock = [logits(model, ids) for model in wrapped.values()]
    report = patch(wrapped, unverified=True)
    assert all("attention" in report[f"{name}.model.layers.0.self_attn"].changed for name in wrapped)
    for model, expected in zip(wrapped.values(), stock):
        close(logits(model, ids), expected)
    unpatch(wrapped)
    ours = attention.window_attention
    monkeypatch.setattr(attention, "window_attention", lambda *a, window, **more: ours(*a, window=(3, 0), **more))
    with pytest.raises(RuntimeError, match="LlamaForCausalLM patched differs from Hugging Face's by"):
        patch(wrapped, unverified=True)
    assert not any("forward" in module.__dict__ for module in wrapped.modules())


def test_second_derivatives_raise_and_say_what_to_do(tiny):
    model = tiny("llama")
    patch(model)
    loss = model(tokens(), labels=tokens()).loss
    first = torch.autograd.grad(loss, model.model.embed_tokens.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"a second derivative; .*after unpatch\(model\)"):
        first.square().sum().backward()


def test_names_are_refused_to_types_that_are_not_verified(config_of, monkeypatch):
    register()
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation="tilefuse").eval()
    logits(model, tokens())
    monkeypatch.setattr(verified, "record", lambda: {"transformers": ["5.23"], "types": {}})
    with pytest.raises(ValueError, match="verified model types only: llama is not verified"):
        model(tokens())


def test_names_are_refused_to_code_that_asks_for_one(monkeypatch):
    """Sparse attention under another name than sdpa and eager hands over ids, and its mask stays that of all keys."""
    register()
    types = {"deepseek_v32": {}, "glm_moe_dsa": {}, "llama": {}}
    monkeypatch.setattr(verified, "record", lambda: {"transformers": ["5.23"], "types": types})
    config = transformers.DeepseekV32Config(
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=97,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        index_topk=4,
        index_n_heads=8,
        index_head_dim=16,
        n_group=1,
        topk_group=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="tilefuse")
    with pytest.raises(ValueError, match="asks for other implementations by name"):
        model(tokens())


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_names_in_one_graph(config_of, name):
    register()
    config = config_of(name)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="tilefuse").eval()
    ids = tokens()
    torch._dynamo.reset()
    out = logits(torch.compile(model, backend="eager", fullgraph=True), ids, use_cache=False)
    torch._dynamo.reset()
    model.set_attn_implementation("eager")
    close(out, logits(model, ids, use_cache=False))


def test_a_norm_that_someone_wraps_is_called(tiny):
    """Adapters put a module around another one, whose weight they show."""

    class Wrapper(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return 2 * self.norm(x)

    model = tiny("qwen3")
    patch(model)
    attention = model.model.layers[0].self_attn
    attention.q_norm = Wrapper(attention.q_norm)
    out = logits(model, tokens())
    unpatch(model)
    close(out, logits(model, tokens()))


def test_static_caches_decode_in_one_graph(tiny):
    """``generate`` makes the mask of each step itself, and a graph must not depend on the number of keys."""
    model, stock = tiny("llama"), tiny("llama")
    report = patch(model)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"cache_implementation": "static", "disable_compile": True}
    ids = tokens()
    expected = stock.generate(ids, **settings)
    assert_bit_equal(model.generate(ids, **settings), expected)
    assert report.calls()["model.layers.0.self_attn"] == {"window_attention": 1, "paged_attention": 4}
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    last = logits(model, ids, past_key_values=cache)
    for _ in range(4):
        ids = torch.cat((ids, last[:, -1:].argmax(-1)), 1)
        inputs = model.prepare_inputs_for_generation(
            ids,
            past_key_values=cache,
            attention_mask=torch.ones_like(ids),
            next_sequence_length=1,
            position_ids=torch.full((2, 1), ids.shape[1] - 1),
        )
        last = logits(step, **inputs)
    torch._dynamo.reset()
    assert_bit_equal(ids, expected[:, : ids.shape[1]])
    assert len(graphs) == 1 and any("paged_attention" in name for name in graphs[0])


def test_rotary_embedding_outside_of_the_registry():
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, alibi=False
    )
    model = transformers.FalconForCausalLM(config).eval()
    stock = logits(model, tokens())
    report = patch(model)
    assert report["transformer.h.1.self_attention"].changed == "rope"
    assert "outside of Hugging Face's registry" in report["transformer.h.1.self_attention"].left
    close(logits(model, tokens()), stock)
