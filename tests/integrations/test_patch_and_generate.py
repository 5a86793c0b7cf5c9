"""examples/patch_and_generate.py and the examples in docstrings, run as a user would."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "patch_and_generate.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="needs a source checkout")


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_random_weights():
    arguments = ("--layers", "2", "--prompt-tokens", "24", "--new-tokens", "6", "--dtype", "float32")
    code, out, error = run(str(EXAMPLE), "--kind", "gpt-oss", *arguments)
    assert code == 0, error
    assert "6 of 6 known modules run on tilefuse" in out
    assert "the first 6 of 6 tokens are the same" in out
    assert "tokens/s" in out


@pytest.mark.slow
def test_wrong_kind():
    code, _, error = run(str(EXAMPLE), "--kind", "gpt-5")
    assert code == 1 and "--kind must be one of qwen3" in error


def test_docstrings(capsys):
    from tilefuse.integrations import transformers as integration

    for function in (integration.register, integration.patch, integration.unpatch):
        code = textwrap.dedent(function.__doc__.split("Example::\n")[1])
        exec(compile(code, function.__name__, "exec"), {})
    assert "2 of 2 known modules run on tilefuse" in capsys.readouterr().out
