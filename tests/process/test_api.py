"""Programs that are not vLLM: the client API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.place import KEY, Place, open_fds, until
from tests.support.publishing import Small, damage, load, publish
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.connection import Granted, connect
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import (
    CompanionUnavailableError,
    EntryNotFoundError,
    IntegrityError,
    SettingsError,
    WaitTimeoutError,
)


class Varied(Small):
    """With a shared module, an attribute and an empty tensor as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.scale = torch.tensor(0.5)
        self.none = nn.Parameter(torch.empty(0, 4))


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {**found, "scale": model.get_buffer("steps").new_tensor(0.5, dtype=torch.float32)}


@pytest.fixture
def model(place: Place) -> Iterator[nn.Module]:
    """A model that is published for the length of the test."""
    place.companion()
    made = Varied()
    with connect("cpu", place.settings, spawn=False) as connection:
        load(connection, made)
        yield made


def client(place: Place) -> CompanionClient:
    return CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)


PURE_PYTHON = """
import torch
from google.protobuf.internal import api_implementation
from tests.support.publishing import KEY, Small, load
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.settings import resolve
assert api_implementation.Type() == "python"
model = Small()
with connect("cpu", resolve(), spawn=True) as connection:
    load(connection, model)
    with CompanionClient("cpu").attach(KEY.model) as weights:
        assert torch.equal(weights.tensors["embed.weight"], model.embed.weight)
    assert [entry.key for entry in connection.status().entries] == [KEY]
    connection.unload(force=True)
    connection.shutdown()
print("equal")
"""


def test_pure_python_protobuf(place: Place) -> None:
    """With the implementation that some users must choose, a companion is started, published to and attached to."""
    place.environment |= {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    out, error = place.run("-c", PURE_PYTHON).communicate(timeout=60)
    assert out == "equal\n", error


def test_weights_that_are_not_what_was_published_are_refused(place: Place, model: nn.Module) -> None:
    with connect("cpu", place.settings, spawn=False) as connection:
        damage(connection)
    before = open_fds()
    with pytest.raises(IntegrityError, match=r"1 of 1 pieces of test/model \(single\) on cpu.*unload --force"):
        client(place).attach(KEY.model)
    until(lambda: open_fds() <= before, 5, "nothing of it is open")
    unverified = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir, verify="off")
    with unverified.attach(KEY.model) as weights:
        assert torch.equal(weights.tensors["embed.weight"], contents(model)["embed.weight"])


def test_attached_tensors_are_byte_equal_under_every_name(place: Place, model: nn.Module) -> None:
    wanted = contents(model)
    with client(place).attach(KEY.model) as weights:
        assert weights.tensors.keys() == wanted.keys()
        for name, tensor in weights.tensors.items():
            assert (tensor.dtype, tensor.stride()) == (wanted[name].dtype, wanted[name].stride()), name
            assert torch.equal(tensor, wanted[name]), name
        assert weights.tensors["head.weight"] is weights.tensors["embed.weight"]
        assert weights.tensors["again.bias"] is weights.tensors["first.bias"]
        assert (weights.model, weights.rank, weights.generation, weights.lost) == (KEY.model, KEY.rank, 1, False)
        assert {module.path for module in weights.manifest.modules} == {"", "embed", "head", "first"}
        del tensor


def memfd_mappings() -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line}


def test_the_tensors_are_views_of_one_mapping(place: Place, model: nn.Module) -> None:
    before = memfd_mappings()
    with client(place).attach(KEY.model) as weights:
        addresses = [tensor.data_ptr() for tensor in weights.tensors.values() if tensor.numel()]
        assert len(memfd_mappings() - before) == 1
    assert memfd_mappings() <= before
    assert max(addresses) - min(addresses) < 1 << 20


def test_close_returns_lease_mapping_and_descriptors(place: Place, model: nn.Module) -> None:
    with client(place).attach(KEY.model):  # gRPC opens some for good
        pass
    before = open_fds()
    with client(place).attach(KEY.model, name="reader") as weights:
        leases = client(place).status().entries[0].leases
        assert "reader" in [lease.client for lease in leases]
    assert weights.tensors == {}
    weights.close()
    until(lambda: open_fds() <= before, 10, "descriptors are closed")  # gRPC closes its own a little later
    for status in client(place).watch(10):
        if len(status.entries[0].leases) == 1:
            break


def test_the_mapping_survives_the_companion(place: Place, model: nn.Module) -> None:
    with client(place).attach(KEY.model) as weights:
        place.processes[0].kill()
        assert weights.lease.lost.wait(5)
        assert weights.lost
        assert torch.equal(weights.tensors["embed.weight"], contents(model)["embed.weight"])


def test_what_is_missing_is_said(place: Place, model: nn.Module) -> None:
    with pytest.raises(EntryNotFoundError, match="other/model"):
        client(place).attach("other/model")
    with pytest.raises(EntryNotFoundError, match="tp1/2"):
        client(place).attach(KEY.model, rank="tp1/2")
    with pytest.raises(WaitTimeoutError, match="other/model"):
        client(place).wait_ready("other/model", timeout_s=0.2)


def test_a_model_that_is_its_own_draft_is_attached_as_what_it_is(place: Place, model: nn.Module) -> None:
    with connect("cpu", place.settings, spawn=False) as connection:
        draft = replace(KEY, id="cd" * 32, role="draft")
        outcome = connection.attach(draft, may_load=True, client_name="loader").wait(5)
        assert isinstance(outcome, Granted)
        publish(outcome.publication, nn.Linear(2, 2))
        with client(place).attach(KEY.model) as weights:
            assert weights.tensors.keys() == contents(model).keys()
        with client(place).attach(KEY.model, role="draft") as weights:
            assert weights.tensors.keys() == {"weight", "bias"}


def test_without_a_companion_it_says_so(place: Place) -> None:
    with pytest.raises(CompanionUnavailableError):
        client(place).attach(KEY.model)
    with pytest.raises(WaitTimeoutError):
        client(place).wait_ready(KEY.model, timeout_s=0.2)
    with pytest.raises(SettingsError, match="colour"):
        CompanionClient("cpu", colour="red")


def test_wait_ready_waits_for_companion_and_publication(place: Place) -> None:
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(client(place).wait_ready(KEY.model, timeout_s=20)))
    waiting.start()
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        load(connection, Small())
        waiting.join(10)
    [entry] = found
    assert entry.state is EntryState.READY  # type: ignore[attr-defined]
