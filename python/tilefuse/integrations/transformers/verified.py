"""The model types whose attention was compared with Hugging Face's in every mode of the sweep: ``verified.json``."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import transformers

_FILE = Path(__file__).with_name("verified.json")


@functools.cache
def record() -> dict[str, Any]:
    return json.loads(_FILE.read_text())


def why_not(*configs: Any) -> str:
    """Why the attention of a module is left, "" if it is verified: by its own config or that of the whole model."""
    version = ".".join(transformers.__version__.split(".")[:2])
    if version not in record()["transformers"]:
        return f"verified with transformers {', '.join(record()['transformers'])}, this is {version}"
    types = [t for t in (getattr(config, "model_type", None) for config in configs) if t]
    if any(t in record()["types"] for t in types):
        return ""
    return f"{types[0] if types else 'its model'} is not verified"
