"""`vllm-companion serve MODEL`: the weights are there before any engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import models
from tests.support.place import Place, alive, until
from tests.vllm.conftest import FLAGS, StartEngine, entries
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def ready_ranks(place: Place) -> list[str]:
    try:
        ready = [entry.key for entry in entries(place) if entry.state is EntryState.READY]
        return sorted(key.rank if key.role == "target" else f"{key.rank} {key.role}" for key in ready)
    except CompanionError:
        return []


def hub_cache(place: Place, checkpoint: Path) -> Path:
    """A cache of the hub that holds `checkpoint` as org/tiny."""
    home = Path(place.settings.runtime_dir).parent / "hf"
    model = home / "hub" / "models--org--tiny"
    shutil.copytree(checkpoint, model / "snapshots" / ("a" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    return home


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        pytest.param({}, ["single", "single draft"], marks=pytest.mark.core),
        # Two such engines are in test_sharing.py.
        pytest.param({"tensor_parallel_size": 2}, ["tp0/2", "tp1/2"], marks=pytest.mark.slow),
        pytest.param({"pipeline_parallel_size": 2}, ["pp0/2", "pp1/2"], marks=pytest.mark.slow),
    ],
    ids=["single", "tp2", "pp2"],
)
def test_an_engine_attaches_to_what_serve_loaded(
    parallel: dict[str, int],
    ranks: list[str],
    start_engine: StartEngine,
    place: Place,
    tiny_llama: Path,
    tmp_path: Path,
    engine_environment: dict[str, str],
) -> None:
    model = held = str(tiny_llama)
    speculative: dict[str, object] = {}
    if not parallel:  # by its hub id, which vLLM replaces by a path when it is offline; and with a draft
        drafted = tmp_path / "drafted"
        models.make("llama-eagle", drafted, tiny=True)
        model = held = "org/tiny"
        speculative = {"method": "eagle", "model": f"{drafted}-draft", "num_speculative_tokens": 2}
        engine_environment = engine_environment | {"HF_HOME": str(hub_cache(place, drafted))}
    flags = [part for name, size in parallel.items() for part in (f"--{name.replace('_', '-')}", str(size))]
    flags += ["--speculative-config", json.dumps(speculative)] if speculative else []
    place.environment = engine_environment | to_environment(place.settings)
    serve = place.run(
        *("-m", "vllm_companion_plugin.cli.main", "serve", "--device", "cpu", model),
        *FLAGS,
        *flags,
    )
    until(lambda: serve.poll() is not None or ready_ranks(place) == ranks, 200, f"{ranks} are published")
    assert serve.poll() is None, serve.communicate()
    engine = start_engine(
        model=model,
        load_format="companion",
        skip_tokenizer_init=True,
        environment=engine_environment,
        speculative_config=speculative or None,
        # With pipeline stages, this vLLM cannot run on a CPU unless it compiles.
        prompts=None if "pipeline_parallel_size" in parallel else [[1, 2, 3, 4]],
        **parallel,
    )
    assert all(len(tokens) == 24 for tokens in engine.result().get("tokens", ()))
    assert engine.output().count("Attached to") == len(ranks)
    assert "Loading weights took" not in engine.output()

    companion = place.companion_pid()
    serve.terminate()
    out, err = serve.communicate(timeout=60)
    assert serve.returncode == 0, err
    assert f"cpu holds {held} ({ranks[0]})" in out
    assert out.count("cpu holds ") == len(ranks)
    until(lambda: not alive(companion), 2, "the companion ends with serve")


def test_a_model_is_loaded_and_held_though_nobody_reads_what_is_said(
    place: Place, tiny_llama: Path, engine_environment: dict[str, str]
) -> None:
    """vLLM ends when its output cannot be written; `| head` is no reason to have no weights."""
    place.environment = engine_environment | to_environment(place.settings)
    process = place.run(*("-m", "vllm_companion_plugin.cli.main", "serve", str(tiny_llama), "--device", "cpu"), *FLAGS)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    process.stdout = process.stderr = None
    until(lambda: ready_ranks(place) == ["single"] or process.poll() is not None, 240, "it is held")
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 0
