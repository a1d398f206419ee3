"""Weights that loading computes something from: vLLM's headless process loads them into the next generation."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import models
from tests.support.place import Place, alive, until
from tests.vllm.conftest import StartEngine, entries
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.processed import ProcessedUpdate
from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import BadRequestError, UpdateError
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True}
CHUNK_MIB = 1
A_LOG = "model.layers.0.mamba.A_log"


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def trained(model: Path, target: Path, seed: int) -> Path:
    """A checkpoint of other weights for the same model."""
    random = torch.Generator().manual_seed(seed)
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=random) for name, tensor in checkpoint(model).items()
    }
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def digest(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors(place: Place, model: Path) -> dict[str, bytes]:
    """The bytes of every tensor that the companion holds of a model."""
    client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
    with client.attach(str(model)) as attachment:
        return {name: digest(tensor) for name, tensor in attachment.tensors.items()}


def held(place: Place, model: Path) -> list[tuple[int, str]]:
    (entry,) = [entry for entry in entries(place) if entry.key.model == str(model)]
    return [(each.number, each.version) for each in entry.generations]


def writers(place: Place) -> list[int]:
    """Processes that write a generation."""
    return [lease.pid for entry in entries(place) for lease in entry.leases if lease.state is LeaseState.WRITING]


def update(
    client: CompanionClient, model: Path, *steps: dict[str, torch.Tensor] | Callable[[], None], **options: Any
) -> None:
    """One update: load these weights, and do these things."""
    with client.update(str(model), "step", **options) as new:
        assert isinstance(new, ProcessedUpdate)
        for step in steps:
            if callable(step):
                step()
            else:
                new.load(step)


@pytest.fixture
def client(
    place: Place, engine_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CompanionClient]:
    for name, value in engine_environment.items():
        monkeypatch.setenv(name, value)
    made = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir, update_chunk_mib=CHUNK_MIB)
    yield made
    made.close()


def test_computed_weights_are_those_of_a_fresh_load_and_whoever_dies_leaves_nothing(
    place: Place, start_engine: StartEngine, client: CompanionClient, tmp_path: Path
) -> None:
    """Mamba's A is -exp(A_log). First the trainer is killed in the middle of an update, then the headless process."""
    model, second = tmp_path / "hybrid", tmp_path / "second"
    models.make("hybrid", model, tiny=True)
    trained(model, second, 1)
    weights = checkpoint(second)
    for path in (model, second):
        start_engine(model=path, load_format="companion", **OPTIONS).result()
    wanted = tensors(place, second)
    before = tensors(place, model)
    assert sum(tensor.nbytes for tensor in list(weights.values())[:-1]) > CHUNK_MIB << 20  # it is handed over in parts
    assert before.keys() == wanted.keys()

    # One trainer, two updates by the same headless process; it is killed in the middle of the third.
    place.environment = {**os.environ, **to_environment(place.settings)}
    trainer = place.run("-m", "tests.vllm.processed_child", str(model), str(second), str(CHUNK_MIB))
    assert trainer.stdout is not None
    lines = [json.loads(trainer.stdout.readline() or "{}") for _ in range(3)]
    assert [line.get("committed") for line in lines] == ["step-1", "step-2", None], trainer.communicate()[1][-5000:]
    assert lines[0]["headless"] == lines[1]["headless"] == lines[2]["headless"] == writers(place)[0]
    trainer.send_signal(signal.SIGKILL)
    until(lambda: not writers(place) and not alive(lines[2]["headless"]), 20, "the headless process ends")
    assert held(place, model)[-1] == (3, "step-2")
    assert tensors(place, model) == wanted

    # Bad input is named at once, costs nothing, and leaves the process for the next update.
    shape, name = "model.norm.weight", "model.layers.0.mamba.A"
    bad = {**weights, shape: weights[shape][:-1], name: weights[A_LOG], A_LOG: weights[A_LOG].double()}
    with pytest.raises(BadRequestError) as refused:
        update(client, model, bad)
    assert all(text in str(refused.value) for text in (shape, f"{name},", f"{A_LOG} of torch.float64"))
    with pytest.raises(BadRequestError, match=f"{A_LOG}, which has values that are not finite"):
        update(client, model, weights | {A_LOG: weights[A_LOG] / 0}, check_finite=True)
    with pytest.raises(BadRequestError, match=r"weights without .*; and \d+ more"):
        update(client, model, {A_LOG: weights[A_LOG]})
    (headless,) = [each.process.pid for _, each in client._headless.values()]
    assert not writers(place)

    # The headless process is killed when it has most of the weights.
    *first, last = weights.items()

    def kill() -> None:
        assert writers(place) == [headless]
        os.kill(headless, signal.SIGKILL)

    with pytest.raises(UpdateError, match=f"pid {headless}"):
        update(client, model, dict(first), kill, dict([last]))
    until(lambda: not writers(place), 10, "nobody writes")
    assert held(place, model)[-1] == (3, "step-2")
    with client.update(str(model), "by hand", mode="direct") as new:
        new.load({shape: weights[shape]})
    assert tensors(place, model) == wanted
