"""``patch(model, loss=True, norm=True)``: fused head and loss, norms and gated MLPs of whole models against stock."""

import copy
import importlib
import inspect
import pickle
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilefuse

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

import transformers
from transformers.activations import ACT2FN

from tilefuse.integrations.transformers import logits as lazy
from tilefuse.integrations.transformers import norm, patch, unpatch
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.memory import allocations

from .conftest import SIZES, tiny_model

# class, config, what differs from SIZES: those with a transform of the logits, or layers of another form
OTHERS = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.3}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"tie_word_embeddings": True}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
}
NAMES = ["llama", "gemma3", "mixtral", "qwen3", "deepseek_v3", *OTHERS]


@pytest.fixture(autouse=True)
def _auto_backend():
    tilefuse.backend("auto")


def build(name, dtype=torch.float32, **changes):
    if name not in OTHERS:
        return tiny_model(name, dtype=dtype, **changes)
    cls, config, differences = OTHERS[name]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**(SIZES | differences | changes)))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "norm" not in path and "embed" not in path:
                parameter.mul_(4)
    return model.to(dtype).eval()


def tokens(seed=0, batch=2, length=12):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def batches():
    """Calls with labels: whole, padded on either side, with ignored tokens, another divisor, shifted labels.

    No token is predicted from a padded place, whose hidden states say nothing.
    """
    ids = tokens()
    left = torch.ones_like(ids)
    left[0, :4] = 0
    right = left.flip(1)
    some = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    yield {"input_ids": ids, "labels": ids}
    yield {"input_ids": ids, "labels": some, "num_items_in_batch": torch.tensor(7)}
    yield {"input_ids": ids, "attention_mask": left, "labels": ids.masked_fill(left.cumsum(1) < 2, -100)}
    yield {"input_ids": ids, "attention_mask": right, "labels": some.masked_fill(right == 0, -100)}
    yield {"input_ids": ids, "labels": ids, "shift_labels": some.roll(1, 1), "num_items_in_batch": 5}


