"""The sweep's records: a file per row, what is done already, and what the verified list says.

``python -m tilefuse.testing.sweep run`` (or ``pytest tests/integrations/test_sweep.py``) leaves one JSON line per row
in ``build/sweep/<row>.jsonl`` and goes on where it stopped; ``... merge`` writes ``verified.json`` from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .architectures import Architecture
from .check import Record, check

FOLDER = Path("build/sweep")
_PACKAGE = Path(__file__).resolve().parents[2]
INTEGRATION = _PACKAGE / "integrations" / "transformers"
VERIFIED = INTEGRATION / "verified.json"
# one of every kind: these rows run in ``make test``, and are the ones that are compiled and exported in the sweep
QUICK = (
    "llama-LlamaForCausalLM",
    "mistral-MistralForCausalLM",
    "mixtral-MixtralForCausalLM",
    "qwen3_moe-Qwen3MoeForCausalLM",
    "deepseek_v3-DeepseekV3ForCausalLM",
    "deepseek_v32-DeepseekV32ForCausalLM",
    "deepseek_v4-DeepseekV4ForCausalLM",
    "gemma3-Gemma3ForConditionalGeneration",
    "gemma4_text-Gemma4ForCausalLM-shared",
    "gpt_oss-GptOssForCausalLM",
    "llama4_text-Llama4ForCausalLM",
    "modernbert-ModernBertForMaskedLM",
    "bigbird_pegasus-BigBirdPegasusForConditionalGeneration",
    "inkling2_text-Inkling2ForCausalLM",
    "splinter-SplinterModel",
    "git-GitForCausalLM",
    "doge-DogeForCausalLM",
    "t5gemma2-T5Gemma2ForConditionalGeneration",
)


def fingerprint() -> str:
    """Of the code that a row's answer depends on: a record of other code is not taken over."""
    digest = hashlib.sha256()
    for folder in (INTEGRATION, Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def stored(row: Architecture, folder: Path = FOLDER) -> Record | None:
    file = folder / f"{row.name}.jsonl"
    return Record(**json.loads(file.read_text())) if file.exists() else None


def run(row: Architecture, folder: Path = FOLDER, again: bool = False) -> Record:
    """The row's record: the stored one if it passed with the same code, else a new one.

    A row is first patched with everything; if that shows a fault, with what ``patch`` takes of a type that is not
    verified.
    """
    before = stored(row, folder)
    code = fingerprint()
    if before is not None and not again and before.code == code and before.status != "failed":
        return before
    compiled = row.name in QUICK
    record = check(row, unverified=True, compiled=compiled)
    if record.status == "failed":
        left = check(row, compiled=compiled)
        # what was wrong stays in the record
        left.stock_cannot |= {f"unverified {name}": what for name, what in record.failures.items()}
        record = left
    record.code = code
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{row.name}.jsonl").write_text(json.dumps(record.as_dict()) + "\n")
    return record


def records(folder: Path = FOLDER) -> list[Record]:
    return [Record(**json.loads(line)) for file in sorted(folder.glob("*.jsonl")) for line in file.open()]


def text(found: dict[str, Any]) -> str:
    """JSON with a row a line."""
    parts = []
    for name, value in found.items():
        if isinstance(value, dict) and value:
            lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def merged(found: Iterable[Record]) -> dict[str, Any]:
    """What ``verified.json`` says.

    A type is verified if its rows passed with attention. One that is only part of others (a vision tower) is if all
    rows that hold it did.
    """
    found = sorted(found, key=lambda record: record.name)
    ran = [record for record in found if not record.status.startswith("not ")]
    own = {record.types[0] for record in ran}
    bad: set[str] = set()
    for record in ran:
        if record.status != "passed" or not record.verified:
            bad |= {record.types[0]} | {name for name in record.types if name not in own}
    rows = {
        record.name: {
            "verified": record.verified,
            "runs": record.swapped,
            "left": record.left,
            "modes": len(record.modes),
            "difference": float(f"{record.difference:.1e}"),
            "noise": float(f"{record.noise:.1e}"),
        }
        for record in ran
        if record.status == "passed"
    }
    return {
        "transformers": sorted({".".join(r.versions["transformers"].split(".")[:2]) for r in ran}),
        "types": sorted({name for record in ran for name in record.types if name} - bad),
        "rows": rows,
        "failed": {record.name: record.failures for record in ran if record.status != "passed"},
        "not_run": {record.name: record.status for record in found if record.status.startswith("not ")},
    }
