"""Patched models compute what Hugging Face's do, and ``unpatch`` gives those back bit for bit."""

import copy

import pytest
import torch

from tilefuse.testing import assert_bit_equal, assert_close

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

from tilefuse.integrations.transformers import patch, register, unpatch
from tilefuse.testing.numeric import NOISE_ULPS

NAMES = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)
WINDOWED = ("mistral", "gemma3", "gpt_oss")


@pytest.fixture(autouse=True)
def _auto_backend():
    import tilefuse

    tilefuse.backend("auto")


def tokens(seed=0, batch=2, length=18):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padding(ids, count=5):
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return mask


def step(model, ids, mask):
    """Logits, loss and gradients of one training step."""
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach()[mask.bool()], out.loss.detach(), gradients


def assert_loss_close(out, oracle, naive, logits_error):
    """By the rule, but for errors below naive's RMS error over the logits, or of a float32 rounding or two.

    The loss is one number, whose error in naive may happen to be nothing at all; and an error of the logits carries
    over at most twofold, since the gradient of a token's cross-entropy sums to two in absolute values.
    """
    tiny = max(logits_error.item(), 2 * torch.finfo(torch.float32).eps * oracle.abs().item())
    assert_close(out[None].float(), oracle[None].double(), naive[None].float(), tiny=tiny, rows=False, name="loss")


def routes(model, ids, mask):
    """Chosen experts of a forward, one entry per router."""
    chosen = []

    def keep(module, args, output):
        chosen.append(output[2].sort(-1).values)

    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    handles = [router.register_forward_hook(keep) for router in routers]
    if routers:
        with torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return chosen


