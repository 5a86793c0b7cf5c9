"""Longformer patched against Longformer as it is."""

import copy

import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("tilefuse.integrations.transformers")

DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = "encoder.layer.{}.attention.self"


def config(**changes):
    # heads of 12: the stock division of q by sqrt(12) rounds, which a power of four would hide
    options = {"vocab_size": 100, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    options |= {"intermediate_size": 64, "attention_window": [8, 16], "max_position_embeddings": 200}
    return transformers.LongformerConfig(
        **options | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | changes
    )


def tokens(length=77, batch=2, padded=27, globals_at=((0, 5, 40), (3,))):
    """Ids, mask and global mask: rows with different numbers of global tokens, padding at the right of the last row."""
    ids = torch.randint(3, 100, (batch, length))
    mask, of_globals = torch.ones_like(ids), torch.zeros_like(ids)
    if padded:
        mask[-1, -padded:] = 0
    for row, places in enumerate(globals_at):
        of_globals[row, list(places)] = 1
    return ids, mask, of_globals


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_lm(dtype, against_stock):
    model = transformers.LongformerForMaskedLM(config()).to(dtype).train()
    ids, mask, of_globals = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)

    def run(model):
        out = model(ids, attention_mask=mask, global_attention_mask=of_globals, labels=labels)
        return {"logits": out.logits, "loss": out.loss}

    report = against_stock(model, run)
    for layer in range(2):
        change = report["longformer." + ATTENTION.format(layer)]
        assert "global_attention" in change.changed
        assert change.left == "output_attentions"


@pytest.mark.parametrize("dtype", DTYPES)
def test_question_answering(dtype, against_stock):
    """The question, up to the first separator, is global: the model makes that mask itself."""
    model = transformers.LongformerForQuestionAnswering(config(sep_token_id=2)).to(dtype).train()
    ids, mask, _ = tokens(64)
    for row, length in enumerate((6, 9)):
        ids[row, length] = 2
        ids[row, [-40, -39]] = 2
    positions = {"start_positions": torch.tensor([20, 12]), "end_positions": torch.tensor([22, 30])}

    def run(model):
        out = model(ids, attention_mask=mask, **positions)
        return {"start": out.start_logits, "end": out.end_logits, "loss": out.loss}

    against_stock(model, run)


def test_led(against_stock):
    """The encoder of LED is Longformer's attention; its decoder is plain."""
    options = {"vocab_size": 100, "d_model": 48, "encoder_layers": 2, "decoder_layers": 1, "attention_window": 8}
    options |= {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    options |= {"max_encoder_position_embeddings": 96, "dropout": 0.0}
    options |= {"max_decoder_position_embeddings": 32, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**options)).train()
    ids, mask, of_globals = tokens()
    labels = ids[:, :10].contiguous()

    def run(model):
        out = model(ids, attention_mask=mask, global_attention_mask=of_globals, labels=labels)
        return {"logits": out.logits, "loss": out.loss}

    report = against_stock(model, run)
    assert "global_attention" in report["led.encoder.layers.1.self_attn.longformer_self_attn"].changed


@pytest.mark.parametrize(
    ("length", "padded", "globals_at"),
    [
        pytest.param(48, 0, (), id="no globals, no padding"),
        pytest.param(50, 30, (), id="padding only"),
        pytest.param(16, 0, ((0,), (15,)), id="one window, globals at the ends"),
        pytest.param(40, 8, ((), (1, 2, 3, 4)), id="one row without globals"),
        pytest.param(32, 4, (range(32), range(20)), id="all global"),
    ],
)
def test_shapes(length, padded, globals_at, against_stock):
    model = transformers.LongformerModel(config()).eval()
    ids, mask, of_globals = tokens(length, 2, padded, globals_at)

    def run(model):
        out = model(ids, attention_mask=mask, global_attention_mask=of_globals)
        # rows of padding too
        return {"hidden": out.last_hidden_state, "pooled": out.pooler_output}

    against_stock(model, run, backward=False)


