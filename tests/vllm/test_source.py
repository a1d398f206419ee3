"""Real engines that read the checkpoint by another load format, and with its options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.place import Place
from tests.vllm.conftest import FLAGS, StartEngine
from tests.vllm.test_bad_input import fails
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

PROMPTS = [[1, 2, 3, 4]]


def test_options_of_the_source_loader(start_engine: StartEngine, tiny_llama: Path) -> None:
    """They reach the loader that reads, and one that it does not know ends the engine with a line that names it."""
    options = {"model": tiny_llama, "load_format": "companion", "skip_tokenizer_init": True}
    wrong = start_engine(model_loader_extra_config={"source_extra_config": {"num_thread": 2}}, **options)
    threads = {"enable_multithread_load": True, "num_threads": 2}
    right = start_engine(prompts=PROMPTS, model_loader_extra_config={"source_extra_config": threads}, **options)
    said = fails(wrong)
    assert "SettingsError" in said
    assert "num_thread" in said
    right.result()
    assert "Published weights of" in right.output()
    assert "Multi-thread loading shards" in right.output()


def test_serve_with_a_servers_command_line(
    place: Place, tiny_llama: Path, tmp_path: Path, engine_environment: dict[str, str]
) -> None:
    """The line of a deployment of `vllm serve` can be given as it is."""
    config = tmp_path / "serve.yaml"
    config.write_text("port: 8001\nload-format: safetensors\nmodel-loader-extra-config:\n  num_threads: 1\n")
    command = [sys.executable, "-m", "vllm_companion_plugin.cli.main", "serve", "--device", "cpu", str(tiny_llama)]
    process = subprocess.Popen(
        [*command, *FLAGS, "--api-key", "secret", "--config", str(config)],
        env=engine_environment | to_environment(place.settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("Ready"):
            break
    process.terminate()
    process.communicate(timeout=60)
    assert "Ready" in lines, "\n".join(lines)
    assert any(line.endswith("the server's flags: --api-key, --port") for line in lines)
