"""BigBird patched against BigBird as it is."""

import copy

import numpy as np
import pytest
import torch

import tilefuse
from tilefuse.testing import assert_bit_equal

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("tilefuse.integrations.transformers")

DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = "bert.encoder.layer.{}.attention.self"


def config(heads=3, block=8, num_random=2, length=256, **changes):
    options = {"vocab_size": 100, "hidden_size": 12 * heads, "num_attention_heads": heads, "num_hidden_layers": 2}
    options |= {"intermediate_size": 64, "block_size": block, "num_random_blocks": num_random}
    options |= {"max_position_embeddings": length, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BigBirdConfig(**options | changes)


def tokens(length, padded=True):
    """Padding at both ends of one row, at the left of the other; the model itself pads to whole blocks."""
    ids = torch.randint(3, 100, (2, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        mask[1, :10] = 0
        mask[1, length - length // 4 :] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        # more blocks than the plan for few, the plan for many, and the lengths of the paper's own plan
        pytest.param(83, {"block": 8, "num_random": 2}, id="short plan"),
        pytest.param(150, {"block": 8, "num_random": 2}, id="long plan"),
        pytest.param(1024, {"heads": 2, "block": 64, "num_random": 3, "length": 1024}, id="1024"),
    ],
)
def test_masked_lm(length, options, train, dtype, against_stock):
    model = transformers.BigBirdForMaskedLM(config(**options)).to(dtype).train(train)
    ids, mask = tokens(length)

    def run(model):
        out = model(ids, attention_mask=mask, labels=ids)
        return {"logits": out.logits, "loss": out.loss}

    # sums over 2048 tokens in bfloat16 are luck: there the gradients of shorter inputs say more
    report = against_stock(model, run, backward=length < 1024 or dtype == torch.float32)
    assert model.bert.attention_type == "block_sparse"
    for layer in range(2):
        assert "block_sparse_attention" in report[ATTENTION.format(layer)].changed
        assert report.left[ATTENTION.format(layer)] == "output_attentions"


@pytest.mark.parametrize("padded", [False, True])
def test_question_answering(padded, against_stock):
    model = transformers.BigBirdForQuestionAnswering(config(heads=2, num_random=1)).train()
    ids, mask = tokens(96, padded)
    ids[:, 12] = model.config.sep_token_id
    positions = {"start_positions": torch.tensor([20, 30]), "end_positions": torch.tensor([22, 33])}

    def run(model):
        out = model(ids, attention_mask=mask, question_lengths=torch.tensor([[13], [13]]), **positions)
        return {"start": out.start_logits, "end": out.end_logits, "loss": out.loss}

    against_stock(model, run)


def dense(row_offsets, col_index, blocks):
    """How often each pair of blocks is listed, ``[H, blocks, blocks]``."""
    heads = row_offsets.shape[1]
    counts = torch.zeros(heads, blocks, blocks, dtype=torch.int64)
    for h in range(heads):
        for i in range(blocks):
            for j in col_index[row_offsets[0, h, i] : row_offsets[0, h, i + 1]].tolist():
                counts[h, i, j] += 1
    return counts


def test_lists_in_evaluation():
    """Block 0 counts once as the global block and ``num_random_blocks`` times as a random one."""
    row_offsets, col_index = integration.bigbird._evaluation_lists(9, 3, torch.device("cpu"))
    counts = dense(row_offsets, col_index, 9)[0]
    expected = torch.zeros(9, 9, dtype=torch.int64)
    expected[0] = expected[-1] = 1
    for i in range(1, 8):
        expected[i, [0, i - 1, i, i + 1, 8]] = 1
        expected[i, 0] += 3
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("length", [80, 144, 1024])
def test_lists_in_training_are_the_stock_ones(length, monkeypatch):
    """Attention weights of the stock module say which blocks it saw; NumPy's generator must not notice either."""
    options = {"block": 64, "length": 1024} if length == 1024 else {"block": 8}
    model = transformers.BigBirdModel(config(heads=2, **options)).train()
    module = model.encoder.layer[1].attention.self
    seen = []
    stock_mask = type(module)._create_rand_mask_from_inputs

    def spy(from_mask, to_mask, rand_attn, *args):
        seen.append(rand_attn[0])
        return stock_mask(from_mask, to_mask, rand_attn, *args)

    monkeypatch.setattr(type(module), "_create_rand_mask_from_inputs", staticmethod(spy))
    ids, _ = tokens(length, padded=False)
    model(ids)
    after = np.random.random(3)
    blocks = length // module.block_size
    for again in range(2):
        np.random.seed(again)
        row_offsets, col_index = integration.bigbird._training_lists(module, length, torch.device("cpu"))
        assert np.array_equal(np.random.random(3), after)
        fixed, _ = integration.bigbird._lists(np.zeros((2, blocks - 2, 0), dtype=np.int64), torch.device("cpu"))
        counts = dense(row_offsets, col_index, blocks)
        drawn = torch.zeros_like(counts)
        drawn[:, 1:-1].scatter_add_(2, seen[1], torch.ones_like(seen[1]))
        assert torch.equal((counts - drawn).sum(2), fixed.diff(dim=2)[0].long())
        assert (counts - drawn).min() == 0
        assert (counts - drawn).max() == 1


def test_runs_on_the_op(monkeypatch):
    seen = []

    def spy(*args, **options):
        seen.append(options["block_size"])
        return tilefuse.block_sparse_attention(*args, **options)

    monkeypatch.setattr(integration.bigbird, "block_sparse_attention", spy)
    model = transformers.BigBirdModel(config()).eval()
    ids, mask = tokens(150)
    with torch.no_grad():
        model(ids, attention_mask=mask)
        assert not seen
        integration.patch(model)
        model(ids, attention_mask=mask)
        model.train()(ids)
    assert seen == [8] * 4


@pytest.mark.parametrize("by_config", [False, True])
def test_attention_weights_come_from_the_stock_path(by_config):
    model = transformers.BigBirdModel(config()).eval()
    ids, mask = tokens(150)
    integration.patch(model)
    other = copy.deepcopy(model)
    integration.unpatch(model)
    if by_config:
        model.config.output_attentions = other.config.output_attentions = True
    asked = {} if by_config else {"output_attentions": True}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, **asked)
        got = other(ids, attention_mask=mask, **asked)
    assert len(got.attentions) == 2
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert_bit_equal(a, b)
    assert_bit_equal(got.last_hidden_state, expected.last_hidden_state)


def test_a_short_input_swaps_in_full_attention_for_good():
    """The stock model replaces its attention modules then, the patched ones too; it must go on like the stock one."""
    model = transformers.BigBirdModel(config()).eval()
    stock = copy.deepcopy(model)
    integration.patch(model)
    long, short = tokens(150), tokens(40)
    with torch.no_grad():
        for ids, mask in (short, long):
            got = model(ids, attention_mask=mask).last_hidden_state
            assert_bit_equal(got, stock(ids, attention_mask=mask).last_hidden_state)
        assert model.attention_type == "original_full"
        integration.unpatch(model)
        assert_bit_equal(model(ids, attention_mask=mask).last_hidden_state, got)
        # back to sparse modules, which are new ones: patching again finds them
        for each in (model, stock):
            each.set_attention_type("block_sparse")
        report = integration.patch(model)
        assert report["encoder.layer.0.attention.self"].changed
        got = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got, stock(ids, attention_mask=mask).last_hidden_state)


def test_full_attention_is_left():
    report = integration.patch(transformers.BigBirdModel(config(attention_type="original_full")))
    assert "original_full" in report.left["encoder.layer.0.attention.self"]
    assert not report.changed


def test_gradient_checkpointing():
    model = transformers.BigBirdForMaskedLM(config()).train()
    ids, mask = tokens(150)
    integration.patch(model)

    def run():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    model.activation_checkpointing_enable()
    for name, grad in run().items():
        assert_bit_equal(grad, expected[name], name=name)
