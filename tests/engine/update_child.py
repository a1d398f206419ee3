"""One rank of an engine of two: it maps a model, takes other weights with the other rank, and prints what it has then.

Arguments: the rank, a file by which the ranks find each other, and what is wrong with this one:

    nothing     it can take other weights
    private     it has written to its own ones
    alone       it shares none
    unmappable  it can prepare others, and cannot map them
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from vllm_companion_plugin import CompanionClient, CompanionError
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.engine.live import LiveModel
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm.updating import companion_update
from vllm_companion_plugin.errors import ArenaError

MODEL = "test/model"


def never(*_: object) -> Attachment:
    raise AssertionError("somebody has it")


def cannot(*_: object) -> None:
    raise ArenaError("There is no memory.")


def main(rank: int, store: str, wrong: str) -> None:
    os.environ["VLLM_DIST_IDENT"] = os.path.basename(store)  # as vLLM's CPU workers have it
    parallel_state.init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
    config = VllmConfig()
    with set_current_vllm_config(config):
        parallel_state.initialize_model_parallel(2, 1)
    client = CompanionClient("cpu")
    model = LiveModel(client.attach(MODEL), client.settings, load=never)
    weight = model.attachment.tensors["embed.weight"]  # as the model of an engine, this keeps the memory mapped
    if wrong == "private":
        model.attachment.privatize(None)
    if wrong == "unmappable":
        Attachment.advance = cannot  # type: ignore[method-assign]
    if wrong != "alone":
        current().keep(model)
    print("ready", flush=True)
    sys.stdin.readline()
    before = len(os.listdir("/proc/self/fd"))
    answer: dict[str, Any] = {}
    try:
        answer["updated"] = companion_update(SimpleNamespace(vllm_config=config))
    except CompanionError as error:
        answer |= {"code": error.code, "text": str(error), "more_fds": len(os.listdir("/proc/self/fd")) - before}
    answer |= {"generation": model.attachment.generation, "value": weight.float().mean().item()}
    print(json.dumps(answer), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