def step(model, batch):
    """Outputs, loss and gradients of a training step."""
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out, out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a, b, tolerance=2e-5):
    """Relative to the largest entry."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6)


def is_made(out):
    assert type(out.logits) is lazy.LazyLogits
    return out.logits._entries.made is not None


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name):
    stock = build(name)
    model = copy.deepcopy(stock)
    report = patch(model, loss=True, norm=True)
    assert report[""].changed == "loss" and (not report.left or name == "cohere")
    norms = [path for path, module in model.named_modules() if "RMSNorm" in type(module).__name__]
    assert bool(norms) == (name != "cohere") and all(report[path].changed == "norm" for path in norms)
    mlps = [path for path, module in model.named_modules() if type(module).__name__.endswith("MLP")]
    assert all(report[path].changed == "gated MLP" for path in mlps) and (mlps or name == "mixtral")
    for count, batch in enumerate(batches(), 1):
        out, loss, gradients = step(model, batch)
        expected_out, expected_loss, expected = step(stock, batch)
        assert not is_made(out)
        close(loss[None], expected_loss[None])
        assert gradients.keys() == expected.keys()
        for path, gradient in gradients.items():
            close(gradient, expected[path])
        assert report.calls()[""] == {"linear_cross_entropy": count}
        # asked for, they are there
        real = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
        close(out.logits.detach()[real], expected_out.logits.detach()[real])
        assert is_made(out)
    unpatch(model)
    for a, b in zip(step(model, batch)[0].to_tuple()[:2], step(stock, batch)[0].to_tuple()[:2]):
        assert_bit_equal(a, b)
    assert not any("forward" in module.__dict__ for module in model.modules()) and "_loss_function" not in vars(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "qwen3"])
def test_bfloat16(name):
    """Not further from float32 than twice stock: loss, and all gradients together."""
    exact = build(name)
    stock = copy.deepcopy(exact).bfloat16()
    for batch in list(batches())[:2]:
        model = copy.deepcopy(stock)
        patch(model, loss=True, norm=True)
        _, loss, gradients = step(model, batch)
        _, stock_loss, stock_gradients = step(stock, batch)
        _, exact_loss, exact_gradients = step(exact, batch)
        assert loss.dtype == stock_loss.dtype
        # one number's error may happen to be nothing at all
        assert (loss - exact_loss).abs() <= 2 * (stock_loss - exact_loss).abs() + 2e-3 * exact_loss
        errors = [
            sum((g[path].float() - exact_gradients[path]).square().sum() for path in exact_gradients).sqrt()
            for g in (gradients, stock_gradients)
        ]
        assert errors[0] <= 2 * errors[1]
        assert all(gradients[path].dtype == torch.bfloat16 for path in exact_gradients)


def test_by_default_nothing_changes():
    model = build("llama")
    report = patch(model)
    assert "" not in report and set(report.changed.values()) == {"attention, rope"}
    assert type(model(tokens(), labels=tokens()).logits) is torch.Tensor


def test_asking_for_more_keeps_what_was_asked_for():
    model = build("llama")
    first = patch(model, norm=True)
    assert patch(model) is first
    report = patch(model, loss=True)
    assert report[""].changed == "loss" and report["model.norm"].changed == "norm"
    assert patch(model, norm=True) is report


def use(name):
    """Ways to look at logits, each to a scalar."""

    def assigned(logits):
        logits[:, 0] = -1.0
        return logits.square().sum()

    def by_a_mask(logits):
        logits[logits > 0.5] = 0.25
        return logits.square().sum()

    def in_place(logits):
        logits /= 3
        return logits.square().sum()

    def through_a_view(logits):
        logits[:, :, :3].mul_(2.0)
        return logits.square().sum()

    def transformed_then_written(logits):
        half = logits / 2
        logits.mul_(0.0)
        return half.square().sum() + logits.sum()

    def without_gradient_first(logits):
        with torch.no_grad():
            logits.argmax(-1)
        return logits.square().sum()

    def compiled(logits):
        return torch.compile(lambda x: x.log_softmax(-1)[..., 2].sum(), backend="aot_eager")(logits)

    return {
        "sum": lambda x: x.square().sum(),
        "float": lambda x: x.float().log_softmax(-1)[..., 3].sum(),
        "capped": lambda x: (torch.tanh(x / 3) * 3).square().sum(),
        "flat": lambda x: F.cross_entropy(x.view(-1, 97), tokens().view(-1)),
        "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(lambda y: y.exp().sum(), x, use_reentrant=False),
        "op": lambda x: tilefuse.linear_cross_entropy(x, torch.eye(97), tokens()),
        "of_itself": lambda x: torch.autograd.grad(x.square().sum(), x, create_graph=True)[0].square().sum(),
        **{f.__name__: f for f in (assigned, by_a_mask, in_place, through_a_view)},
        **{f.__name__: f for f in (transformed_then_written, without_gradient_first, compiled)},
    }[name]


@pytest.mark.parametrize(
    "name",
    ["sum", "float", "capped", "flat", "checkpoint", "op", "of_itself", "assigned", "by_a_mask", "in_place"]
    + ["through_a_view", "transformed_then_written", "without_gradient_first", "compiled"],
)
def test_logits_are_stock_to_whoever_looks(name):
    stock = build("llama")
    model = copy.deepcopy(stock)
    patch(model, loss=True)
    found = []
    for each in (stock, model):
        out = each(tokens(), labels=tokens())
        value = use(name)(out.logits)
        (value + out.loss).backward()
        found.append((value.detach(), {path: p.grad for path, p in each.named_parameters()}))
    (expected, expected_gradients), (value, gradients) = found
    close(value[None], expected[None])
    for path, gradient in gradients.items():
        close(gradient, expected_gradients[path], 1e-4)


def test_copies_of_outputs_hold_logits():
    stock = build("gemma2")
    model = copy.deepcopy(stock)
    patch(model, loss=True)
    with torch.no_grad():
        expected = stock(tokens(), labels=tokens()).logits
        for of in (pickle.dumps, copy.deepcopy, lambda out: {name: x.cpu().numpy() for name, x in out.items()}):
            out = model(tokens(), labels=tokens(), use_cache=False)
            twin = of(out)
            twin = pickle.loads(twin) if isinstance(twin, bytes) else twin
            close(torch.as_tensor(twin["logits"]), expected)
            assert type(twin["logits"]) is not lazy.LazyLogits
        assert repr(model(tokens(), labels=tokens()).logits) == repr(model(tokens()).logits)
    with torch.inference_mode():
        close(model(tokens(), labels=tokens()).logits.clone(), expected)


def test_logits_of_weights_that_are_gone_raise():
    model = build("llama")
    patch(model, loss=True)
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        out.logits.sum()


def test_nothing_of_the_vocabulary_is_made():
    """Of the size of all logits there is nothing, in the forward and after it."""
    model = build("llama", vocab_size=5003)
    patch(model, loss=True)
    ids = tokens(length=300)
    with allocations() as made:
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
    assert not is_made(out) and made and max(m.numel for m in made) < ids.numel() * 5003
    gone = weakref.ref(out.logits)
    del out
    assert gone() is None


def test_calls_without_labels_and_compiled_ones_are_stock():
    model = build("llama")
    expected = model(tokens(), labels=tokens(), use_cache=False)
    report = patch(model, loss=True, norm=True)
    assert type(model(tokens()).logits) is torch.Tensor
    assert "" not in report.calls()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens(), labels=tokens(), use_cache=False)
    assert type(out.logits) is torch.Tensor
    close(out.logits, expected.logits)
    close(out.loss[None], expected.loss[None])
    out.loss.backward()
    assert model.lm_head.weight.grad.any()


def test_hooks_that_would_not_see_the_loss_raise():
    """Stock's logits lie on the way from the loss to the weights; these do not."""
    model, ids = build("llama"), tokens()
    patch(model, loss=True)
    logits = model(ids, labels=ids).logits
    for hooked in (lambda: logits.register_hook(lambda gradient: None), logits.retain_grad):
        with pytest.raises(NotImplementedError, match="would not see the loss"):
            hooked()
    # without a loss there is nothing to miss
    logits = model(ids).logits
    logits.retain_grad()
    logits.sum().backward()
    assert logits.grad.eq(1).all()


