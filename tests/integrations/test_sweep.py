"""Every language architecture of transformers, tiny, stock and patched (``tilefuse.testing.sweep``).

The verified list is what this sweep passed. Rows that ran are kept in build/sweep and not run again until the
integration changes; ``python -m tilefuse.testing.sweep merge`` writes the list from there.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

import transformers

from tilefuse.integrations import transformers as integration
from tilefuse.testing import sweep
from tilefuse.testing.sweep import __main__ as command
from tilefuse.testing.sweep import record
from tilefuse.testing.sweep.check import compare

ROOT = Path(__file__).resolve().parents[2]
ROWS = {row.name: row for row in sweep.architectures()}
LIST = json.loads(record.VERIFIED.read_text())
LLAMA = ROWS["llama-LlamaForCausalLM"]

of_the_list = pytest.mark.skipif(
    ".".join(transformers.__version__.split(".")[:2]) not in LIST["transformers"],
    reason=f"the verified list is of transformers {', '.join(LIST['transformers'])}",
)


@pytest.fixture(autouse=True)
def _auto_backend():
    import tilefuse

    tilefuse.backend("auto")


@of_the_list
@pytest.mark.parametrize("name", sweep.QUICK)
def test_one_of_every_kind(name):
    done = sweep.check(ROWS[name])
    assert done.status == "passed", done.failures
    assert done.swapped == LIST["rows"][name]["runs"] and done.left == LIST["rows"][name]["left"]


def rows():
    """A row whose fault is known must still have it, else the list is not up to date."""
    for name in ROWS:
        marks = [pytest.mark.xfail(strict=True, reason=str(LIST["failed"][name]))] if name in LIST["failed"] else []
        yield pytest.param(name, marks=marks)


@of_the_list
@pytest.mark.slow
@pytest.mark.parametrize("name", list(rows()))
def test_architecture(name):
    done = record.run(ROWS[name], ROOT / record.FOLDER)
    if done.status.startswith("not "):
        assert name in LIST["not_run"], done.status
        pytest.skip(done.status)
    assert done.status == "passed", done.failures
    assert done.verified == LIST["rows"][name]["verified"] and done.swapped == LIST["rows"][name]["runs"]


@of_the_list
def test_the_list_holds_every_architecture():
    assert {*LIST["rows"], *LIST["failed"], *LIST["not_run"]} == set(ROWS)
    assert {row.class_name for row in ROWS.values()} >= {
        name
        for kind in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
        for names in getattr(transformers.models.auto.modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values()
        for name in ([names] if isinstance(names, str) else names)
    }


def test_a_fault_is_seen(monkeypatch):
    """One weight off by a thousandth; and the bits of unpatch are compared too."""

    def wrong(model):
        with torch.no_grad():
            model.lm_head.weight[5] *= 1.001
        return integration.Report({})

    monkeypatch.setattr(integration, "patch", wrong)
    done = sweep.check(LLAMA, only=("plain", "greedy", "gradients"))
    assert done.status == "failed"
    assert {"plain", "greedy", "gradients", "unpatch"} == set(done.failures)
    assert "largest value" in done.failures["plain"]


def test_a_model_that_cannot_run_says_so(monkeypatch):
    def wrong(model):
        raise ValueError("no")

    monkeypatch.setattr(integration, "patch", wrong)
    assert sweep.check(LLAMA, only=("plain",)).failures == {"patch": "ValueError: no"}
    unknown = dataclasses.replace(LLAMA, class_name="LlamaForNothing")
    assert sweep.check(unknown).status.startswith("not built: AttributeError")


def tokens(*rows):
    """Results of generating: the best token of each step is where its logit is."""
    rows = torch.tensor(rows)
    return {"tokens": rows, "steps": 5.0 * torch.nn.functional.one_hot(rows, 8)}


def test_compare():
    x = torch.arange(1.0, 5.0)
    off = x + torch.tensor([0, 0, 0, 1e-3])
    assert compare({"logits": x}, {"logits": x}) == (0.0, 0.0, "")
    assert "off by 0.00025" in compare({"logits": off}, {"logits": x})[2]
    # stock's own noise excuses, but not if stock contradicts itself
    assert not compare({"logits": off}, {"logits": x}, {"logits": x + 3e-4})[2]
    assert compare({"logits": off}, {"logits": x}, {"logits": -x})[2]
    assert not compare({"logits": off}, {"logits": x}, None, 1e-4)[2]
    assert compare({"logits": x.where(x < 4, torch.nan)}, {"logits": x})[2]
    assert compare({"logits": x.double()}, {"logits": x})[2] and compare({"logits": x[:2]}, {"logits": x})[2]
    assert compare({}, {"logits": x})[2]
    assert compare({"number": torch.tensor(1)}, {"number": torch.tensor(2)})[2]
    graphs = [{"graphs": torch.tensor(n)} for n in (1, 2)]
    assert compare(graphs[1], graphs[0])[2] == "2 graphs, stock 1" and not compare(*graphs)[2]


def test_compare_tokens():
    stock = tokens([1, 2, 3], [4, 5, 6])
    assert not compare(tokens([1, 2, 3], [4, 5, 6]), stock)[2]
    assert "parts at step 1" in compare(tokens([1, 2, 3], [4, 7, 6]), stock)[2]
    # a tie: what follows another choice is not compared
    stock["steps"][1, 1, 7] = 5.0
    ours = tokens([1, 2, 3], [4, 7, 1])
    ours["steps"][1, 1, 5] = 5.0
    assert not compare(ours, stock)[2]


def test_records(tmp_path, monkeypatch, capsys):
    ran = []

    def check(row, unverified=False, compiled=False):
        ran.append((row.name, unverified))
        status = "failed" if row.model_type == "git" and unverified else "passed"
        types = [row.model_type, f"{row.model_type}_inside"]
        modes = {"plain": "off" if status == "failed" else ""}
        done = sweep.Record(row.name, row.model_type, row.class_name, [], status, unverified, types, modes=modes)
        done.versions = {"transformers": "5.23.0"}
        return done

    monkeypatch.setattr(record, "check", check)
    monkeypatch.setattr(record, "VERIFIED", tmp_path / "verified.json")
    arguments = ["--folder", str(tmp_path / "rows"), "run", LLAMA.name, "git-GitForCausalLM"]
    assert command.main(arguments) == 0
    # what is wrong is left, and tried again as a user would have it
    assert ran == [("git-GitForCausalLM", True), ("git-GitForCausalLM", False), (LLAMA.name, True)]
    assert command.main(arguments) == 0 and len(ran) == 3
    monkeypatch.setattr(record, "fingerprint", lambda: "other")
    assert command.main(arguments) == 0 and len(ran) == 6
    assert command.main(["--folder", str(tmp_path / "rows"), "merge"]) == 0
    found = json.loads((tmp_path / "verified.json").read_text())
    assert found["types"] == ["llama", "llama_inside"] and found["transformers"] == ["5.23"]
    assert found["rows"]["git-GitForCausalLM"]["verified"] is False and not found["failed"]
    assert "attention left" in capsys.readouterr().out


def test_the_page_says_what_the_list_says():
    path = ROOT / "docs" / "tools" / "tables.py"
    if not path.exists():
        pytest.skip("needs a source checkout")
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("tables", path)
        tables = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tables)
    finally:
        sys.path.remove(str(path.parent))
    lines = tables.sweep().splitlines()
    cells = {line.split("|")[1].strip(" `"): line for line in lines if line.startswith("| `")}
    assert set(cells) == {*LIST["rows"], *LIST["failed"], *LIST["not_run"]}
    for name, row in LIST["rows"].items():
        assert f"| {row['modes']} | {row['difference']:.1e} | {row['noise']:.1e} |" in cells[name]
        assert all(part.split(" (")[0].split(", ")[0] in cells[name] for part in row["runs"])
    assert "<!-- table: sweep -->" in (ROOT / "docs" / "patch.md").read_text()
