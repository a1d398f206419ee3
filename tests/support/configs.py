"""vLLM's configuration of an engine on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def config(model: Path | str, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    flags = {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "float32", "load_format": "companion"}
    return EngineArgs(model=str(model), **(flags | options)).create_engine_config()