def same_routes(*lists):
    return all(len(a) == len(lists[0]) and all(map(torch.equal, a, lists[0])) for a in lists)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients(tiny, name, dtype):
    model = tiny(name).to(dtype)
    exact = copy.deepcopy(model).double()
    # the grouped product that is Hugging Face's default knows no float64
    exact.set_experts_implementation("eager")
    patched = copy.deepcopy(model)
    report = patch(patched)
    assert report.changed
    trials = []
    for seed in range(40):
        ids = tokens(seed, batch=2, length=12)
        mask = left_padding(ids, 3)
        # where two experts are nearly tied, rounding decides: such inputs say nothing
        if same_routes(*(routes(each, ids, mask) for each in (exact, model, patched))):
            trials.append([step(each, ids, mask) for each in (exact, model, patched)])
        # the largest error of one input's few dozen tokens is luck: those of several are compared together
        if len(trials) == 4:
            break
    else:
        raise AssertionError("never chose the same experts")
    for (logits, loss, gradients), (stock_logits, stock_loss, stock_gradients), (
        out,
        out_loss,
        out_gradients,
    ) in trials:
        assert_close(out, logits, stock_logits, rows=False, name="logits")
        assert_loss_close(out_loss, loss, stock_loss, (stock_logits.double() - logits).square().mean().sqrt())
        assert set(out_gradients) == set(stock_gradients) == set(gradients)
    few = [], [], []
    for parameter in trials[0][0][2]:
        oracle, naive, gradient = (torch.stack([trial[i][2][parameter] for trial in trials]) for i in range(3))
        triple = gradient, oracle, naive
        if gradient[0].numel() >= 64:
            # a router's gradient is a small difference of terms of order one: its float32 noise is theirs
            router = parameter.endswith((".gate.weight", ".router.weight"))
            assert_close(*triple, tiny=NOISE_ULPS * 2.0**-24 if router else None, rows=False, name=parameter)
        else:
            # the largest of four errors is luck: small gradients are judged together, each at its own scale
            scale = triple[1].square().mean().sqrt()
            for values, one in zip(few, triple):
                values.append(one.double().flatten() / scale)
    if few[0]:
        out, oracle, naive = map(torch.cat, few)
        assert_close(out.to(dtype), oracle, naive.to(dtype), rows=False, name="small gradients")


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_restores_the_same_bits(tiny, name):
    model = tiny(name)
    ids, before = tokens(), model.config
    state = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = {path: module.forward for path, module in model.named_modules()}
    classes = [type(m) for m in model.modules()]
    logits = model(ids, attention_mask=left_padding(ids)).logits
    report = patch(model)
    assert list(model.state_dict()) == list(state) and [type(m) for m in model.modules()] == classes
    model(ids)
    # twice in both directions is harmless
    assert patch(model) is report
    assert unpatch(model) is model
    unpatch(model)
    assert model.config is before
    assert all(module.forward == forwards[path] for path, module in model.named_modules())
    assert_bit_equal(model(ids, attention_mask=left_padding(ids)).logits, logits)
    for key, value in model.state_dict().items():
        assert_bit_equal(value, state[key])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_swapped(tiny, name):
    model = tiny(name)
    report = patch(model)
    attention = (
        "attention, rope" if name not in ("qwen3", "gemma3", "qwen3_moe") else "attention, q and k norm with rope"
    )
    assert report["model.layers.1.self_attn"].changed == attention
    kinds = {change.changed.split(" (")[0] for change in report.values()}
    expected = {attention}
    if name in ("gpt_oss", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        expected |= {"router", "experts"}
    assert kinds == expected and not report.left
    assert f"{len(report)} of {len(report)}" in str(report) and "model.layers.*.self_attn" in repr(report)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(tiny, name):
    model, patched = tiny(name), tiny(name)
    patch(patched)
    ids = tokens(1)
    ones, left = torch.ones_like(ids), left_padding(ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = {"cache_implementation": "static", "disable_compile": True}
    cases = [(left, {}), (left, static)]
    if name in ("llama", "mistral", "gpt_oss"):
        cases += [(ones, {}), (left.flip(1), {}), (ones, static)]
    for mask, more in cases:
        expected = model.generate(ids, attention_mask=mask, **settings, **more)
        assert_bit_equal(patched.generate(ids, attention_mask=mask, **settings, **more), expected)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_conversation_over_one_cache(tiny, name):
    """Chunks, single tokens and padding that end before, at and after the window of 7."""
    from transformers import DynamicCache

    model, patched = tiny(name), tiny(name)
    patch(patched)
    ids = tokens(2, length=24)
    for mask in (torch.ones_like(ids), left_padding(ids, 4)):
        seen = []
        for each in (model, patched):
            cache, at, parts = DynamicCache(config=each.config), 0, []
            for length in (5, 1, 4, 1, 9, 1, 3):
                chunk = slice(at, at + length)
                at += length
                with torch.no_grad():
                    out = each(ids[:, chunk], attention_mask=mask[:, :at], past_key_values=cache)
                parts.append(out.logits[mask[:, chunk].bool()])
            seen.append(torch.cat(parts))
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3_moe", "deepseek_v3"])
def test_packed_sequences(tiny, name):
    model, patched = tiny(name), tiny(name)
    patch(patched)
    ids = tokens(3, batch=1, length=21)
    lengths = (9, 1, 11)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    out = patched(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([patched(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_rows_without_a_key_are_not_nan(tiny, name):
    model = tiny(name)
    patch(model)
    ids = tokens()
    mask = left_padding(ids)
    mask[1] = 0
    logits = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    logits.loss.backward()
    assert logits.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_other_models_of_the_same_config_do_not_change(config_of):
    from transformers import AutoModelForCausalLM

    config = config_of("llama")
    config._attn_implementation = "eager"
    one, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert one.config is other.config
    ids = tokens()
    before = other(ids).logits
    patch(one)
    assert other.config._attn_implementation == "eager" == config._attn_implementation
    assert_bit_equal(other(ids).logits, before)
    # settings made meanwhile stay
    one.config.use_cache = False
    unpatch(one)
    assert one.config is config and config.use_cache is False


def test_a_deep_copy_is_patched_on_its_own(tiny):
    model = tiny("mixtral")
    ids = tokens()
    stock = model(ids).logits
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(ids).logits, stock, rtol=1e-4, atol=1e-4)
    unpatch(twin)
    assert_bit_equal(twin(ids).logits, stock)
    assert "forward" in model.model.layers[0].mlp.experts.__dict__


def test_part_of_a_model(tiny):
    model = tiny("llama")
    ids = tokens()
    stock = model(ids).logits
    patch(model.model)
    report = patch(model)
    assert "model.layers.0.self_attn" in report
    unpatch(model)
    assert_bit_equal(model(ids).logits, stock)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_in_training_is_left_to_hugging_face(tiny, implementation):
    model, patched = (tiny("mistral", attention_dropout=0.25, attn_implementation=implementation) for _ in range(2))
    report = patch(patched)
    assert f"attention dropout 0.25 in training runs on {implementation}" in str(report)
    ids = tokens()
    for mask in (None, left_padding(ids)):
        outs = []
        for each in (model, patched):
            torch.manual_seed(7)
            outs.append(each.train()(ids, attention_mask=mask).logits[:, 6:])
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    # without dropout tilefuse computes again
    torch.testing.assert_close(patched.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


# the eager function of gpt-oss adds the mask, so that a bool one means nothing to it
@pytest.mark.parametrize("name, kind", [("llama", "bool"), ("llama", "additive"), ("gpt_oss", "additive")])
def test_masks_of_the_user(tiny, name, kind):
    model, patched = tiny(name), tiny(name)
    patch(patched)
    ids = tokens()
    mask = torch.rand(2, 1, 18, 18, generator=torch.Generator().manual_seed(0)) < 0.6
    mask |= torch.eye(18, dtype=torch.bool)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(
        patched(ids, attention_mask=mask, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
    )


def test_attention_weights_are_still_returned(tiny):
    model, patched = (tiny("llama", attn_implementation="eager") for _ in range(2))
    patch(patched)
    ids = tokens()
    expected = model(ids, output_attentions=True).attentions
    out = patched(ids, output_attentions=True).attentions
    assert len(out) == len(expected) == 2
    for a, b in zip(out, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_router_logits_and_balance_loss(tiny):
    model, patched = (tiny("mixtral", output_router_logits=True) for _ in range(2))
    patch(patched)
    ids = tokens()
    expected, out = (each(ids, labels=ids) for each in (model, patched))
    assert len(out.router_logits) == len(expected.router_logits) == 2
    for a, b in zip(out.router_logits, expected.router_logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_moe"])
def test_registered_names(config_of, name):
    from transformers import AutoModelForCausalLM

    register()
    register()
    experts = {} if name == "llama" else {"experts_implementation": "tilefuse"}
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config_of(name)).eval()
    model = AutoModelForCausalLM.from_config(config_of(name), attn_implementation="tilefuse", **experts).eval()
    model.load_state_dict(stock.state_dict())
    assert model.config._attn_implementation == "tilefuse"
    ids = tokens()
    for mask in (None, left_padding(ids)):
        expected = stock(ids, attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 5:], expected, rtol=1e-4, atol=1e-4)
