"""Patched models under torch.compile, gradient checkpointing and accelerate's hooks, and models that no one listed."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

from tilefuse.testing import assert_bit_equal

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

import transformers

from tilefuse.integrations.transformers import Left, Swap, patch, swap, unpatch

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


@pytest.fixture(autouse=True)
def _auto_backend():
    import tilefuse

    tilefuse.backend("auto")


def tokens(seed=0, batch=2, length=18):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def gradients(model, ids, **more):
    model.zero_grad()
    model(ids, labels=ids, **more).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        "gpt_oss",
        "mistral",
        "deepseek_v2",
    ],
)
def test_compile_in_one_graph(tiny, name):
    model = tiny(name)
    ids = tokens()
    positions = torch.cat([torch.arange(n) for n in (7, 11)])[None].expand(2, -1)
    packed = {} if name == "gpt_oss" else {"position_ids": positions}
    expected = model(ids, use_cache=False, **packed).logits
    expected_gradients = gradients(model, ids, use_cache=False, **packed)
    patch(model)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    out = compiled(ids, labels=ids, use_cache=False, **packed)
    close(out.logits, expected)
    model.zero_grad()
    out.loss.backward()
    for path, parameter in model.named_parameters():
        close(parameter.grad, expected_gradients[path])
    torch._dynamo.reset()
    # no dense mask, and the rotary embedding of the copied forward rather than the original one
    assert not any("scaled_dot_product" in target for target in seen)
    counts = Counter(seen)
    if name != "gpt_oss":
        assert sum("autograd_function_apply" in target or "tilefuse" in target for target in counts) >= 1


def test_compiled_decoding_with_a_static_cache(tiny):
    model, patched = tiny("llama"), tiny("llama")
    patch(patched)
    ids = tokens()
    results = []
    for each in (model, patched):
        torch._dynamo.reset()
        cache = transformers.StaticCache(config=each.config, max_cache_len=32)
        with torch.no_grad():
            each(ids, past_key_values=cache)
            step = torch.compile(each, backend="eager", fullgraph=True)
            results.append(step(tokens(1, length=1), past_key_values=cache).logits)
    torch._dynamo.reset()
    close(*results)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_gradient_checkpointing(tiny, name, reentrant):
    model = tiny(name).train()
    patch(model)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = gradients(model, ids, attention_mask=mask, use_cache=False)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    out = gradients(model, ids, attention_mask=mask, use_cache=False)
    assert set(out) == set(expected)
    for path, gradient in out.items():
        assert_bit_equal(gradient, expected[path], name=path)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("order", ["hooks first", "patch first"])
def test_offloading_hooks(tiny, name, order):
    """Weights are on the meta device between the calls of the module that owns them."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = tiny(name)
    ids = tokens()
    expected = model(ids).logits.detach()
    if order == "patch first":
        patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    patch(model)
    with torch.no_grad():
        close(model(ids).logits, expected)
    unpatch(model)
    with torch.no_grad():
        assert_bit_equal(model(ids).logits, expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        assert_bit_equal(model(ids).logits, expected)


def test_from_pretrained_with_a_device_map(tiny, tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "stock")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    configs = [(tmp_path / which / "config.json").read_text() for which in ("stock", "patched")]
    assert configs[0] == configs[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "patched", device_map="cpu").eval()
    ids = tokens()
    expected = loaded(ids).logits
    report = patch(loaded)
    assert len(report.changed) == 6
    close(loaded(ids).logits, expected)


def test_hooks_of_the_user_still_run(tiny):
    """A hook on a norm must see its input, so that norm is not fused away."""
    model, patched = tiny("qwen3"), tiny("qwen3")
    patch(patched)
    seen = []
    for each in (model, patched):
        each.model.layers[0].self_attn.q_norm.register_forward_hook(lambda m, args, out: seen.append(out))
        each(tokens())
    assert len(seen) == 2
    close(*seen)


def test_autocast(tiny):
    model, patched = tiny("qwen3_moe"), tiny("qwen3_moe")
    patch(patched)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = (each(ids, labels=ids).loss for each in (model, patched))
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_triton_kernels(tiny, name, triton_backend):
    """What a GPU runs, in the interpreter where there is none: a training step and decoding."""
    import tilefuse

    model, patched = tiny(name), tiny(name)
    patch(patched)
    ids = tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    results = []
    for each, backend in ((model, "auto"), (patched, "triton")):
        with tilefuse.backend(backend):
            step = gradients(each, ids, attention_mask=mask, use_cache=False)
            results.append((step, each.generate(ids, attention_mask=mask, **settings)))
    for path, gradient in results[0][0].items():
        close(results[1][0][path], gradient)
    assert_bit_equal(results[1][1], results[0][1])


def others():
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    return {
        "Bert": lambda t: t.BertModel(t.BertConfig(**SMALL)),
        "GPT2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97)),
        "T5": lambda t: t.T5EncoderModel(
            t.T5Config(d_model=64, d_ff=64, d_kv=16, num_layers=2, num_heads=4, vocab_size=97)
        ),
        "Qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(num_key_value_heads=2, **SMALL, **sliding)),
        "Phi3": lambda t: t.Phi3ForCausalLM(
            t.Phi3Config(num_key_value_heads=2, partial_rotary_factor=0.5, pad_token_id=0, **SMALL)
        ),
        "Glm": lambda t: t.GlmForCausalLM(t.GlmConfig(num_key_value_heads=2, head_dim=16, pad_token_id=0, **SMALL)),
        "Gemma2": lambda t: t.Gemma2ForCausalLM(
            t.Gemma2Config(num_key_value_heads=2, head_dim=16, sliding_window=7, query_pre_attn_scalar=16, **SMALL)
        ),
        "Olmoe": lambda t: t.OlmoeForCausalLM(
            t.OlmoeConfig(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0, **SMALL)
        ),
        "Llama4": lambda t: t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=2,
                attention_chunk_size=8,
                intermediate_size_mlp=64,
                pad_token_id=0,
                **SMALL,
            )
        ),
        "Bart": lambda t: t.BartModel(
            t.BartConfig(
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                vocab_size=97,
            )
        ),
        "Mamba": lambda t: t.MambaForCausalLM(t.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=97)),
    }


