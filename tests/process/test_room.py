"""Room that idle entries make for a model, by a real companion. The device is as large as the test says.

What is free on it is observed: its size without what the companion still has descriptors of.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.support.place import Place, alive, arena_of, until
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, connect
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.engine import room
from vllm_companion_plugin.engine.vllm import devices

GPU = devices.EngineDevice("GPU-x", torch.device("cuda", 0), arenas.CUDA_VMM, Stage.PROCESSED)
HOST = devices.EngineDevice("cpu", torch.device("cpu"), arenas.MEMFD, Stage.UNPROCESSED)
SIZE = 1 << 20
WANTED = EntryKey("ee" * 32, "test/wanted")


def config(utilization: float = 0.5, kv_bytes: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        cache_config=SimpleNamespace(gpu_memory_utilization=utilization, kv_cache_memory_bytes=kv_bytes)
    )


class Device:
    """Memory of `size` bytes on which nothing lies but what the companion holds."""

    def __init__(self, pid: int, size: int) -> None:
        self.pid, self.size = pid, size

    def held(self) -> int:
        total = 0
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                path = f"/proc/{self.pid}/fd/{fd}"
                total += os.stat(path).st_size if "memfd:arena" in os.readlink(path) else 0
        return total

    def memory(self, device: devices.EngineDevice) -> tuple[int, int]:
        return self.size - self.held(), self.size


@pytest.fixture
def connection(place: Place) -> Iterator[CompanionConnection]:
    place.companion("--linger-s=600")
    with connect("cpu", place.settings, spawn=False) as connection:
        yield connection


@pytest.fixture
def device(place: Place, connection: CompanionConnection, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Twice as large as what an engine with utilization 0.5 wants: four entries fill it."""
    made = Device(place.companion_pid(), 4 * SIZE)
    monkeypatch.setattr(devices, "memory", made.memory)
    return made


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Lines of our part of vLLM's logger, as they are before it marks them, if that has been set up in this process."""
    logger = logging.getLogger("vllm.companion")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, "vllm.companion")
    return caplog


def hold(
    place: Place, connection: CompanionConnection, *names: str, used: bool = False, model: str | None = None
) -> None:
    """Publish models of one size each, the first one first; they are idle from then on, unless they are `used`."""
    for name in names:
        own = connect("cpu", place.settings, spawn=False)
        lease = own.attach(EntryKey(name * 64, model or f"test/{name}"), may_load=True, client_name="engine")
        granted = lease.wait(30)
        assert isinstance(granted, Granted)
        arena, fds = arena_of(bytes(SIZE))
        granted.publication.publish(arena, fds, b"manifest", 3)
        fds.close()
        if used:
            continue
        own.close()
        until(partial(is_idle, connection, name), 5, f"{name} is idle")


def is_idle(connection: CompanionConnection, name: str) -> bool:
    return any(entry.expires_at_unix_s for entry in connection.status().entries if entry.key.id == name * 64)


def held(connection: CompanionConnection) -> str:
    return "".join(entry.key.model[-1] for entry in connection.status().entries)


