"""`patch(model, pack=...)`: the same numbers from packed weights, checkpoints as before, and everything back."""

import copy
import io

import pytest
import torch

from tilefuse.integrations.transformers import patch, unpatch
from tilefuse.packing import PackedWeight
from tilefuse.testing import assert_bit_equal

pytest.importorskip("transformers")
BF16 = torch.bfloat16
NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]
MODES = [True, "only"]


@pytest.fixture(autouse=True)
def _auto_backend(monkeypatch):
    monkeypatch.delenv("TILEFUSE_BACKEND", raising=False)


def tokens(seed=0, length=18):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def experts_of(model):
    return {path: m for path, m in model.named_modules() if path.endswith("mlp.experts")}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_bit_equal(a[name].detach(), b[name].detach())


def error(a, exact):
    return float((a.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("pack", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_checkpoints_and_back(tiny, name, pack):
    model, ids = tiny(name, dtype=BF16), tokens()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    stock = logits(model, ids)
    # a layer alone: which experts are chosen later on depends on the last bit
    layer = next(iter(experts_of(model).values()))
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    routed = (torch.arange(24).view(12, 2) % 4, torch.rand(12, 2, generator=torch.Generator().manual_seed(2)).to(BF16))
    wide = copy.deepcopy(layer).double()
    wide.config._experts_implementation = "eager"
    with torch.no_grad():
        exact = wide(x.double(), routed[0], routed[1].double())
        naive = layer(x, *routed)
    report = patch(model, pack=pack)
    paths = experts_of(model)
    assert all(report[path].changed.endswith(", packed") for path in paths)
    # gpt-oss: interleaved biases are copied too
    assert report.memory.after >= report.memory.before * (2 if pack is True else 1)
    assert report.memory.after <= report.memory.before * (2.02 if pack is True else 1.02)
    assert "packed weights: " in str(report)
    with torch.no_grad():
        assert error(layer(x, *routed), exact) <= 1.5 * error(naive, exact)
    same_bits(model.state_dict(), state)
    packed = logits(model, ids)
    assert torch.isfinite(packed).all()
    assert patch(model, pack=pack) is report and patch(model) is report
    unpatch(model)
    assert not any(p.is_meta for p in model.parameters())
    assert not any(key in m.__dict__ for m in model.modules() for key in ("_packs", "_apply", "_save_to_state_dict"))
    assert_bit_equal(logits(model, ids), stock)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_packed_experts_are_called(tiny, name):
    model = tiny(name, dtype=BF16)
    patch(model, pack="only")
    for module in experts_of(model).values():
        assert module.gate_up_proj.is_meta and module.down_proj.is_meta
        up, down = module._packs.weights[:2]
        assert isinstance(up, PackedWeight) and isinstance(down, PackedWeight)
        assert up.shape == (module.num_experts, 2 * down.shape[2], 64)
    with pytest.raises(RuntimeError, match="are packed only, for inference"):
        model(tokens())
    with torch.no_grad():
        out = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 22)


def test_training_over_kept_parameters(tiny):
    """A step moves the weights; what is packed follows."""
    model, ids = tiny("qwen3_moe", dtype=BF16), tokens()
    twin = copy.deepcopy(model)
    patch(model, pack=True)
    patch(twin)
    before = logits(model, ids)
    assert_bit_equal(before, logits(twin, ids))
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        m(ids, labels=ids).loss.backward()
        optimizer.step()
    after = logits(model, ids)
    assert not torch.equal(after, before)
    assert_bit_equal(after, logits(twin, ids))


@pytest.mark.parametrize("pack", MODES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_saved_copied_moved(tiny, tmp_path, name, pack):
    import transformers

    model, ids = tiny(name, dtype=BF16), tokens()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    patch(model, pack=pack)
    packed = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    same_bits(loaded.state_dict(), state)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert_bit_equal(logits(twin, ids), packed)
        assert patch(twin).memory == patch(model).memory
        unpatch(twin)
        same_bits(twin.state_dict(), state)
    # a checkpoint into the patched model
    other = {key: value.flip(0) for key, value in state.items()}
    model.load_state_dict(other)
    same_bits(model.state_dict(), other)
    changed = logits(model, ids)
    assert not torch.equal(changed, packed)
    assert_bit_equal(logits(model.to("cpu"), ids), changed)
    model.float()
    assert logits(model, ids).dtype == torch.float32


@pytest.mark.parametrize("pack", MODES)
def test_compiled(tiny, pack):
    model, ids = tiny("gpt_oss", dtype=BF16), tokens()
    patch(model, pack=pack)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = compiled(ids, use_cache=False).logits
    assert error(got, want.double()) < 2e-2


def test_what_cannot_be_packed_says_so(tiny):
    model = tiny("mixtral")
    report = patch(model, pack=True)
    left = report["model.layers.0.mlp.experts"].left
    assert left == "not packed: gate_up_proj is float32, packed weights are bfloat16 or float8_e4m3fn"
    assert report.memory is None and "_packs" not in model.model.layers[0].mlp.experts.__dict__
    with pytest.raises(ValueError, match="pack must be one of False, True, \"only\", got 'all'"):
        patch(model, pack="all")


def test_a_patched_model_can_be_packed_later(tiny):
    model, ids = tiny("qwen3_moe", dtype=BF16), tokens()
    patch(model)
    want = logits(model, ids)
    for pack in (True, "only", True):
        assert patch(model, pack=pack).memory is not None
        assert_bit_equal(logits(model, ids), want)
    assert not any(p.is_meta for p in model.parameters())


def test_another_implementation_that_is_chosen_later_has_its_weights(tiny):
    model, ids = tiny("qwen3_moe", dtype=BF16), tokens()
    model.set_experts_implementation("eager")
    patch(model)
    model.set_experts_implementation("grouped_mm")
    want = logits(model, ids)
    model.set_experts_implementation("eager")
    unpatch(model)
    patch(model, pack="only")
    model.set_experts_implementation("grouped_mm")
    assert_bit_equal(logits(model, ids), want)


@pytest.mark.parametrize("pack", MODES)
def test_fp8_modules(pack):
    from tests.integrations.test_fp8_linear import fp8_experts, fp8_linear, routed

    linear, experts = fp8_linear(200, 320, BF16, bias=True), fp8_experts()
    x = torch.randn(5, 320, generator=torch.Generator().manual_seed(0)).to(BF16)
    rows, ids, weights = routed(5, BF16)
    model = torch.nn.ModuleDict({"linear": linear, "experts": experts})
    patch(model)
    with torch.no_grad():
        want = linear(x), experts(rows, ids, weights)
    report = patch(model, pack=pack)
    assert all(change.changed.endswith(", packed") for change in report.values())
    assert linear.weight.is_meta == (pack == "only")
    with torch.no_grad():
        assert_bit_equal(linear(x), want[0])
        assert_bit_equal(experts(rows, ids, weights), want[1])