@pytest.mark.parametrize("path", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_gradient_penalty_raises(path):
    model, ids = build("llama"), tokens()
    patch(model, loss=True, norm=True)
    parameter = model.get_parameter(path)
    (first,) = torch.autograd.grad(model(ids, labels=ids).loss, parameter, create_graph=True)
    with pytest.raises(NotImplementedError, match="this is a second derivative"):
        torch.autograd.grad(first.square().sum(), parameter, allow_unused=True)


def test_a_number_of_items_with_dims():
    model, ids = build("llama"), tokens()
    expected = model(ids, labels=ids, num_items_in_batch=torch.tensor([7])).loss
    report = patch(model, loss=True)
    found = model(ids, labels=ids, num_items_in_batch=torch.tensor([7])).loss
    assert found.shape == expected.shape == (1,)
    torch.testing.assert_close(found, expected)
    assert "stock loss: num_items_in_batch with dims" in report.calls()[""]


def test_labels_by_position():
    model = build("llama")
    expected = model(tokens(), labels=tokens()).loss
    patch(model, loss=True)
    out = model(tokens(), None, None, None, None, tokens())
    assert not is_made(out)
    close(out.loss[None], expected[None])


@pytest.mark.parametrize("items", [None, 0])
def test_without_a_label_the_loss_is_stock(items):
    """NaN, as Hugging Face's, with the same gradients."""
    stock = build("llama")
    model = copy.deepcopy(stock)
    patch(model, loss=True)
    batch = {"input_ids": tokens(), "labels": torch.full_like(tokens(), -100), "num_items_in_batch": items}
    (_, loss, gradients), (_, expected, _) = step(model, batch), step(stock, batch)
    assert loss.isnan() and expected.isnan()
    assert not any(gradient.any() for gradient in gradients.values())


def head_with_a_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def loss_of_the_user(model):
    model.loss_function = lambda logits, labels, vocab_size, **options: logits.square().mean()


def head_of_another_size(model):
    torch.manual_seed(3)
    model.resize_token_embeddings(101)


def frozen_head(model):
    model.lm_head.weight.requires_grad_(False)


def only_head(model):
    model.model.requires_grad_(False)


def lora_on_the_head(model):
    import peft

    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (head_with_a_hook, "stock loss: hooks of the head"),
        (loss_of_the_user, None),
        (head_of_another_size, "stock loss: its head is another"),
        (lora_on_the_head, "stock loss: its head is another"),
        (frozen_head, "linear_cross_entropy"),
        (only_head, "linear_cross_entropy"),
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["patched_first", "patched_last"])
def test_models_that_change(change, what, before):
    stock = build("llama", tie_word_embeddings=False)
    model = copy.deepcopy(stock)
    change(stock)
    if before:
        change(model)
        report = patch(model, loss=True)
    else:
        report = patch(model, loss=True)
        change(model)
    batch = next(batches())
    (out, loss, gradients), (expected_out, expected_loss, expected) = step(model, batch), step(stock, batch)
    close(loss[None], expected_loss[None])
    close(out.logits.detach().clone(), expected_out.logits.detach())
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        close(gradient, expected[path])
    if before and change in (loss_of_the_user, lora_on_the_head):
        assert report[""].left.startswith("loss: ") and not report[""].changed
    elif what:
        assert set(report.calls()[""]) == {
            "linear_cross_entropy" if change is head_of_another_size and before else what
        }