class TestRoom:
    """An elected loader finds the memory that vLLM will ask for."""

    def test_is_made_by_what_is_idle_for_longest_and_no_more(
        self, place: Place, connection: CompanionConnection, device: Device, log: pytest.LogCaptureFixture
    ) -> None:
        """One line says for each entry what went, and the memory is free when the call returns."""
        hold(place, connection, "b", "a", "c")
        room.make_room(connection, GPU, config(), [WANTED])
        assert held(connection) == "ac"
        assert device.memory(GPU)[0] >= 2 * SIZE
        assert log.messages == ["Dropped b (single), which nobody used, from cpu: 0.00 GiB for wanted."]

    def test_is_there_already(self, place: Place, connection: CompanionConnection, device: Device) -> None:
        """Where vLLM finds enough nothing is dropped; weights that are mapped count as this engine's."""
        hold(place, connection, "a", "b")
        room.make_room(connection, GPU, config(), [WANTED])
        hold(place, connection, "c")
        room.make_room(connection, GPU, config(), [EntryKey("c" * 64, "test/c")], mapped_bytes=SIZE)
        assert held(connection) == "abc"

    def test_is_not_made_in_vain(
        self, place: Place, connection: CompanionConnection, device: Device, log: pytest.LogCaptureFixture
    ) -> None:
        """If even all idle entries would not do they stay, and what is in the way is named with what frees it."""
        hold(place, connection, "a", "b", used=True)
        hold(place, connection, "c")
        room.make_room(connection, GPU, config(0.9), [WANTED])
        assert held(connection) == "abc"
        [message] = log.messages
        assert "test/wanted needs 0.00 GiB free on cpu" in message
        assert f"test/a (single), 0.00 GiB, used by engine (pid {os.getpid()}): free when they have ended." in message
        assert "test/c (single), 0.00 GiB, which nobody uses: vllm-companion unload test/c --device cpu" in message

    def test_what_is_in_the_way_may_be_another_load_of_a_model_in_use(
        self, place: Place, connection: CompanionConnection, device: Device, log: pytest.LogCaptureFixture
    ) -> None:
        """The command that the message has must not mean the one that is used, which would refuse it."""
        hold(place, connection, "a", "b", used=True)
        hold(place, connection, "c", model="test/a")
        room.make_room(connection, GPU, config(0.9), [WANTED])
        [message] = log.messages
        [command] = [line.partition("nobody uses: ")[2] for line in message.split("\n") if "nobody uses: " in line]
        process = place.run("-m", "vllm_companion_plugin.cli.main", *command.split()[1:])
        assert process.communicate(timeout=100)[1] == ""
        assert [entry.key.id[0] for entry in connection.status().entries] == ["a", "b"]

    def test_spares_what_belongs_to_a_serve(
        self, place: Place, connection: CompanionConnection, device: Device, log: pytest.LogCaptureFixture
    ) -> None:
        """It is named as its own."""
        hold(place, connection, "a", "b", "c")
        with connect("cpu", place.settings, spawn=False) as owner:
            statuses = owner.watch(own_linger_s=-1.0)
            next(statuses)
            room.make_room(connection, GPU, config(), [WANTED])
            assert held(connection) == "abc"
            statuses.close()  # type: ignore[attr-defined]
        assert f"which `vllm-companion serve` (pid {os.getpid()}) keeps: vllm-companion unload" in log.messages[0]

    def test_on_a_cpu_is_for_the_weights_and_the_kv_cache(
        self, place: Place, connection: CompanionConnection, device: Device
    ) -> None:
        """There vLLM checks after loading."""
        hold(place, connection, "a", "b")
        room.make_room(connection, HOST, config(kv_bytes=SIZE), [WANTED], load_bytes=SIZE)
        assert held(connection) == "ab"
        room.make_room(connection, HOST, config(kv_bytes=SIZE), [WANTED], load_bytes=SIZE + 1)
        assert held(connection) == "b"

    def test_that_a_companion_cannot_make_ends_nothing(
        self, place: Place, connection: CompanionConnection, device: Device, log: pytest.LogCaptureFixture
    ) -> None:
        """An engine whose companion has died goes on to vLLM's own check."""
        hold(place, connection, "a", "b", "c")
        with connect("cpu", place.settings, spawn=False) as other:
            other.shutdown()
        until(lambda: not alive(device.pid), 5, "it has ended")
        device.held = lambda: 3 * SIZE  # type: ignore[method-assign]
        room.make_room(connection, GPU, config(), [WANTED])
        assert "stays there" in log.messages[0]


def test_memory_is_what_vllm_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU CUDA says it, on a CPU the host."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 7) if device == GPU.torch_device else None)
    assert devices.memory(GPU) == (3, 7)
    free, total = devices.memory(HOST)
    assert 0 < free < total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < devices.resident_bytes() < total
