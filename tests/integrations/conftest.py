"""Whole models, patched and stock, by the rule of docs/numerics.md, and tiny models of each kind of language model."""

import contextlib
import copy
import os

import pytest
import torch

from tilefuse.testing import assert_bit_equal, assert_close

# the test machines have no network, and a look-up would wait for it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
LAYERS = ["sliding_attention", "full_attention"]
# prefix of the classes, name of the config, what differs from SIZES
MODELS = {
    "llama": ("Llama", "LlamaConfig", {}),
    "mistral": ("Mistral", "MistralConfig", {"sliding_window": 7}),
    "qwen3": ("Qwen3", "Qwen3Config", {}),
    "gemma3": (
        "Gemma3",
        "Gemma3TextConfig",
        {"sliding_window": 7, "layer_types": LAYERS, "query_pre_attn_scalar": 16},
    ),
    "gpt_oss": (
        "GptOss",
        "GptOssConfig",
        {"sliding_window": 7, "layer_types": LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("Mixtral", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "deepseek_v2": ("DeepseekV2", "DeepseekV2Config", LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3Config", LATENT),
}


def tiny_config(name, **changes):
    import transformers

    _, config, differences = MODELS[name]
    sizes = {key: value for key, value in (SIZES | differences | changes).items() if value is not None}
    return getattr(transformers, config)(**sizes)


def tiny_model(name, seed=0, dtype=torch.float32, **changes):
    import transformers

    transformers.logging.set_verbosity_error()
    config = tiny_config(name, **changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # initial values hide mistakes: sinks, biases and the weights of norms are all alike
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "norm" not in path and "embed" not in path:
                parameter.mul_(4)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.normal_(std=0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny():
    return tiny_model


@pytest.fixture(scope="session")
def config_of():
    return tiny_config


@contextlib.contextmanager
def _exact():
    """Stock models cast softmax to float32 whatever the model's dtype is: here it stays float64."""
    softmax = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda x, dim=None, dtype=None: softmax(x, dim=dim)
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def _gradients(model):
    """By layer; a layer's bias is one more column of its weight.

    The gradient of a key projection's bias is exactly zero, so that errors relative to its own size mean nothing.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found.setdefault(name.rpartition(".")[0], []).append(grad if grad.dim() > 1 else grad[:, None])
    return {
        f"{layer}.grad": torch.cat(grads, 1) if len({g.shape[0] for g in grads}) == 1 else grads[0]
        for layer, grads in found.items()
    }


def results(model, run, backward=True):
    """Outputs of ``run(model)`` by name and, from the loss in them, the gradients of all parameters."""
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        outputs = dict(run(model))
        if backward:
            outputs["loss"].backward()
    return {name: x.detach().clone() for name, x in (outputs | (_gradients(model) if backward else {})).items()}


@pytest.fixture
def against_stock():
    """Compares a patched copy of a model with a stock one, the oracle being stock in float64; returns the report."""
    from tilefuse.integrations.transformers import patch, unpatch

    def compare(model, run, backward=True):
        with _exact():
            oracle = results(copy.deepcopy(model).double(), run, backward)
        naive = results(copy.deepcopy(model), run, backward)
        patched = copy.deepcopy(model)
        report = patch(patched)
        got = results(patched, run, backward)
        assert got.keys() == naive.keys() == oracle.keys()
        for name, x in got.items():
            # gradients of weights: a row is one error times a vector, whose ratio to another says little
            assert_close(x, oracle[name].double(), naive[name], rows=not name.endswith(".grad"), name=name)
        unpatch(patched)
        for name, x in results(patched, run, backward).items():
            assert_bit_equal(x, naive[name], name=f"{name} after unpatch")
        return report

    return compare
