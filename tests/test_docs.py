"""The documentation says what is true: its code runs, its messages are real, and it builds without a warning."""

import contextlib
import html
import importlib.util
import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tilefuse.benchmarks import records, report

import tilefuse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
# a Python block, the comment before it, and the text block after it
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?"
    r"```python(?P<options>[^\n]*)\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<text>.*?)```)?",
    re.DOTALL,
)
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def blocks(page):
    return list(BLOCK.finditer(page.read_text()))


def small_model(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    assert name == "Qwen/Qwen3-30B-A3B"
    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **small))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_code_of_a_page_runs(page, monkeypatch, tmp_path):
    """Blocks of a page share their names, as a reader who types them in has it; the text after one is what it says."""
    monkeypatch.chdir(tmp_path)
    if "transformers" in page.read_text():
        transformers = pytest.importorskip("transformers", reason="the page uses transformers")
        # README loads a checkpoint: here a small model of that kind, without network
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small_model)
    torch.manual_seed(0)
    names = {"__name__": page.stem}
    ran = 0
    for block in blocks(page):
        if block["reason"]:
            continue
        # the line numbers of the page in the traceback
        line = page.read_text()[: block.start("code")].count("\n")
        code = compile("\n" * line + block["code"], str(page), "exec")
        said = io.StringIO()
        ran += 1
        if "raises" in block["options"]:
            with pytest.raises(Exception) as caught, contextlib.redirect_stdout(said):
                exec(code, names)
            said.write(f"{type(caught.value).__name__}: {caught.value}")
        else:
            with contextlib.redirect_stdout(said):
                exec(code, names)
        if block["text"] is not None:
            assert said.getvalue().split() == block["text"].split()
    assert ran


def test_a_false_statement_in_a_page_is_seen(tmp_path):
    page = tmp_path / "wrong.md"
    page.write_text("```python\nassert 1 + 1 == 3\n```\n")
    (block,) = blocks(page)
    with pytest.raises(AssertionError):
        exec(block["code"], {})
    page.write_text("<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n\n```text\nout\n```\n")
    (block,) = blocks(page)
    assert block["reason"] == "needs a GPU" and block["text"] == "out\n"


def mkdocs(root, site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@needs_mkdocs
@pytest.mark.xdist_group("docs")
def test_every_page_is_built(site):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    assert pages == set(re.findall(r": ([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))


@needs_mkdocs
@pytest.mark.xdist_group("docs")
def test_the_site_needs_no_network(site):
    """Scripts, styles, fonts and pictures are its own; other sites are only linked to."""
    for page in site.glob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]* rel=[\"']?(?:stylesheet|preload|preconnect|icon)[\"']?[^>]*>", text)
        assert loaded
        assert not [tag for tag in loaded if "//" in tag], page.name


@needs_mkdocs
@pytest.mark.xdist_group("docs")
def test_what_is_generated_is_there(site):
    """Each kind of content that the build makes of the code."""
    everything = "".join(page.read_text() for page in site.glob("*.html"))
    support = (site / "support.html").read_text()
    for op in tilefuse.ops().values():
        # a family's page need not have its name
        assert f'id="{op.function.__module__}.{op.name}"' in everything, op.name
        assert f">{op.name}</code></a>" in support
    assert "<!-- table:" not in everything and "arithmatex" not in everything and "--8&lt;--" not in everything
    assert everything.count("<math") > 30
    pictures = set(re.findall(r'src="(pictures/[\w-]+\.svg)"', everything))
    assert len(pictures) > 10
    assert all((site / picture).stat().st_size > 1000 for picture in pictures)
    benchmarks = (site / "benchmarks.html").read_text()
    lines = [line for file in sorted(records.results_folder().glob("*.jsonl")) for line in records.read_lines(file)]
    assert all(html.escape(line["name"], quote=False) in benchmarks for line in lines)
    # docstrings are Markdown by then
    assert "Example::" not in everything and "<p>====" not in everything


@needs_mkdocs
def test_broken_links_fail_the_build(tmp_path):
    """A small site with the settings of the real one, of pages that link to nothing."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "index.md").write_text("# Page\n\n[a](nowhere.md) [b](rope.md#noheading) ![c](pictures/nothing.svg)\n")
    (folder / "rope.md").write_text("# Rope\n")
    text = (ROOT / "mkdocs.yml").read_text()
    validation = text[text.index("validation:") : text.index("hooks:")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: copy\ntheme: {{ name: mkdocs }}\nplugins: []\n{validation}")
    done = mkdocs(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for broken in ("nowhere.md", "noheading", "nothing.svg"):
        assert broken in done.stderr


@needs_mkdocs
def test_unknown_tables_and_pictures_fail_the_build(tmp_path):
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File, Files

    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/tools/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    assert "656" not in hooks.on_page_markdown("<!-- table: cache_row bf16 -->", page, None, None)
    assert "528 .. 655" in hooks.on_page_markdown("<!-- table: cache_row fp8 -->", page, None, None)
    with pytest.raises(PluginError, match="no table 'nothing'"):
        hooks.on_page_markdown("<!-- table: nothing -->", page, None, None)
    (tmp_path / "page.md").write_text("![](pictures/nothing.svg)")
    file = File("page.md", str(tmp_path), str(tmp_path / "site"), False)
    with pytest.raises(PluginError, match="no picture 'nothing'"):
        hooks.on_files(Files([file]), None)
    formula = hooks.on_page_content('<span class="arithmatex">\\(a &lt; b^2\\)</span>', page, None, None)
    assert formula.startswith("<math") and "<msup>" in formula


def test_readme_holds_what_is_stored():
    """Op table and numbers of README and of the page of benchmarks are those of the registry and the result files."""
    text = (ROOT / "README.md").read_text()
    lines = [line for file in sorted(records.results_folder().glob("*.jsonl")) for line in records.read_lines(file)]
    (plot,) = re.findall(r"\]\((benchmarks/results/\w+\.png)\)", text)
    assert (ROOT / plot).exists()
    renewed = report.readme(text, tilefuse.ops(), lines, [plot])
    assert renewed == text, "python -m tilefuse bench --readme"
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert report.page(page, lines) == page, "python -m tilefuse bench --readme"


def test_links_of_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