def test_a_transform_of_logits_that_is_not_known_is_stock():
    """A soft cap that the op does not have."""
    stock = build("gemma2")
    model = copy.deepcopy(stock)
    report = patch(model, loss=True)
    for each in (stock, model):
        # that of the op is positive
        each.config.final_logit_softcapping = -2.0
    (_, loss, _), (_, expected, _) = step(model, next(batches())), step(stock, next(batches()))
    close(loss[None], expected[None])
    assert set(report.calls()[""]) == {"stock loss: logits that were looked at"}


def code_of_its_own(model):
    class Own(type(model)):
        def forward(self, input_ids, labels=None, **options):
            return super().forward(input_ids, labels=labels, **options)

    model.__class__ = Own


def another_forward(model):
    model.forward = types.MethodType(type(model).forward.__wrapped__, model)
    model.forward = lambda *args, **options: type(model).forward(model, *args, **options)


def head_of_another_class(model):
    class Head(nn.Linear):
        pass

    model.lm_head.__class__ = Head


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (code_of_its_own, "its forward makes logits and loss in a way that is not known"),
        (another_forward, "someone replaced its forward"),
        (head_of_another_class, "its head is Head"),
        (loss_of_the_user, "its loss function is <lambda>"),
    ],
)
def test_what_is_not_known_is_left_and_named(change, why):
    model = build("llama")
    change(model)
    report = patch(model, loss=True)
    assert report[""].left == f"loss: {why}"
    assert type(model(tokens(), labels=tokens()).logits) is torch.Tensor


def test_models_of_other_forms_are_named():
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    report = patch(transformers.BartForConditionalGeneration(config), loss=True, norm=True)
    assert report[""].left == "loss: its forward makes logits and loss in a way that is not known"


def test_layers_of_other_forms_are_named():
    class OtherRMSNorm(nn.Module):
        def forward(self, x):
            return x / x.norm()

    class OtherMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Linear(2, 2)

    model = build("llama", hidden_act="quick_gelu")
    model.other, model.mlp = OtherRMSNorm(), OtherMLP()
    report = patch(model, norm=True)
    assert report["other"].left == "its norm is of another form" and report["mlp"].left == "its MLP is of another form"
    assert report["model.layers.0.mlp"].left == "its activation is QuickGELUActivation"


