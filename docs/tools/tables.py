"""The tables of the documentation, each made from the registry, the result files or what a function returns.

A function ``name(*words)`` fills the comment ``<!-- table: name words -->`` of a page with Markdown.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pictures
import torch
from tilefuse.benchmarks import records, report

import tilefuse
from tilefuse import cli, library
from tilefuse.ops.mla.layout import GROUP, RowLayout
from tilefuse.testing.sweep import record as sweep_record

FAMILIES = {
    "rope": "rope.md",
    "fp8": "fp8.md",
    "moe": "moe.md",
    "mla": "mla.md",
    "attention": "attention.md",
    "loss": "losses.md",
    "norm": "norms.md",
    "lowbit": "lowbit.md",
}


def _lines() -> list[dict[str, Any]]:
    return [line for file in sorted(records.results_folder().glob("*.jsonl")) for line in records.read_lines(file)]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def support(family: str = "") -> str:
    """One table per family: what each op takes, on what it runs, and what differentiates."""
    out = []
    for name in [family] if family else FAMILIES:
        rows = []
        for op in sorted((op for op in tilefuse.ops().values() if op.family == name), key=lambda op: op.name):
            verified = [f"{backend} on {', '.join(archs)}" for backend, archs in op.architectures.items() if archs]
            rows.append(
                [
                    f"[`{op.name}`]({FAMILIES[name]}#{_anchor(op.function)})",
                    ", ".join(f"`{arg}`" for arg in op.differentiable) or "-",
                    ", ".join(_dtype(dtype) for dtype in op.dtypes),
                    *("yes" if backend in op.backends else "-" for backend in ("reference", "cpu", "triton", "cuda")),
                    "; ".join(verified) or "none yet",
                ]
            )
        header = ["op", "gradients for", "dtypes", "reference", "C++ CPU", "Triton", "CUDA C++", "verified on a GPU"]
        out.append(("" if family else f"### {report.TITLES[name]}\n\n") + report.markdown_table(header, rows))
    return "\n\n".join(out)


def _anchor(function: Any) -> str:
    return f"{function.__module__}.{function.__name__}"


def api(*names: str) -> str:
    """The reference of a family's ops, or of functions given by their paths, from their docstrings."""
    if len(names) == 1 and names[0] in FAMILIES:
        ops = sorted((op for op in tilefuse.ops().values() if op.family == names[0]), key=lambda op: op.name)
        entries = [(f"tilefuse.{op.name}", _anchor(op.function)) for op in ops]
    else:
        entries = []
        for path in names:
            shown = path
            if path.startswith("tilefuse.") and path.count(".") == 1:
                path = _anchor(getattr(tilefuse, path.removeprefix("tilefuse.")))
            entries.append((shown, path))
    return "\n\n".join(
        f'::: {path}\n    options:\n      heading: "{shown}"\n      toc_label: "{shown.removeprefix("tilefuse.")}"'
        for shown, path in entries
    )


def counts() -> str:
    """How many ops and kernels there are."""
    ops = tilefuse.ops()
    backward = sum(bool(op.differentiable) for op in ops.values())
    return f"{len(ops)} ops, {backward} of them differentiable, on {len(library.kernels())} kernels."


def window_conventions() -> str:
    """What a window of 8 means elsewhere, as `window_from` and the mask of `window_attention` say it."""
    elsewhere = {
        "flash_attention": "FlashAttention 2 and 3, `window_size=(L, R)`",
        "hf": "Hugging Face `sliding_window`",
        "mistral": "Mistral, vLLM",
        "gpt_oss": "gpt-oss",
        "xformers": "xFormers `LocalAttentionMask`",
        "hf_bidirectional": "Hugging Face, bidirectional, mask path",
        "hf_bidirectional_flash": "Hugging Face, bidirectional, flash path",
        "gemma3_bidirectional": "Gemma 3 bidirectional",
        "longformer": "Hugging Face Longformer `attention_window` (total)",
        "longformer_one_sided": "Longformer, allenai's code (one side)",
        "attention_gym": "attention-gym `generate_sliding_window`",
        "flashinfer": "FlashInfer `window_left`",
    }
    rows = []
    for source, where in elsewhere.items():
        size: Any = (8, 0) if source == "flash_attention" else 8
        window = tilefuse.window_from(source, size)
        # a row far from both ends
        seen = pictures.window_mask(window, 40, 40)[20].nonzero()[:, 0]
        left, right = 20 - int(seen[0]), int(seen[-1]) - 20
        assert (left, right) == window
        written = f'`window_from("{source}", {size})`'
        rows.append([where, written, f"`{window}`", f"i - {left} .. i" + (f" + {right}" if right else ""), len(seen)])
    return report.markdown_table(["elsewhere", "here", "`window`", "keys that query i sees", "how many"], rows)


