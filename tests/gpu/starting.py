"""Engines on the GPU as processes of their own, as tests/vllm has them on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.place import Place
from tests.vllm.test_turns import CHILD, PROMPTS, Process
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.settings import to_environment


def starter(place: Place, directory: Path) -> Callable[..., Process]:
    """What starts such a process: `start(models=...)`. Its log is in `directory`."""

    def start(child: str = CHILD, **options: Any) -> Process:
        log = directory / f"log-{len(place.processes)}"
        options = {"prompts": PROMPTS, "device": CompanionClient().device} | options
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", child, json.dumps(options)],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True},
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | to_environment(place.settings),
            )
        place.processes.append(process)
        return Process(process, log)

    return start
