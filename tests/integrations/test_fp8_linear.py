"""FP8 modules of Hugging Face, and a DeepSeek-V3 checkpoint with ``weight_scale_inv``.

Hugging Face has no kernel for them on a CPU. The naive result here is its own module code over ``Kernel``, the same
entry points in plain PyTorch; the oracle is written out in float64.
"""

import copy
import json

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal, assert_close

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("tilefuse.integrations.transformers")
safetensors = pytest.importorskip("safetensors.torch")
stock = pytest.importorskip("transformers.integrations.finegrained_fp8")
quantizer = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")

DTYPES = [torch.float32, torch.bfloat16]
CODES = torch.float8_e4m3fn
UE8M0 = torch.float8_e8m0fnu


def expand(scale, n, k):
    return scale.double().repeat_interleave(128, -2)[..., :n, :].repeat_interleave(128, -1)[..., :k]


def dequantised(weight, scale):
    return weight.double() * expand(scale, *weight.shape[-2:])


def quantised(x, pow2=False):
    """x by the rule of docs/fp8.md, back in float64; written out once more so that it shares no code with tilefuse."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = torch.where(amax == 0, torch.ones_like(amax), amax.clamp(min=1e-12) / 448)
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
    codes = (blocks / scale).clamp(-448, 448).to(CODES)
    return (codes.double() * scale.double()).flatten(-2)[..., : x.shape[-1]]


class Kernel:
    """``kernels-community/finegrained-fp8`` in plain PyTorch, products in float32."""

    @staticmethod
    def matmul(x, weight, scale, block_size, out_dtype, activation_scale=None):
        return (quantised(x, scale.dtype == UE8M0).float() @ dequantised(weight, scale).float().t()).to(out_dtype)

    @staticmethod
    def grouped_matmul(x, weight, scale, offsets, tokens_per_expert, block_size):
        out = x.new_zeros(x.shape[0], weight.shape[1])
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            out[start:end] = Kernel.matmul(x[start:end], weight[expert], scale[expert], block_size, x.dtype)
            start = end
        return out


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(stock, "load_finegrained_fp8_kernel", lambda: Kernel)


def fp8_linear(n, k, dtype, bias=False, scale_fmt="float", **options):
    module = stock.FP8Linear(k, n, **{"block_size": (128, 128), "has_bias": bias, "scale_fmt": scale_fmt} | options)
    codes, scale = tilefuse.fp8_quantize(
        torch.randn(n, k), block=(128, 128), scale_format="pow2" if scale_fmt == "ue8m0" else "fp32"
    )
    module.weight.data = codes
    module.weight_scale_inv.data = scale.to(UE8M0) if scale_fmt == "ue8m0" else scale
    if bias:
        module.bias.data = torch.randn(n).to(dtype)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "bias", "scale_fmt"),
    [(256, 384, False, "float"), (200, 130, True, "float"), (64, 96, True, "ue8m0"), (1, 1, False, "float")],
)
def test_linear(n, k, bias, scale_fmt, dtype, kernel):
    module = fp8_linear(n, k, dtype, bias, scale_fmt)
    x = torch.randn(3, 5, k).to(dtype)
    weight = dequantised(module.weight, module.weight_scale_inv).detach()
    exact = quantised(x, scale_fmt == "ue8m0") @ weight.t()
    if bias:
        exact = exact + module.bias.detach().double()
    with torch.no_grad():
        naive = module(x)
        report = integration.patch(module)
        got = module(x)
    assert report[""].changed == "linear: fp8_quantize + fp8_matmul"
    assert got.dtype == dtype
    assert_close(got, exact, naive, rows=n > 1)
    # the error of quantising activations, apart: at most 2**-4 of an element, or half a step of a subnormal code
    distance = (quantised(x, scale_fmt == "ue8m0") - x.double()).abs()
    amax = x.double().abs().amax()
    assert (distance <= x.double().abs() * 2.0**-4 + amax / 448 * 2.0**-9).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gradient(dtype, kernel):
    """For the input only, through the dequantised weight: what adapters need. Weights, scales and bias stay frozen."""
    module = fp8_linear(200, 300, dtype, bias=True)
    x = torch.randn(4, 7, 300).to(dtype).requires_grad_()
    upstream = torch.randn(4, 7, 200).to(dtype)
    exact = upstream.double() @ dequantised(module.weight, module.weight_scale_inv).detach()
    (naive,) = torch.autograd.grad(module(x), x, upstream)
    integration.patch(module)
    out = module(x)
    assert_bit_equal(out, module(x.detach()))
    (got,) = torch.autograd.grad(out, x, upstream)
    assert_close(got, exact, naive)
    assert module.weight.grad is module.weight_scale_inv.grad is module.bias.grad is None


def test_linear_without_rows_or_after_a_move():
    module = fp8_linear(64, 128, torch.float32)
    integration.patch(module)
    assert module(torch.randn(2, 0, 128)).shape == (2, 0, 64)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected = module(x)
    # model.to(bfloat16) takes the scales along
    module.weight_scale_inv.data = module.weight_scale_inv.data.bfloat16().float()
    expected_after = module(x)
    module.weight_scale_inv.data = module.weight_scale_inv.data.bfloat16()
    assert_bit_equal(module(x), expected_after)
    assert not torch.equal(expected, expected_after)
    # a weight that was dequantised in place is an ordinary linear layer, as it is for the stock module
    module.weight.data = torch.randn(64, 128, dtype=torch.bfloat16)
    assert_bit_equal(module(x), torch.nn.functional.linear(x, module.weight))


def test_linear_compiles():
    module = fp8_linear(64, 128, torch.float32)
    integration.patch(module)
    x = torch.randn(5, 128)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_bit_equal(compiled(x), module(x))
    x.requires_grad_()
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (module, compiled)]
    assert_bit_equal(*grads)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"block_size": None}, "one scale for the whole weight"),
        ({"block_size": (64, 128)}, "its blocks are 64 x 128"),
        ({"activation_scheme": "static"}, "its activation scales are static"),
    ],
)
def test_other_schemes_are_left(options, why):
    module = stock.FP8Linear(128, 128, **{"block_size": (128, 128)} | options)
    report = integration.patch(module)
    assert why in report.left[""]
    assert "forward" not in vars(module)


def test_grouped_linear_is_left():
    report = integration.patch(stock.FP8GroupedLinear(128, 256, 2, block_size=(128, 128)))
    assert "block-diagonal" in report.left[""]


def moe_config(**changes):
    options = {"vocab_size": 64, "hidden_size": 160, "intermediate_size": 320, "moe_intermediate_size": 128}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8}
    options |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    options |= {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
    options |= {"v_head_dim": 16, "max_position_embeddings": 128, "eos_token_id": None}
    return transformers.DeepseekV3Config(**options | changes)


def fp8_experts(**changes):
    config = moe_config(**changes)
    config._experts_implementation = "eager"
    fp8 = transformers.FineGrainedFP8Config()
    model, model.mlp = torch.nn.Module(), torch.nn.Module()
    model.mlp.experts = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Experts(config)
    model.config = config
    stock.replace_with_fp8_linear(model, [], fp8)
    experts = model.mlp.experts.to_empty(device="cpu")
    for name in ("gate_up_proj", "down_proj"):
        codes, scale = tilefuse.fp8_quantize(0.1 * torch.randn(getattr(experts, name).shape), block=(128, 128))
        getattr(experts, name).data = codes
        grid = getattr(experts, f"{name}_scale_inv")
        grid.data = scale if grid.shape == scale.shape else torch.ones(grid.shape)
    return experts


def routed(tokens, dtype, experts=8, top_k=2):
    x = torch.randn(tokens, 160).to(dtype)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    return x, ids, torch.rand(tokens, top_k) + 0.1


def exact_gate(module, gate, up):
    if module.limit is not None:
        gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    return module.act_fn(gate) * up


def exact_experts(module, x, ids, weights):
    """float64 on dequantised weights, activations not quantised: the distance to it is quantisation error."""
    gate_up = dequantised(module.gate_up_proj, module.gate_up_proj_scale_inv).detach()
    down = dequantised(module.down_proj, module.down_proj_scale_inv).detach()
    out = torch.zeros_like(x.double())
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if expert < len(gate_up):
                gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
                h = exact_gate(module, gate, up)
                out[token] += weights[token, slot].double() * (down[expert] @ h)
    return out


@pytest.mark.parametrize("change", [{}, {"limit": 0.3}, {"act_fn": transformers.activations.ACT2FN["gelu"]}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype, change, kernel):
    module = fp8_experts()
    for name, value in change.items():
        setattr(module, name, value)
    x, ids, weights = routed(40, dtype)
    # an expert-parallel sentinel: that choice belongs to another device
    ids[3, 1] = ids[7, 0] = 8
    exact = exact_experts(module, x, ids, weights)
    with torch.no_grad():
        naive = module(x, ids, weights)
        report = integration.patch(module)
        got = module(x, ids, weights)
    assert report[""].changed == "experts: moe_experts_fp8"
    # both quantise activations, which dwarfs rounding: rows are allowed what they are allowed
    assert_close(got, exact, naive)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_gradient(dtype, kernel):
    module = fp8_experts()
    x, ids, weights = routed(40, dtype)
    upstream = torch.randn(40, 160).to(dtype)

    def gradients(run, dtype):
        leaves = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        return torch.autograd.grad(run(module, leaves[0], ids, leaves[1]), leaves, upstream.to(dtype))

    def unquantised(module, x, ids, weights):
        """In float64 with gradients; the stock functions follow the same graph on quantised activations."""
        gate_up = dequantised(module.gate_up_proj, module.gate_up_proj_scale_inv).detach()
        down = dequantised(module.down_proj, module.down_proj_scale_inv).detach()
        gate, up = torch.einsum("th,tknh->tkn", x, gate_up[ids]).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        return (torch.einsum("tki,tkni->tkn", h, down[ids]) * weights[..., None]).sum(1)

    exact = gradients(unquantised, torch.float64)
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    naive = torch.autograd.grad(module(leaves[0], ids, leaves[1]), leaves, upstream)
    integration.patch(module)
    out = module(leaves[0], ids, leaves[1])
    got = torch.autograd.grad(out, leaves, upstream)
    for name, a, b, c in zip(("x", "weights"), got, exact, naive, strict=True):
        assert_close(a, b, c, rows=name == "x", name=name)


def test_gradient_of_many_experts_in_pieces(monkeypatch):
    module = fp8_experts()
    integration.patch(module)
    x, ids, weights = routed(30, torch.float32)
    x.requires_grad_()
    (whole,) = torch.autograd.grad(module(x, ids, weights).sum(), x)
    monkeypatch.setattr(integration.fp8_linear, "_DEQUANTISED_BYTES", 3 * 4 * 256 * 160)
    (pieces,) = torch.autograd.grad(module(x, ids, weights).sum(), x)
    torch.testing.assert_close(pieces, whole)


def test_experts_compile():
    module = fp8_experts()
    integration.patch(module)
    x, ids, weights = routed(20, torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_bit_equal(compiled(x, ids, weights), module(x, ids, weights))
    x.requires_grad_()
    grads = [torch.autograd.grad(f(x, ids, weights).sum(), x)[0] for f in (module, compiled)]
    assert_bit_equal(*grads)


@pytest.mark.parametrize(
    ("changes", "attribute", "why"),
    [
        ({"hidden_act": "relu"}, {}, "its activation is ReLU"),
        ({"moe_intermediate_size": 32}, {}, "its scales have the shape"),
        ({}, {"limit": 0.0}, "its gate is clamped at 0.0"),
        ({"hidden_act": "gelu"}, {"limit": 7.0}, "its gate is clamped at 7.0"),
        ({}, {"swiglu_alpha": 1.7}, "its gate is capped, or scaled by alpha"),
        ({}, {"gate_softcap": 7.0}, "its gate is capped, or scaled by alpha"),
        ({}, {"has_gate": False}, "experts without a gate"),
    ],
)
def test_other_experts_are_left(changes, attribute, why, kernel):
    module = fp8_experts(**changes)
    for name, value in attribute.items():
        setattr(module, name, value)
    report = integration.patch(module)
    assert why in report.left[""]
    assert "forward" not in vars(module)


def test_registered_experts_function(kernel):
    """``experts_implementation="tilefuse"`` without ``patch``; what the op cannot do runs as the stock loop."""
    integration.register()
    module = fp8_experts()
    inputs = routed(20, torch.float32)
    with torch.no_grad():
        module.config._experts_implementation = "tilefuse"
        got = module(*inputs)
        module.config._experts_implementation = "eager"
        integration.patch(module)
        assert_bit_equal(got, module(*inputs))
        other = fp8_experts(hidden_act="relu")
        expected = other(*inputs)
        other.config._experts_implementation = "tilefuse"
        assert_bit_equal(other(*inputs), expected)


def checkpoint(folder, dtype):
    """A DeepSeek-V3 checkpoint as it is published: one tensor per expert, ``weight`` + ``weight_scale_inv``."""
    # Hugging Face's own dequantisation takes a ragged grid for one of smaller blocks: here only whole ones, or one
    model = transformers.DeepseekV3ForCausalLM(moe_config(hidden_size=256, intermediate_size=384)).to(dtype)
    tensors = {}
    for name, x in model.state_dict().items():
        x = x.contiguous()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for expert in range(x.shape[0]):
                parts = {"down_proj": x[expert]}
                if "gate_up" in name:
                    parts = dict(zip(("gate_proj", "up_proj"), x[expert].chunk(2)))
                for part, weight in parts.items():
                    tensors[f"{name.rpartition('.')[0]}.{expert}.{part}.weight"] = weight.contiguous()
        else:
            tensors[name] = x
    stored = {}
    for name, x in tensors.items():
        if name.endswith(("_proj.weight", "_mqa.weight")):
            stored[name], stored[f"{name}_scale_inv"] = tilefuse.fp8_quantize(x, block=(128, 128))
        else:
            stored[name] = x.clone()
    safetensors.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return stored


@pytest.mark.parametrize("dtype", DTYPES)
def test_deepseek_v3_checkpoint(dtype, tmp_path, monkeypatch, kernel):
    torch.manual_seed(5)
    stored = checkpoint(tmp_path, dtype)
    # the reference: Hugging Face dequantises an FP8 checkpoint where it finds no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load, eager = transformers.AutoModelForCausalLM.from_pretrained, {"experts_implementation": "eager"}
    plain = load(tmp_path, dtype=torch.float32, **eager).double().eval()
    assert not any(p.dtype == CODES for p in plain.parameters())
    # as on a GPU: the weights stay FP8
    monkeypatch.setattr(quantizer.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model = load(tmp_path, dtype=dtype, **eager).eval()
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert_bit_equal(model.get_parameter(name), stored[name])
    assert_bit_equal(model.get_parameter(f"{name}_scale_inv"), stored[f"{name}_scale_inv"])

    ids = torch.randint(0, 64, (2, 23))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        naive = model(ids).logits
        exact = plain(ids).logits
        report = integration.patch(model)
        got = model(ids).logits
        changed = report.changed
        for layer in range(2):
            for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
                assert "fp8_matmul" in changed[f"model.layers.{layer}.self_attn.{part}"]
        assert "fp8_matmul" in changed["model.layers.0.mlp.down_proj"]
        assert "fp8_matmul" in changed["model.layers.1.mlp.shared_experts.up_proj"]
        assert "moe_experts_fp8" in changed["model.layers.1.mlp.experts"]
        assert "lm_head" not in report
        # activations are quantised by both: an error of some percent, of the same size
        assert_close(got, exact, naive, rows=False)
        for name, x in model.state_dict().items():
            assert_bit_equal(x, before[name], name=name)
        new = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
        assert new.shape == (1, 29)
        # the cached steps say what a pass over the whole sequence says
        step = model(new[:, :-1]).logits[0, 22:].argmax(-1)
        assert torch.equal(step, new[0, 23:])
        integration.unpatch(model)
        assert_bit_equal(model(ids).logits, naive)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_over_a_checkpoint(dtype, tmp_path, monkeypatch, kernel):
    """What adapters see: gradients pass through frozen FP8 layers and experts to everything before them."""
    torch.manual_seed(5)
    checkpoint(tmp_path, dtype)
    load, eager = transformers.AutoModelForCausalLM.from_pretrained, {"experts_implementation": "eager"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = load(tmp_path, dtype=torch.float32, **eager).double()
    monkeypatch.setattr(quantizer.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model = load(tmp_path, dtype=dtype, **eager).train()
    ids = torch.randint(0, 64, (2, 23))

    def gradients(model):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        names = ("embed_tokens", "layers.0.input_layernorm", "layers.1.post_attention_layernorm", "layers.1.mlp.gate")
        return {name: model.model.get_submodule(name).weight.grad for name in names}

    exact, naive = gradients(plain), gradients(model)
    integration.patch(model)
    for name, grad in gradients(model).items():
        assert_close(grad, exact[name], naive[name], rows=False, name=name)
    assert not [name for name, p in model.named_parameters() if p.dtype == CODES and p.grad is not None]


def test_dequantised_checkpoint_is_an_ordinary_model(tmp_path, monkeypatch):
    """``dequantize=True``, what Hugging Face does without a GPU: no FP8 module is there to be swapped."""
    checkpoint(tmp_path, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    other = copy.deepcopy(model)
    report = integration.patch(other)
    assert not any("fp8" in what for what in report.changed.values())
    ids = torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