def test_runs_on_the_op(monkeypatch):
    """No comparison would notice a patched model that still ran the stock code."""
    seen = []

    def spy(*args, **options):
        seen.append((args[3].shape[1], options["window"]))
        return tilefuse.global_attention(*args, **options)

    monkeypatch.setattr(integration.longformer, "global_attention", spy)
    model = transformers.LongformerModel(config()).eval()
    ids, mask, of_globals = tokens()
    with torch.no_grad():
        model(ids, attention_mask=mask, global_attention_mask=of_globals)
        assert not seen
        integration.patch(model)
        model(ids, attention_mask=mask, global_attention_mask=of_globals)
        model(ids)
    assert seen == [(3, (4, 4)), (3, (8, 8)), (0, (4, 4)), (0, (8, 8))]


def test_attention_weights_come_from_the_stock_path():
    model = transformers.LongformerModel(config()).eval()
    ids, mask, of_globals = tokens()
    inputs = {"attention_mask": mask, "global_attention_mask": of_globals, "output_attentions": True}
    with torch.no_grad():
        expected = model(ids, **inputs)
        integration.patch(model)
        got = model(ids, **inputs)
    for name in ("attentions", "global_attentions"):
        for a, b in zip(got[name], expected[name], strict=True):
            assert_bit_equal(a, b)
    assert_bit_equal(got.last_hidden_state, expected.last_hidden_state)


def test_attention_dropout_in_training_is_the_stock_path():
    model = transformers.LongformerForMaskedLM(config(attention_probs_dropout_prob=0.25)).train()
    ids, mask, of_globals = tokens()

    def run():
        torch.manual_seed(3)
        return model(ids, attention_mask=mask, global_attention_mask=of_globals, labels=ids).loss

    expected = run()
    report = integration.patch(model)
    assert report["longformer." + ATTENTION.format(0)].left == "output_attentions and training (attention dropout 0.25)"
    assert_bit_equal(run(), expected)


def test_gradient_checkpointing():
    ids, mask, of_globals = tokens()
    model = transformers.LongformerForMaskedLM(config()).train()
    integration.patch(model)

    def run():
        model.zero_grad()
        model(ids, attention_mask=mask, global_attention_mask=of_globals, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    model.gradient_checkpointing_enable()
    for name, grad in run().items():
        assert_bit_equal(grad, expected[name], name=name)


def test_autocast(against_stock):
    model = transformers.LongformerForMaskedLM(config()).eval()
    ids, mask, of_globals = tokens()

    def run(model):
        # the oracle is a float64 model, which autocast would cast down
        enabled = next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return {"logits": model(ids, attention_mask=mask, global_attention_mask=of_globals).logits}

    against_stock(model, run, backward=False)


def test_copies_and_state_dict():
    model = transformers.LongformerModel(config()).eval()
    ids, _, of_globals = tokens(padded=0)
    with torch.no_grad():
        stock = model(ids, global_attention_mask=of_globals).last_hidden_state
        integration.patch(model)
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.zero_()
        patched = model(ids, global_attention_mask=of_globals).last_hidden_state
        # the copy runs on its own weights
        assert not torch.equal(other(ids, global_attention_mask=of_globals).last_hidden_state, patched)
        other.load_state_dict(model.state_dict())
        assert_bit_equal(other(ids, global_attention_mask=of_globals).last_hidden_state, patched)
        assert_bit_equal(integration.unpatch(other)(ids, global_attention_mask=of_globals).last_hidden_state, stock)


def test_a_subclass_with_another_forward_is_left():
    model = transformers.LongformerModel(config(attention_window=[8, 8]))
    attention = model.encoder.layer[1].attention.self

    class Other(type(attention)):
        def forward(self, hidden_states, *args, **kwargs):
            return (hidden_states,)

    attention.__class__ = Other
    report = integration.patch(model)
    assert report[ATTENTION.format(0)].changed
    assert report.left[ATTENTION.format(1)] == "Other has a forward of its own"
    assert not report[ATTENTION.format(1)].changed