def cache_row(layout: str) -> str:
    """Byte by byte: one row of the latent cache at R = 512, r = 64."""
    row = RowLayout(layout, 512, 64)
    if row.is_fp8:
        rows = [
            [f"{g * GROUP} .. {(g + 1) * GROUP - 1}", f"`c[{g * GROUP} .. {(g + 1) * GROUP - 1}]`", "e4m3 codes"]
            for g in range(row.rank // GROUP)
        ]
        rows += [
            [
                f"{row.scale_offset + 4 * g} .. {row.scale_offset + 4 * g + 3}",
                f"scale of codes {g * GROUP} .. {(g + 1) * GROUP - 1}",
                "float32",
            ]
            for g in range(row.rank // GROUP)
        ]
        rows.append([f"{row.rope_offset} .. {row.width - 1}", "`k_rope[0 .. 63]`", "bfloat16, not quantised"])
    else:
        rows = [
            [f"0 .. {2 * row.rank - 1}", "`c[0 .. 511]`", "bfloat16 (or float16)"],
            [f"{2 * row.rank} .. {2 * row.width - 1}", "`k_rope[0 .. 63]`", "the same"],
        ]
    return report.markdown_table(["bytes", "what", "stored as"], rows)


def benchmark_picture(device: str, what: str) -> str:
    """The link to one of `benchmark_pictures`."""
    return f"![{what} on {device}](pictures/{_picture_name(device, what)})"


def _picture_name(device: str, what: str) -> str:
    return f"{device}-{what}.svg"


def benchmark_pictures(folder: Path) -> list[Path]:
    """Per device a picture of each family, and one of how times grow with the length."""
    paths = []
    for lines in report.by_device(_lines()):
        for family, of_family in report.by_family(lines).items():
            path = folder / _picture_name(lines[0]["device_key"], family)
            if report.draw(of_family, path, cases=True):
                paths.append(path)
        path = folder / _picture_name(lines[0]["device_key"], "growth")
        if report.draw_growth(lines, path):
            paths.append(path)
    return paths


def sweep() -> str:
    """What the sweep over Hugging Face's architectures found, a row each, as the verified list keeps it."""
    found = json.loads(sweep_record.VERIFIED.read_text())
    rows = []
    for name, row in found["rows"].items():
        runs = ", ".join(dict.fromkeys(part.split(" (")[0] for what in row["runs"] for part in what.split(", ")))
        left = "; ".join(row["left"])
        rows.append(
            [f"`{name}`", runs or "-", left or "-", row["modes"], f"{row['difference']:.1e}", f"{row['noise']:.1e}"]
        )
    taken = sum(bool(row["runs"]) for row in found["rows"].values())
    counts = f"{len(rows)} architectures passed in every mode; `patch` swaps something in {taken} of them."
    header = ["architecture", "what runs on tilefuse", "what is left, and why", "modes", "difference", "stock's noise"]
    table = report.markdown_table(header, rows)
    wrong = {name: f"fails: {next(iter(modes.values()))}" for name, modes in found["failed"].items()}
    rows = [[f"`{name}`", why] for name, why in (wrong | found["not_run"]).items()]
    absent = report.markdown_table(["architecture", "why"], rows)
    return f"{counts}\n\n{table}\n\n### Not in the sweep\n\n{absent}"


def commands() -> str:
    """The help of every command."""
    out = []
    for name in cli.commands():
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            cli.main([name, "--help"])
        out.append(f"## {name}\n\n```text\n{text.getvalue().rstrip()}\n```")
    return "\n\n".join(out)


# small models of the kinds that `patch` knows
_SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 32}),
    "Gemma 3": ("gemma3_text", {"sliding_window": 32}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "max_position_embeddings": 131072},
    ),
    "DeepSeek-V2": ("deepseek_v2", _DEEPSEEK),
    "DeepSeek-V3": ("deepseek_v3", _DEEPSEEK),
    "Longformer": ("longformer", {"attention_window": 32, "max_position_embeddings": 260}),
    "BigBird": ("big_bird", {"attention_type": "block_sparse", "block_size": 8, "num_random_blocks": 2}),
}


def models() -> str:
    """What `patch` reports for a small model of each kind."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from tilefuse.integrations.transformers import patch

    rows = []
    for name, (kind, options) in MODELS.items():
        config = AutoConfig.for_model(kind, **(_SMALL | options))
        head = AutoModel if kind in ("longformer", "big_bird") else AutoModelForCausalLM
        report_ = patch(head.from_config(config))
        changed = {_module(path, what) for path, what in report_.changed.items()}
        left = {_module(path, why) for path, why in report_.left.items()}
        rows.append([name, "<br>".join(sorted(changed)), "<br>".join(sorted(left)) or "-"])
    return report.markdown_table(["model", "runs on tilefuse", "left to Hugging Face"], rows)


def _module(path: str, words: str) -> str:
    return f"`{path.rpartition('.')[2]}`: {words}"


def examples() -> str:
    """Each program of the folder: what it shows, how it is run, its text."""
    out = []
    for file in sorted((records.HERE.parent / "examples").glob("*.py")):
        text = file.read_text()
        words = ast.get_docstring(ast.parse(text)) or ""
        code = text.rstrip().replace("\n", "\n    ")
        out.append(f'## {file.stem}\n\n{words}\n\n??? example "examples/{file.name}"\n\n    ```py\n    {code}\n    ```')
    return "\n\n".join(out) or "None yet."
