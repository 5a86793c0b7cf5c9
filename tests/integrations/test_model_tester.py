"""Hugging Face's own model tests (``ModelTesterMixin``) on patched models.

They are in the source distribution of transformers, not in its wheel: fetched once with pip, into build/. What passes
with stock must pass with every model patched as soon as it is made, be it empty on the meta device.
"""

import functools
import importlib
import random
import re
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

import transformers

from tilefuse.integrations.transformers import patch
from tilefuse.testing.sweep.architectures import Architecture, tiny_config

CACHE = Path(__file__).resolve().parents[2] / "build" / "transformers-tests" / transformers.__version__
PACKAGE = "transformers_tests"
MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "bert": "BertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}
# asks whether Hugging Face's own experts functions were called
OF_THE_NAME = "test_eager_matches_batched_and_grouped_inference"


def _pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot fetch Hugging Face's tests: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def mixin(pytestconfig):
    """The class, imported from the source distribution."""
    version = transformers.__version__
    folder = CACHE / PACKAGE
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        _pip("download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", "transformers", "-d", str(CACHE),
             f"transformers=={version}")  # fmt: skip
        _pip("install", "-q", "--no-deps", "--target", str(CACHE), "parameterized")
        with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
            tests = [m for m in archive.getmembers() if m.name.startswith(f"transformers-{version}/tests/")]
            archive.extractall(CACHE, tests, filter="data")
        (CACHE / f"transformers-{version}" / "tests").rename(folder)
    for file in folder.glob("*.py"):
        # this project knows its marks by name
        for mark in set(re.findall(r"mark\.(\w+)", file.read_text())):
            pytestconfig.addinivalue_line("markers", f"{mark}: of transformers")
    # two of its bases are tests of other things, and not in the distribution
    for name, base in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        for path in (name.partition(".")[0], name):
            sys.modules.setdefault(f"{PACKAGE}.{path}", types.ModuleType(f"{PACKAGE}.{path}"))
        setattr(sys.modules[f"{PACKAGE}.{name}"], base, type(base, (), {}))
    sys.path.insert(0, str(CACHE))
    try:
        return importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
    finally:
        sys.path.remove(str(CACHE))


class Tester:
    """What the mixin asks about sizes and inputs."""

    __test__ = False
    batch_size, seq_length = 3, 7
    is_training = True

    def __init__(self, model_type):
        self.model_type = model_type
        config = self.get_config()
        self.encoder_seq_length = self.key_length = self.seq_length
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(config, name))

    def get_config(self):
        return tiny_config(Architecture(self.model_type, MODELS[self.model_type], ()))

    def prepare_config_and_inputs_for_common(self):
        # Hugging Face's testers draw from Python's generator, which its tests seed
        generator = torch.Generator().manual_seed(random.randrange(2**31))
        ids = torch.randint(3, 96, (self.batch_size, self.seq_length), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def suite_of(mixin, model_type):
    """All of the mixin's tests for one model type."""

    class Tests(mixin, unittest.TestCase):
        all_model_classes = (getattr(transformers, MODELS[model_type]),)

        def setUp(self):
            self.model_tester = Tester(model_type)

    tests = unittest.TestLoader().loadTestsFromTestCase(Tests)
    return [test for test in tests if not test._testMethodName.startswith(OF_THE_NAME)]


def failures(tests):
    """Test name -> the end of its traceback."""
    result = unittest.TestResult()
    unittest.TestSuite(tests).run(result)
    return {test._testMethodName: trace.strip()[-1500:] for test, trace in result.failures + result.errors}, result


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_what_passes_stock_passes_patched(mixin, model_type, monkeypatch):
    model_class = getattr(transformers, MODELS[model_type])
    initialise, count = model_class.__init__, 0

    @functools.wraps(initialise)
    def init(self, *args, **kwargs):
        nonlocal count
        initialise(self, *args, **kwargs)
        count += any("attention" in change for change in patch(self).changed.values())

    with monkeypatch.context() as patching:
        patching.setattr(model_class, "__init__", init)
        wrong, result = failures(suite_of(mixin, model_type))
    assert result.testsRun - len(result.skipped) > 50 and count > 20
    # stock is asked only where it matters
    stock, _ = failures(test for test in suite_of(mixin, model_type) if test._testMethodName in wrong)
    wrong = {name: trace for name, trace in wrong.items() if name not in stock}
    assert not wrong, "\n\n".join(f"{name}\n{trace}" for name, trace in wrong.items())
