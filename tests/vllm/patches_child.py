"""An engine that publishes and then one that attaches, in one process: what they left patched, as "RESULT {...}".

The argument is a JSON object of options of the engines. "through" are the rows whose patches were made for a while.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

from tests import patched
from tests.vllm.results import tell
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm.patching import Lifetime, Patch


def record_patches() -> set[str]:
    """Names of the rows that are used for a while, from now on."""
    used: set[str] = set()
    inner = Patch.on

    @functools.wraps(inner)
    def on(self: Patch, *args: Any) -> Any:
        used.add(self.target)
        return inner(self, *args)

    Patch.on = on  # type: ignore[method-assign]
    return used


def run(options: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """What is patched while the engine lives."""
    used.clear()
    llm = LLM(dtype="float32", enforce_eager=True, max_model_len=128, load_format="companion", **options)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=4, temperature=0, detokenize=False))
    # Waiting: an engine of one process never imports the executor of several.
    lifetimes = [Lifetime.IMPORT, Lifetime.LOAD, Lifetime.DECIDED, Lifetime.MAPPED, Lifetime.WAITING]
    found = patched.differences(lifetimes) | {
        "what": current().outcomes[-1].what,
        "objects": sorted({*patched.on_objects().values()}),
        "modes": patched.modes(),
        "through": sorted(used),
        "collects": gc.isenabled(),
        "switch_s": sys.getswitchinterval(),
    }
    del llm
    gc.collect()
    return found


def main() -> None:
    options = json.loads(sys.argv[1])
    used = record_patches()
    tell([run(options, used) for _ in range(2)])


if __name__ == "__main__":
    main()
