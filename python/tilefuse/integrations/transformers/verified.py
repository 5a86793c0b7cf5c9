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
    """Why attention is left, "" if it is verified. The first config with a type decides: that of the whole model.

    A part of a verified type inside a model that is not may be handed masks that no one has seen.
    """
    version = ".".join(transformers.__version__.split(".")[:2])
    if version not in record()["transformers"]:
        return f"verified with transformers {', '.join(record()['transformers'])}, this is {version}"
    kind = next((kind for config in configs if (kind := getattr(config, "model_type", None))), "its model")
    return "" if kind in record()["types"] else f"{kind} is not verified"
