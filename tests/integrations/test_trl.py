"""TRL's trainers over a patched model: the losses and parameters that they come to over a stock one."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")
pytest.importorskip("trl", reason="needs trl (requirements-dev.txt)")

import datasets
import tokenizers
import transformers

import tilefuse
from tilefuse.integrations.transformers import patch

from .conftest import tiny_model

WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(autouse=True)
def _auto_backend():
    tilefuse.backend("auto")


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def rows(field):
    return datasets.Dataset.from_list(
        [{field: " ".join(WORDS[(7 * i + 3 * j) % 90] for j in range(4 + i % 5))} for i in range(12)]
    )


def options(folder):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 0,
    }


def sft(model, folder):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**options(folder), max_length=16, gradient_accumulation_steps=2, dataset_num_proc=None)
    return SFTTrainer(model, args, train_dataset=rows("text"), processing_class=tokenizer())


def shortness(completions, **more):
    return [-float(len(set(completion.split()))) for completion in completions]


def grpo(model, folder):
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(**options(folder), num_generations=4, max_completion_length=6, beta=0.0, temperature=0.9)
    return GRPOTrainer(model, shortness, args, train_dataset=rows("prompt"), processing_class=tokenizer())


@pytest.mark.parametrize("trainer", [sft, grpo], ids=["sft", "grpo"])
def test_three_steps(trainer, tmp_path):
    found = []
    stock = tiny_model("llama")
    model = copy.deepcopy(stock)
    report = patch(model, loss=True, norm=True)
    assert report[""].changed == "loss"
    for each in (stock, model):
        torch.manual_seed(0)
        made = trainer(each, tmp_path)
        made.train()
        found.append([line for line in made.state.log_history if "loss" in line])
    names = [n for n in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "reward", "kl") if n in found[0][0]]
    assert {"loss", "grad_norm", "entropy"} <= {*names} and len(found[0]) == len(found[1]) == 3
    for line, expected in zip(found[1], found[0]):
        for name in names:
            assert float(line[name]) == pytest.approx(float(expected[name]), rel=1e-3, abs=1e-5), name
    before = tiny_model("llama")
    for a, b, c in zip(model.parameters(), stock.parameters(), before.parameters()):
        moved = (b.detach() - c).abs().max()
        assert moved > 0 and (a.detach() - b.detach()).abs().max() <= 0.05 * moved
