"""The trainer of vLLM's weight transfer writes all entries of a model, or none: with a real companion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.process.test_update import IS_SILENT, LOSES
from tests.support.place import KEY, Place, until
from tests.support.publishing import Small, load
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client import lease
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine.vllm.transfer.trainer import CompanionTrainer, CompanionTrainerInitInfo
from vllm_companion_plugin.errors import CommitUnknownError, StaleError

MODEL = "test/model"
NAME = "embed.weight"
OTHER = replace(KEY, id="cd" * 32, rank="1/2")


class Weights:
    """Of a trainer; something happens while they are read."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.tensor = torch.ones(64, 16, dtype=torch.bfloat16)
        self.metadata = [SimpleNamespace(name=NAME, shape=self.tensor.shape, dtype=self.tensor.dtype)]
        self.meanwhile = meanwhile

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield NAME, self.tensor
        self.meanwhile()


@pytest.fixture
def client(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[CompanionClient]:
    """Of a companion that holds two entries of the model, each with a second generation. "lost" gets no answer."""
    place.environment["COMPANION_KEEP_PREVIOUS"] = "2"
    with monkeypatch.context() as patch:
        code = LOSES.format(before="pass", after=f"if request.version == 'lost': {IS_SILENT}")
        patch.setattr(place, "run", lambda *_: Place.run(place, "-c", code))
        place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        for key in (KEY, OTHER):
            load(connection, Small(), key=key)
    client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
    until(lambda: not any(entry.leases for entry in client.status().entries), 5, "the loader has left")
    for key in (KEY, OTHER):
        with client.update(MODEL, version="before", key_id=key.id) as new:
            new.load({NAME: torch.zeros(64, 16, dtype=torch.bfloat16)})
    yield client
    client.close()


def trainer(place: Place, weights: Weights) -> CompanionTrainer:
    class Nobody:
        def init_weight_transfer_engine(self, init_info: object) -> None: ...

    info = CompanionTrainerInitInfo(
        model=MODEL, devices=["cpu"], settings={"runtime_dir": place.settings.runtime_dir}, rank=0
    )
    return CompanionTrainer.trainer_init(info, client=Nobody(), source=weights)


def current(client: CompanionClient) -> dict[str, tuple[int, str]]:
    return {entry.key.id[:2]: (entry.generation, entry.version) for entry in client.status().entries}


def test_all_entries_are_written(place: Place, client: CompanionClient) -> None:
    made = trainer(place, Weights(lambda: None))
    made.write_weights("after")
    assert current(client) == {"ab": (3, "after"), "cd": (3, "after")}
    assert made.written == {"cpu": {KEY.id: 3, OTHER.id: 3}}


@pytest.mark.parametrize("key", [KEY, OTHER], ids=["first", "last"])
def test_what_was_committed_before_another_one_failed_is_taken_back(
    place: Place, client: CompanionClient, key: EntryKey
) -> None:
    """Somebody rolls one entry back while the trainer writes, so its commit is refused."""
    made = trainer(place, Weights(lambda: client.make_current(MODEL, 1, key_id=key.id)))
    with pytest.raises(StaleError):
        made.write_weights("after")
    rolled = key.id[:2]
    assert current(client) == {"ab": (2, "before"), "cd": (2, "before")} | {rolled: (1, "")}
    assert made.written == {}


def test_what_may_have_been_committed_is_taken_back(
    place: Place, client: CompanionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The companion has committed it, and did not say so."""
    monkeypatch.setattr(lease, "ANSWER_TIMEOUT_S", 3.0)
    made = trainer(place, Weights(lambda: None))
    with pytest.raises(CommitUnknownError, match="lost is current by now"):
        made.write_weights("lost")
    assert current(client) == {"ab": (2, "before"), "cd": (2, "before")}
    assert [each.version for entry in client.status().entries for each in entry.generations].count("lost") == 1
    assert made.written == {}
