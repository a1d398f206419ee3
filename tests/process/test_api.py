"""Programs that are not vLLM: the client API."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest
import torch
from torch import nn

import vllm_companion_plugin
from tests.support.left import none_left_open
from tests.support.place import KEY, Place, until
from tests.support.publishing import Small, damage, load, publish
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.connection import Granted, connect
from vllm_companion_plugin.core.status import CompanionStatus, EntryState
from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionUnavailableError,
    EntryNotFoundError,
    IntegrityError,
    SettingsError,
    WaitTimeoutError,
)
from vllm_companion_plugin.settings import TABLE, Given


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


class TestDevice:
    """A device has torch's names, too."""

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_cpu(self, device: str | torch.device) -> None:
        """By text or by torch's object."""
        assert CompanionClient(device).device == "cpu"

    @pytest.mark.parametrize(
        ("device", "index"), [("cuda", 1), ("cuda:0", 0), (torch.device("cuda:1"), 1), (torch.device("cuda"), 1)]
    )
    def test_cuda(self, device: str | torch.device, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU's companion has its UUID as name; without an index it is the current GPU."""
        uuids = [f"GPU-0000000{n}-89ab-cdef-0123-456789abcdef" for n in range(2)]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr("vllm_companion_plugin.memory.cuda_device", uuids.__getitem__)
        assert CompanionClient(device).device == uuids[index]
        assert CompanionClient(uuids[0]).device == uuids[0]

    @pytest.mark.parametrize("device", ["cuda:0", "cuda:x", "gpu0", "", torch.device("meta")])
    def test_unknown(self, device: str | torch.device) -> None:
        """What is not here is said at once."""
        with pytest.raises(SettingsError, match="Name"):
            CompanionClient(device)


def test_settings_are_typed_as_the_table_says() -> None:
    """A type checker knows every setting."""
    hints = get_type_hints(Given)
    assert {name: get_origin(hint) or hint for name, hint in hints.items()} == {s.name: s.type for s in TABLE}


def test_errors_are_exported() -> None:
    """What the API raises can be caught by names of the package; importing these imports nothing else."""
    for name in vllm_companion_plugin.__all__:
        getattr(vllm_companion_plugin, name)
    assert vllm_companion_plugin.WaitTimeoutError is vllm_companion_plugin.errors.WaitTimeoutError
    code = "import sys, vllm_companion_plugin as v; v.CompanionError; assert not {'torch', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


OF_GRPC = re.compile("grpc|unix:|UNAVAILABLE|DEADLINE|RST_STREAM|Socket closed|addr", re.IGNORECASE)


def test_no_words_of_grpc_reach_a_user(place: Place) -> None:
    """Neither where no companion runs, nor where one dies, hangs or closes."""
    with pytest.raises(CompanionUnavailableError, match=r"No companion of cpu runs in .* starts one") as none:
        client(place).status()
    companion = place.companion()
    connection = connect("cpu", place.settings, spawn=False)
    statuses = connection.watch()
    next(statuses)
    companion.send_signal(signal.SIGSTOP)
    with pytest.raises(WaitTimeoutError) as silent:
        connection.status(0.2)
    companion.kill()
    with pytest.raises(CompanionUnavailableError) as died:
        next(statuses)
    companion.wait(30)
    with pytest.raises(CompanionUnavailableError) as gone:
        connection.status()
    connection.close()
    for error in (none, silent, died, gone):
        text = str(error.value).replace(place.settings.runtime_dir, "")
        assert not OF_GRPC.search(text), text


class TestAsync:
    """The same without blocking an event loop."""

    def test_wait(self, place: Place) -> None:
        """The loop goes on while a companion and a model are waited for."""
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        async def main() -> None:
            ticking = asyncio.create_task(tick())
            waiting = asyncio.create_task(client(place).wait_ready_async(KEY.model, timeout_s=20))
            await asyncio.to_thread(place.companion)
            with connect("cpu", place.settings, spawn=False) as connection:
                await asyncio.to_thread(load, connection, Small())
                entry = await waiting
            ticking.cancel()
            assert (entry.key, entry.state) == (KEY, EntryState.READY)

        asyncio.run(main())
        assert ticks > 5

    def test_timeout(self, place: Place) -> None:
        """It ends with what there was instead: no companion, or no such model."""
        with pytest.raises(WaitTimeoutError, match=r"Waited 0.2 s for m: No companion of cpu"):
            asyncio.run(client(place).wait_ready_async("m", timeout_s=0.2))
        place.companion()
        with pytest.raises(WaitTimeoutError, match=r"m \(target, any rank\) was not published on cpu within 0.2 s"):
            asyncio.run(client(place).wait_ready_async("m", timeout_s=0.2))

    def test_watch(self, place: Place, model: nn.Module) -> None:
        """Every change comes; who stops iterating leaves no thread, and nothing open."""

        async def first() -> CompanionStatus:
            async with contextlib.aclosing(client(place).watch_async()) as statuses:
                async for status in statuses:
                    return status
            raise AssertionError

        with none_left_open():
            assert [entry.key for entry in asyncio.run(first()).entries] == [KEY]
            until(
                lambda: not any(t.name == "companion-watch" for t in threading.enumerate()), 5, "its thread has ended"
            )

    def test_cancelled(self, place: Place) -> None:
        """A wait that is cancelled ends at once."""

        async def main() -> None:
            waiting = asyncio.create_task(client(place).wait_ready_async("m"))
            await asyncio.sleep(0.3)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        place.companion()
        asyncio.run(main())
        until(lambda: not any(t.name == "companion-watch" for t in threading.enumerate()), 5, "its thread has ended")

    def test_companion_ends(self, place: Place) -> None:
        """The end of the companion is told."""

        async def main() -> None:
            async for _ in client(place).watch_async():
                companion.kill()

        companion = place.companion()
        with pytest.raises(CompanionUnavailableError, match="it has ended"):
            asyncio.run(main())


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
    out, error = place.run("-c", PURE_PYTHON).communicate(timeout=100)
    assert out == "equal\n", error


def test_weights_that_are_not_what_was_published_are_refused(place: Place, model: nn.Module) -> None:
    with connect("cpu", place.settings, spawn=False) as connection:
        damage(connection)
    text = r"1 of 1 pieces of test/model \(single\) on cpu.*unload MODEL --force"
    with none_left_open(), pytest.raises(IntegrityError, match=text):
        client(place).attach(KEY.model)
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
    with none_left_open(10):  # gRPC closes its own a little later
        with client(place).attach(KEY.model, name="reader") as weights:
            leases = client(place).status().entries[0].leases
            assert "reader" in [lease.client for lease in leases]
        assert weights.tensors == {}
        weights.close()
    for status in client(place).watch(10):
        if len(status.entries[0].leases) == 1:
            break


def test_the_mapping_survives_the_companion(place: Place, model: nn.Module) -> None:
    with client(place).attach(KEY.model) as weights:
        place.processes[0].kill()
        assert weights.lease.lost.wait(30)
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
        outcome = connection.attach(draft, may_load=True, client_name="loader").wait(30)
        assert isinstance(outcome, Granted)
        publish(outcome.publication, nn.Linear(2, 2))
        with client(place).attach(KEY.model) as weights:
            assert weights.tensors.keys() == contents(model).keys()
        with client(place).attach(KEY.model, role="draft") as weights:
            assert weights.tensors.keys() == {"weight", "bias"}


ASKING: dict[str, Callable[[CompanionClient], object]] = {
    "attach": lambda client: client.attach(""),
    "update": lambda client: client.update("", "step-1").__enter__(),
    "make_current": lambda client: client.make_current("", 1),
    "wait_ready": lambda client: client.wait_ready("", timeout_s=1),
    "wait_ready_async": lambda client: asyncio.run(client.wait_ready_async("", timeout_s=1)),
}


@pytest.mark.parametrize("how", ASKING)
def test_an_empty_name_is_not_that_of_the_only_model(place: Place, model: nn.Module, how: str) -> None:
    with pytest.raises(BadRequestError, match="No model is named"):
        ASKING[how](client(place))
    with client(place).attach("", key_id=KEY.id) as weights:
        assert weights.model == KEY.model


@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\x1b[2J"], ids=ascii)
def test_texts_that_nobody_can_send_or_show(place: Place, model: nn.Module, text: str) -> None:
    for ask in (
        lambda: client(place).attach(text),
        lambda: client(place).attach(KEY.model, text),
        lambda: client(place).attach(KEY.model, role=text),
        lambda: client(place).attach(KEY.model, key_id=text),
        lambda: client(place).make_current(text, 1),
        lambda: client(place).wait_ready(text, timeout_s=0.1),
    ):
        with pytest.raises((EntryNotFoundError, BadRequestError, WaitTimeoutError)) as raised:
            ask()
        assert str(raised.value).isprintable()
    with client(place).attach(KEY.model, name=text):
        assert all(lease.client.isprintable() for lease in client(place).status().entries[0].leases)


def test_what_was_closed_says_so(place: Place, model: nn.Module) -> None:
    weights = client(place).attach(KEY.model)
    weights.close()
    settings = client(place).settings
    for use in (lambda: weights.verify("full"), lambda: weights.prepare(0, settings), weights.renew, weights.views):
        with pytest.raises(ArenaError, match=r"test/model \(single\) on cpu was closed, and is not mapped here"):
            use()


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
        waiting.join(30)
    [entry] = found
    assert entry.state is EntryState.READY  # type: ignore[attr-defined]
