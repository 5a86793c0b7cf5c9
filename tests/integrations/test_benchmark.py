"""``benchmarks/models.py``: whole models, stock against patched; shown on tiny ones."""

import dataclasses
import json
import math

import pytest
import torch
from tilefuse.benchmarks import harness, models, records, report, roofline, runner

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("tilefuse.integrations.transformers")

CPU = torch.device("cpu")
ROOF = roofline.Roof(1e4, 1e4, 1e4, 1e4, {"float32": 1e3, "bfloat16": 1e3})


def tiny(layers, experts):
    options = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {"vocab_size": models.VOCAB, "num_hidden_layers": layers, "max_position_embeddings": 256}
    return models._causal(transformers.LlamaConfig(**options))


def tiny_experts(layers, experts):
    options = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32}
    options |= {"vocab_size": models.VOCAB, "num_hidden_layers": layers, "num_experts": experts}
    return models._causal(transformers.Qwen3MoeConfig(**options, num_experts_per_tok=2, max_position_embeddings=256))


def case(mode, **changes):
    return models.ModelCase(models.Net("tiny", tiny, 16), mode, 2, 24, **changes)


@pytest.fixture
def engine(monkeypatch):
    models.forget()
    yield runner.Runner(CPU, runner.Settings(seconds=0.01), roof=ROOF)
    models.forget()


@pytest.mark.parametrize("mode", ["prefill", "decode", "train"])
def test_a_line_has_every_number(mode, engine, tmp_path):
    line = engine.run(case(mode))
    assert line["status"] == "ok", line
    assert line["case"] == case(mode).id
    stock = line["peers"]["stock"]
    tokens = 2 * (models.STEPS if mode == "decode" else 24)
    for each in (line, stock):
        assert each["tokens_per_second"] == pytest.approx(tokens / each["median_us"] * 1e6)
        assert each["rounds"] >= models.MIN_ROUNDS
        assert each["peak_bytes"] > 0
    assert math.isfinite(stock["speedup"])
    assert line["changed"]
    assert line["error"]["float32"] < models.SAME_IN_FLOAT32
    if mode == "train":
        # every gradient is there at the end of a step
        assert stock["peak_bytes"] >= line["weights_bytes"]
    path = tmp_path / "lines.jsonl"
    records.write_lines(path, [line])
    header, rows = report.model_rows(records.read_lines(path))
    assert len(rows[0]) == len(header)
    json.dumps(line)


def test_packed_experts_beside_the_weights_of_stock(engine):
    packed = models.ModelCase(models.Net("tiny", tiny_experts, 16, 4), "decode packed", 2, 24, experts=4)
    assert packed.counted == 2 * models.STEPS
    line = engine.run(packed)
    assert line["status"] == "ok", line
    assert any("packed" in change for change in line["changed"])
    pair = models._pair(packed, CPU)
    assert not any(p.is_meta for p in pair.stock.parameters())
    assert any(p.is_meta for p in pair.patched.parameters())
    table = report.model_table([line | {"device": "CPU"}])
    assert "decode packed" in table and "tiny" in table


def test_weights_are_shared_and_the_stock_model_stays_stock(engine):
    pair = models._pair(case("prefill"), CPU)
    assert [p is q for p, q in zip(pair.stock.parameters(), pair.patched.parameters())]
    assert not any("forward" in vars(m) for m in pair.stock.modules())
    assert pair.stock.config is not pair.patched.config
    # random rows, all different
    weight = pair.stock.lm_head.weight
    assert torch.unique(weight, dim=0).shape == weight.shape


@pytest.mark.parametrize("wrong", [1.001, 1.05])
def test_a_wrong_patch_fails(wrong, engine, monkeypatch):
    stock_patch = integration.patch

    def patch(model, **options):
        done = stock_patch(model, **options)
        model.lm_head.register_forward_hook(lambda module, args, out: out * wrong)
        return done

    monkeypatch.setattr(integration, "patch", patch)
    line = engine.run(case("prefill"))
    assert line["status"] == "failed"
    assert "float32 logits differ" in line["reason"]


def test_a_wrong_gradient_fails(engine, monkeypatch):
    pair = models._pair(case("train"), CPU)
    pair.patched.lm_head.register_full_backward_hook(lambda module, grads, _: (grads[0] * 1.2,))
    line = engine.run(case("train"))
    assert line["status"] == "failed"
    assert "outputs differ" in line["reason"]


def test_peak_is_of_the_call_alone():
    kept = torch.ones(1000, 1000)

    def run(_):
        a = kept + 1
        b = a + 1
        del a
        return b + 1

    job = models.Job(lambda: torch.ones(500, 500), run, lambda out: [out])
    peak, out = models.peak_bytes(job, CPU)
    # 12 bytes of scalars
    assert 0 <= peak - 2 * out.numel() * 4 < 1000


def test_rounds_are_paired_and_alternate():
    calls = []
    jobs = {name: models.Job(lambda: None, lambda _, name=name: calls.append(name), list) for name in "ab"}
    samples = models.rounds(jobs, CPU, 0)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}


def test_without_transformers_a_case_is_unavailable(engine, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers.initialization", None)
    line = engine.run(case("prefill"))
    assert line["status"] == "unavailable"
    assert "tilefuse[transformers]" in line["reason"]


def test_cases_are_listed_with_the_ops():
    also = {models.FAMILY: models}
    for device in ("cpu", "cuda"):
        plain = harness.discover("quick", device)
        every = harness.discover("quick", device, also=also)
        found = every[len(plain) :]
        assert {c.family for c in found} == {models.FAMILY}
        assert {c.op for c in found} == {c.op for c in models.cases()}
        assert {c.kind for c in found} == {"prefill", "decode", "train"}
        assert {c.op for c in found if c.packed} == ({c.op for c in found if c.experts} if device == "cpu" else set())
    # the weights of a model are made once: its cases follow each other
    keys = [(c.net.name, c.layers, c.experts) for c in every[len(plain) :]]
    assert len({k for i, k in enumerate(keys) if i == 0 or keys[i - 1] != k}) == len(set(keys))
    assert [c.op for c in harness.discover("quick", "cpu", families=["models"], match="BigBird", also=also)]


def test_a_case_says_what_it_is():
    shown = models.ModelCase(models.QWEN3_MOE, "decode", 4, 128, layers=2, experts=16)
    assert shown.name == "2 layers, 16 of 128 experts, batch 4, 128 tokens in the cache"
    assert shown.id == f"Qwen3-30B-A3B | {shown.name} | bfloat16 | decode"
    assert dataclasses.replace(shown, mode="train").name == "2 layers, 16 of 128 experts, 4 x 128 tokens"