@pytest.mark.parametrize("name", others())
def test_models_that_no_one_listed(name):
    torch.manual_seed(0)
    model = others()[name](transformers).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0

    def run():
        with torch.no_grad():
            return [
                next(value for value in model(ids, **more).values() if isinstance(value, torch.Tensor))
                for more in ({}, {"attention_mask": mask})
            ]

    expected = run()
    report = patch(model)
    for a, b in zip(run(), expected):
        close(a, b)
    assert str(report).startswith("tilefuse: ")
    assert ("position bias" in str(report)) == (name == "T5")
    assert ("another form" in str(report)) == (name in ("Glm", "Llama4"))
    assert bool(report.changed) == (name not in ("T5", "Mamba"))
    unpatch(model)
    for a, b in zip(run(), expected):
        assert_bit_equal(a, b)


def test_a_plain_module():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    report = patch(model)
    assert len(report) == 0 and "no module" in str(report)
    unpatch(unpatch(model))


def test_parts_decide_in_order_and_a_failure_takes_everything_back(tiny):
    model = tiny("llama")
    forward = model.model.layers[0].mlp.forward

    def zero(self, x):
        return x * 0

    def first(module, config):
        return Swap(zero, "nothing", "half of it") if type(module).__name__ == "LlamaMLP" else None

    def second(module, config):
        assert config is model.config
        return Left("not needed") if type(module).__name__ in ("LlamaMLP", "LlamaRMSNorm") else None

    state = swap.apply(model, [first, second])
    mlp = model.model.layers[1].mlp
    assert str(state.report["model.layers.1.mlp"]) == "nothing; left: half of it"
    assert state.report.left["model.norm"] == "not needed"
    assert not mlp(torch.ones(1, 64)).any()
    swap.undo(model)

    def broken(module, config):
        if type(module).__name__ == "LlamaRMSNorm":
            raise RuntimeError("a part failed")
        return first(module, config)

    with pytest.raises(RuntimeError, match="a part failed"):
        swap.apply(model, [broken])
    assert model.model.layers[0].mlp.forward == forward and swap.STATE not in model.__dict__


def test_transformers_is_imported_only_by_its_integration():
    code = "import sys, tilefuse, tilefuse.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"