def test_activations_are_told_apart():
    found = {name: norm.activation_of(ACT2FN[name]) for name in ("silu", "swish", "gelu", "gelu_new", "relu2")}
    assert found == {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu2": "relu2"}
    assert norm.activation_of(ACT2FN["gelu_pytorch_tanh"]) == "gelu_tanh"
    for name in ("quick_gelu", "gelu_10", "mish", "relu", "tanh", "xielu"):
        assert norm.activation_of(ACT2FN[name]) is None
    assert norm.activation_of(F.silu) is None and norm.activation_of(nn.Bilinear(2, 2, 2)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model, name", [(model, name) for model, name, _ in norm._NORMS])
def test_every_known_norm(model, name, dtype):
    file = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.manual_seed(0)
    stock = getattr(file, name)(24) if name != "NanoChatRMSNorm" else getattr(file, name)()
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    module, x = copy.deepcopy(stock).to(dtype), torch.randn(5, 24, dtype=dtype)
    expected, report = stock.to(dtype)(x), patch(module, norm=True)
    assert report[""].changed == "norm"
    torch.testing.assert_close(module(x), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_norms_round_as_stock(name, dtype):
    """To the bit but for a last bit of the mean, here and there; a float32 weight keeps stock's float32 product."""
    model = build(name, dtype)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    stock, wide = model.model.norm, copy.deepcopy(model.model.norm).float()
    expected, expected_wide = stock(x), wide(x)
    patch(model, norm=True)
    patch(wide, norm=True)
    out, out_wide = stock(x), wide(x)
    assert out.dtype == expected.dtype and out_wide.dtype == expected_wide.dtype
    if dtype == torch.bfloat16:
        assert (out != expected).float().mean() <= 0.01
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(out_wide, expected_wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_hooks_and_adapters_of_layers_still_run():
    stock = build("llama")
    model = copy.deepcopy(stock)
    patch(model, norm=True)
    for each in (stock, model):
        each.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: out + 1)
        each.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)
        each.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    close(model(tokens()).logits, stock(tokens()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    stock = build("gemma2").train()
    model = copy.deepcopy(stock)
    patch(model, loss=True, norm=True)
    for each in (stock, model):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    (_, loss, gradients), (_, expected_loss, expected) = (step(each, next(batches())) for each in (model, stock))
    close(loss[None], expected_loss[None])
    for path, gradient in gradients.items():
        close(gradient, expected[path])


def test_autocast():
    stock = build("llama")
    model = copy.deepcopy(stock)
    patch(model, loss=True, norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = (each(tokens(), labels=tokens(), use_cache=False) for each in (model, stock))
    assert not is_made(out) and out.logits.dtype == expected.logits.dtype == torch.bfloat16
    # in another context, they are still those of the forward
    close(out.logits.detach().float(), expected.logits.detach().float(), 2e-2)
    close(out.loss[None], expected.loss[None], 2e-3)
    out.loss.backward()
    expected.loss.backward()
    close(model.lm_head.weight.grad, stock.lm_head.weight.grad, 3e-2)


def test_a_pickled_or_copied_model_comes_back_patched():
    model = build("gemma2")
    report = patch(model, loss=True, norm=True)
    _, loss, _ = step(model, next(batches()))
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        out, twin_loss, _ = step(twin, next(batches()))
        assert not is_made(out)
        assert_bit_equal(twin_loss, loss)
        with torch.no_grad():
            twin.model.norm.weight.fill_(-1.0)
        assert step(twin, next(batches()))[1] != loss and dict(patch(twin)) == dict(report)
        assert type(unpatch(twin)(tokens(), labels=tokens()).logits) is torch.Tensor
    assert_bit_equal(step(model, next(batches()))[1], loss)


def test_experts_balance_loss():
    stock = build("mixtral")
    model = copy.deepcopy(stock)
    patch(model, loss=True)
    batch = {**next(batches()), "output_router_logits": True}
    (out, loss, _), (expected_out, expected, _) = step(model, batch), step(stock, batch)
    assert not is_made(out)
    close(loss[None], expected[None])
    close(out.aux_loss[None], expected_out.aux_loss[None])


@pytest.mark.parametrize("unused", [False, True])
def test_ddp(unused, tmp_path):
    stock = build("llama")
    model = copy.deepcopy(stock)
    patch(model, loss=True, norm=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        for batch in list(batches())[:2]:
            (out, loss, gradients), (_, expected_loss, expected) = step(wrapped, batch), step(stock, batch)
            close(loss[None], expected_loss[None])
            for path, gradient in gradients.items():
                close(gradient, expected[path.removeprefix("module.")])
            close(out.logits.detach().clone(), stock(batch["input_ids"]).logits)
    finally:
        torch.distributed.destroy_process_group()


def test_the_signature_is_stock():
    """Trainer and generate ask for it."""
    model = build("llama")
    expected = inspect.signature(model.forward)
    patch(model, loss=True, norm=True)
    assert inspect.signature(model.forward) == expected


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = tokens(index, 1, 10)[0]
        return {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}


def trained(model, folder):
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )

    def metrics(prediction):
        return {"mean": float(prediction.predictions.mean()), "top": int(prediction.predictions.argmax(-1).sum())}

    trainer = transformers.Trainer(model, options, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=metrics)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, trainer.evaluate()


def test_trainer(tmp_path):
    """Three steps with accumulation, then an evaluation whose metrics read logits."""
    stock = build("llama")
    model = copy.deepcopy(stock)
    report = patch(model, loss=True, norm=True)
    losses, metrics = trained(model, tmp_path)
    expected, expected_metrics = trained(stock, tmp_path)
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 3
    for name in ("eval_loss", "eval_mean"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-3, abs=1e-4)
    assert metrics["eval_top"] == expected_metrics["eval_top"]
    assert set(report.calls()[""]) == {"linear_cross_entropy"}
    for a, b in zip(model.parameters(), stock.parameters()):
        close(a.detach(), b.detach(), 1e-3)
