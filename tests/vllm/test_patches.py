"""What real engines leave patched: the rows of the table, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.place import Place
from tests.vllm.nursery import Nursery
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

LOADS = {
    patches.LOADERS_WEIGHTS.target,
    patches.MODELS_WEIGHTS.target,
    patches.PROCESSING.target,
    patches.STARTS.target,
    patches.TASKS.target,
    *(patch.target for patch in (*patches.CLOCKS, *patches.READS)),
}
LIVE_WEIGHTS = [
    "vllm.model_executor.models.llama.LlamaForCausalLM.load_weights",
    "vllm.model_executor.models.llama.LlamaModel.load_weights",
]
"""Of the model itself, and of the part that loads for itself: the row is of any model's."""
ATTACHES = {patches.NOTES_FOR_RELOADS.target, patches.PROCESSING.target}


def test_engines_leave_what_the_table_says(
    place: Place, nursery: Nursery, tiny_llama: Path, fork_environment: dict[str, str], tmp_path: Path
) -> None:
    """One that published, and one that attached: what was for a while is undone, and has been there."""
    options = {"model": str(tiny_llama), "skip_tokenizer_init": True}
    environment = fork_environment | to_environment(place.settings)
    with (tmp_path / "log").open("w+") as log:
        process = nursery.start("tests.vllm.patches_child", json.dumps(options), environment=environment, stderr=log)
        said, _ = process.communicate(timeout=300)
        log.seek(0)
        assert process.returncode == 0, log.read()[-3000:]
    reports = json.loads(said.partition("RESULT ")[2].partition("\n")[0])
    expected = [
        {
            **{"what": what, "through": sorted(through)},
            **{"stray": [], "missing": [], "objects": LIVE_WEIGHTS, "modes": []},
            **{"collects": True, "switch_s": sys.getswitchinterval()},
        }
        for what, through in (("published", LOADS), ("attached", ATTACHES))
    ]
    assert reports == expected
