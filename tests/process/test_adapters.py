"""Adapters in a real companion: published, found by an engine's processes, handed on, and forgotten."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open

from tests.support.left import none_left_open, open_now, settle
from tests.support.lora import tiny_peft
from tests.support.place import KEY, Place, alive, until
from tests.support.publishing import hold_zeros
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.cli.metrics import _gauges
from vllm_companion_plugin.client.adapter_leases import AdapterLeases
from vllm_companion_plugin.client.connection import CompanionConnection, Lease, connect
from vllm_companion_plugin.client.mirror import Mirror
from vllm_companion_plugin.core.adapters import Asked, Bound
from vllm_companion_plugin.core.entry_kinds import ADAPTER, WEIGHTS
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import CompanionStatus, EntryState
from vllm_companion_plugin.engine.adapters import LOOKED_FOR, FrontEnd
from vllm_companion_plugin.engine.room import in_the_way
from vllm_companion_plugin.engine.vllm.adapters.loading import _Kept
from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionError,
    CompanionUnavailableError,
    EntryNotFoundError,
    IntegrityError,
    StaleError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening

NAME = "team/my-adapter"
A_NAME = "base_model.model.layer.lora_A.weight"
B_NAME = "base_model.model.layer.lora_B.weight"


def small(step: int, rank: int = 4, width: int = 8) -> dict[str, torch.Tensor]:
    return {A_NAME: torch.full((rank, width), float(step)), B_NAME: torch.full((width, rank), 1.0)}


def config(rank: int = 4) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": rank}


@pytest.fixture
def client(place: Place) -> Iterator[CompanionClient]:
    place.companion()
    with made_client(place) as made:
        yield made


def raising(error: Exception) -> Callable[..., Any]:
    def act(*_: object, **__: object) -> Any:
        raise error

    return act


class made_client:
    """A client, closed at the end."""

    def __init__(self, place: Place) -> None:
        self.client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)

    def __enter__(self) -> CompanionClient:
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()


@pytest.fixture
def leases(place: Place) -> Iterator[AdapterLeases]:
    made = AdapterLeases(place.settings, "worker", first="cpu")
    yield made
    made.close()


def fetched(leases: AdapterLeases, bound: Bound) -> dict[str, torch.Tensor]:
    """The tensors that a worker finds in the file."""
    its = leases.fetch(bound)
    its.check("full", str(bound))
    with its.fds as fds, safe_open(f"/proc/self/fd/{fds[0]}", framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def bound_now(leases: AdapterLeases, asked: Asked = Asked(NAME)) -> Bound:  # noqa: B008
    lease = leases.lease(asked)
    lease.release()
    return lease.bound


class TestPublish:
    """What a trainer publishes is what a worker gets."""

    def test_peft(self, client: CompanionClient, leases: AdapterLeases) -> None:
        model = tiny_peft(lora_alpha=4)
        assert client.publish_adapter(NAME, model) == 1
        got = fetched(leases, bound_now(leases))
        expected = get_peft_model_state_dict(model)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())

    def test_directory(self, client: CompanionClient, leases: AdapterLeases, tmp_path: Path) -> None:
        """One that PEFT has saved; each of the two kinds of files."""
        model = tiny_peft(lora_alpha=4)
        expected = get_peft_model_state_dict(model)
        for is_safe in (True, False):
            path = tmp_path / str(is_safe)
            model.save_pretrained(path, safe_serialization=is_safe)
            if not is_safe:  # which PEFT does not write any more
                (path / "adapter_model.safetensors").unlink(missing_ok=True)
                torch.save(expected, path / "adapter_model.bin")
            client.register_adapter(NAME, str(path))
            got = fetched(leases, bound_now(leases))
            assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        for damaged in (b"", b"no pickle", (path / "adapter_model.bin").read_bytes()[:500], None):
            (path / "adapter_model.bin").write_bytes(damaged) if damaged is not None else path.rename(tmp_path / "gone")
            with pytest.raises(BadRequestError, match="no directory of an adapter"):
                client.register_adapter(NAME, str(path))

    @pytest.mark.parametrize("damaged", [5, {}, {"data_offsets": ["a", "b"], "dtype": "F32"}, {"data_offsets": [0]}])
    def test_directory_with_a_damaged_header(self, client: CompanionClient, tmp_path: Path, damaged: Any) -> None:
        """Is none, whatever is wrong in it."""
        tiny_peft().save_pretrained(tmp_path)
        header = json.dumps({A_NAME: damaged}).encode()
        (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(BadRequestError, match="no directory of an adapter"):
            client.register_adapter(NAME, str(tmp_path))

    def test_generations(self, client: CompanionClient, leases: AdapterLeases, place: Place) -> None:
        """Each is the current one, also of another rank and by another client; the one before it stays."""
        assert [client.publish_adapter(NAME, small(1), config()), client.publish_adapter(NAME, small(2), config())] == [
            1,
            2,
        ]
        with made_client(place) as other:
            assert other.publish_adapter(NAME, small(3, rank=64, width=512), config(64), version="step-3") == 3
            [entry] = client.list_adapters()
            assert (entry.key.model, entry.key.kind, entry.generation, entry.version) == (NAME, "adapter", 3, "step-3")
            assert entry.tensor_count == len(small(3))
            assert fetched(leases, bound_now(leases))[A_NAME].shape == (64, 512)
            assert client.publish_adapter(NAME, small(4), config()) == 4
        before = bound_now(leases, Asked(NAME, 3))
        assert fetched(leases, before)[A_NAME][0, 0] == 3
        with pytest.raises(EntryNotFoundError, match="generation 1 is not held"):
            leases.lease(Asked(NAME, 1))
        client.make_current(NAME, 3, key_id=client.list_adapters()[0].key.id)
        assert bound_now(leases) == before

    def test_is_in_nobodys_way(self, client: CompanionClient, place: Place) -> None:
        """It is in host memory. To unload it would lose it, and free nothing on a GPU."""
        client.publish_adapter(NAME, small(1), config())
        with connect("cpu", place.settings, spawn=False) as connection:
            status = connection.status()
        assert in_the_way(status, [EntryKey("ee" * 32, "test/wanted")], 2, 1) == ""
        held = {(name, labels): value for name, labels, value in _gauges(status, 0.0) if name.endswith("_bytes")}
        assert sum(value for (name, _), value in held.items() if name == "arena_bytes") == 0
        assert held["host_bytes", (NAME, "single", "target")] == status.entries[0].size_bytes

    def test_its_tensors_are_counted(self, client: CompanionClient) -> None:
        """Of each generation, which may have other modules than the one before."""
        client.publish_adapter(NAME, small(1), config())
        [before] = client.list_adapters()
        model = tiny_peft(lora_alpha=4)
        client.publish_adapter(NAME, model)
        [entry] = client.list_adapters()
        assert entry.tensor_count == len(get_peft_model_state_dict(model)) != before.tensor_count

    def test_by_several_threads(self, client: CompanionClient, leases: AdapterLeases) -> None:
        """Of one client: each publication is a generation, and the client holds the adapter once."""
        with ThreadPoolExecutor(4) as threads:
            numbers = list(threads.map(lambda step: client.publish_adapter(NAME, small(step), config()), range(20)))
        assert sorted(numbers) == list(range(1, 21))
        last = numbers.index(20)
        assert fetched(leases, bound_now(leases))[A_NAME][0, 0] == last
        [entry] = client.list_adapters()
        assert len(entry.leases) == 1

    def test_status(self, client: CompanionClient, place: Place) -> None:
        """Who asks for one adapter is told of no other entry."""
        for name in ("other", NAME):
            client.publish_adapter(name, small(1), config())
        [_, mine] = client.list_adapters()
        with connect("cpu", place.settings, spawn=False) as connection:
            assert connection.status(key_id=mine.key.id).entries == (mine,)
            assert connection.status(key_id="ab").entries == ()
            assert len(connection.status().entries) == 2

    def test_remove(self, client: CompanionClient, leases: AdapterLeases) -> None:
        """It is gone, may be published again, and others stay."""
        client.publish_adapter(NAME, small(1), config())
        client.publish_adapter("other", small(2), config())
        first = bound_now(leases)
        client.remove_adapter(NAME)
        assert [entry.key.model for entry in client.list_adapters()] == ["other"]
        with pytest.raises(EntryNotFoundError, match=f"Adapter {NAME} is not held"):
            leases.lease(Asked(NAME))
        with pytest.raises(EntryNotFoundError, match=f"no adapter {NAME}"):
            client.remove_adapter(NAME)
        assert client.publish_adapter(NAME, small(5), config()) == 2
        assert bound_now(leases) != first

    def test_named_as_a_model(self, place: Place) -> None:
        """The name of a model means its weights, so no adapter takes it; one that came first stays as it is."""
        place.companion()
        with made_client(place) as client:
            client.publish_adapter(KEY.model, small(1), config())
            holder = hold_zeros(place)
            client.publish_adapter(KEY.model, small(2), config())
            with made_client(place) as other, pytest.raises(BadRequestError, match="has the name of a model"):
                other.publish_adapter(KEY.model, small(3), config())
            assert client.list_adapters()[0].generation == 2
            with client.attach(KEY.model) as attachment:
                assert attachment.held.key.kind == WEIGHTS
            with client.update(KEY.model, version="ones") as new:
                new.load({"embed.weight": torch.ones(64, 16, dtype=torch.bfloat16)})
            (changed,) = client.make_current(KEY.model, 1)
            assert changed.key.kind == WEIGHTS
            assert client.wait_ready(KEY.model, timeout_s=5).key.kind == WEIGHTS
            with connect("cpu", place.settings, spawn=False) as connection:
                (gone,) = connection.unload(model=KEY.model)
                assert gone.key.kind == WEIGHTS
                (gone,) = connection.unload(model=KEY.model, force=True)
                assert gone.key.kind == ADAPTER
        holder.close()

    def test_is_no_model(self, client: CompanionClient) -> None:
        """Who asks for weights by an adapter's name is told so, as if nobody had them."""
        client.publish_adapter(NAME, small(1), config())
        for ask in (lambda: client.attach(NAME), lambda: client.update(NAME, version="one").__enter__()):
            with pytest.raises(EntryNotFoundError, match=f"has no weights of {NAME}, but an adapter of this name"):
                ask()
        with pytest.raises(WaitTimeoutError, match=rf"has: {NAME} \(adapter, ready\)"):
            client.wait_ready(NAME, timeout_s=0.5)
        until(lambda: len(client.list_adapters()[0].leases) == 1, 5, "nobody else holds it")

    def test_no_companion(self, place: Place) -> None:
        with made_client(place) as client, pytest.raises(CompanionUnavailableError):
            client.publish_adapter(NAME, small(1), config())

    def test_refused(self, client: CompanionClient) -> None:
        """Nothing of what vLLM cannot compute is published."""
        with pytest.raises(BadRequestError, match="DoRA"):
            client.publish_adapter(NAME, small(1), config() | {"use_dora": True})
        assert client.list_adapters() == ()

    def test_damaged(self, client: CompanionClient, leases: AdapterLeases, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bytes that are not those that were published are used by no worker."""
        from vllm_companion_plugin.memory.tensors.checksum import Summing

        right = Summing.values
        monkeypatch.setattr(Summing, "values", lambda self: tuple(value ^ 1 for value in right(self)))
        client.publish_adapter(NAME, small(1), config())
        monkeypatch.undo()
        bound = bound_now(leases)
        with pytest.raises(IntegrityError, match=NAME):
            kept_by(leases).fetch(bound, 1)


class TestQuestions:
    """Each costs a request some milliseconds."""

    def test_of_a_generation(
        self, client: CompanionClient, place: Place, leases: AdapterLeases, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A front end asks where it is, once, and a worker where the one before was; nothing is asked in vain."""
        asked: list[str] = []
        for method in ("status", "attach"):
            inner = getattr(CompanionConnection, method)

            def ask(self: Any, *args: Any, inner: Any = inner, method: str = method, **named: Any) -> Any:
                if self._paths == place.paths:  # and not by a thread that an earlier test has left
                    asked.append(method)
                return inner(self, *args, **named)

            monkeypatch.setattr(CompanionConnection, method, ask)
        front, counts = FrontEnd(place.settings), []
        for step in range(3):
            client.publish_adapter(NAME, small(step), config())
            asked.clear()
            served = front.serve(Asked(NAME))
            of_front = list(asked)
            asked.clear()
            assert fetched(leases, served.bound)[A_NAME][0, 0] == step
            counts.append((of_front, list(asked)))
        assert counts == [
            (["status", "attach"], ["status", "attach"] if step == 0 else ["attach"]) for step in range(3)
        ]
        with connect("cpu", place.settings, spawn=False) as connection:
            assert [series for series in connection.metrics()[1] if series.name == "failures" and series.value] == []


class TestSilence:
    """Companions and answers that do not come."""

    def test_of_another_companion(self, client: CompanionClient, place: Place) -> None:
        """Requests of adapters that others have wait for it once, and not long."""
        gpu = "GPU-00000000-0000-0000-0000-000000000000"
        silent = place.run("-m", "vllm_companion_plugin.holder", "--device", gpu)
        until(lambda: is_listening(device_paths(gpu, place.settings)), 20, "it listens")
        client.publish_adapter(NAME, small(1), config())
        leases = AdapterLeases(place.settings, "front end")
        try:
            assert bound_now(leases).generation == 1
            silent.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            assert [bound_now(leases).generation for _ in range(5)] == [1] * 5
            assert time.monotonic() - began < 8  # five times ten seconds, if each one waited
            with pytest.raises(CompanionUnavailableError, match=f"{gpu} is silent"):
                leases.lease(Asked("unknown"))
        finally:
            silent.send_signal(signal.SIGCONT)
            leases.close()

    def test_of_the_only_one(self, place: Place) -> None:
        """For a moment: requests wait, and what comes next is answered at once."""
        companion = place.companion()
        with made_client(place) as client:
            client.publish_adapter(NAME, small(1), config())
            leases = AdapterLeases(place.settings, "front end")
            bound_now(leases)
            companion.send_signal(signal.SIGSTOP)
            waker = threading.Timer(2.5, companion.send_signal, (signal.SIGCONT,))
            waker.start()
            assert bound_now(leases).generation == 1
            began = time.monotonic()
            assert bound_now(leases).generation == 1
            assert time.monotonic() - began < 1.5
            with pytest.raises(EntryNotFoundError):
                leases.lease(Asked("unknown"))
            leases.close()

    def test_of_one_that_dies_then(self, client: CompanionClient, place: Place) -> None:
        """What nobody has is not found again."""
        gpu = "GPU-00000000-0000-0000-0000-000000000000"
        silent = place.run("-m", "vllm_companion_plugin.holder", "--device", gpu)
        until(lambda: is_listening(device_paths(gpu, place.settings)), 20, "it listens")
        leases = AdapterLeases(place.settings, "front end")
        silent.send_signal(signal.SIGSTOP)
        with pytest.raises(CompanionUnavailableError, match="silent"):
            leases.lease(Asked("unknown"))
        silent.kill()
        silent.wait(30)
        with pytest.raises(EntryNotFoundError):
            leases.lease(Asked("unknown"))
        leases.close()

    def test_of_who_may_write(self, client: CompanionClient, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may have been heard, so it is taken back."""
        client.publish_adapter(NAME, small(1), config())
        inner = Lease.stage

        def stage(self: Lease, base: int = 0) -> int:
            inner(self, base)
            raise WaitTimeoutError("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(Lease, "stage", stage)
            with pytest.raises(WaitTimeoutError):
                client.publish_adapter(NAME, small(2), config())
        assert client.publish_adapter(NAME, small(3), config()) == 2

    def test_after_the_commit(
        self, client: CompanionClient, leases: AdapterLeases, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Engines have it by then, so it is no failure."""
        client.publish_adapter(NAME, small(1), config())
        with monkeypatch.context() as patch:
            patch.setattr(Lease, "advanced", raising(WaitTimeoutError("no answer")))
            patch.setattr(Mirror, "hold_instead", raising(ArenaError("no descriptors")))
            assert client.publish_adapter(NAME, small(2), config()) == 2
        assert fetched(leases, bound_now(leases))[A_NAME].unique().tolist() == [2.0]


class TestLimits:
    """Of the trainer's process."""

    def test_few_descriptors(self, client: CompanionClient) -> None:
        """Each way to have too few is an error that says so, and leaves none behind."""
        client.publish_adapter(NAME, small(1), config())
        settle()
        with contextlib.ExitStack() as filled:
            last = max(map(int, os.listdir("/proc/self/fd")))
            while (fd := os.open(os.devnull, os.O_RDONLY)) < last:  # no number below is free
                filled.callback(os.close, fd)
            os.close(fd)
            before, limits, told = len(open_now()), resource.getrlimit(resource.RLIMIT_NOFILE), list[str]()
            for name in (NAME, "other"):
                for left in range(5):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + left, limits[1]))
                    try:
                        client.publish_adapter(name, small(2), config())
                    except CompanionError as error:
                        told.append(str(error))
                    finally:
                        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                until(lambda: len(open_now()) <= before + 4, 5, "none is left behind")  # what is held, and a spare
            assert len(told) >= 5
            assert all("open files" in text or "descriptors" in text for text in told), told
        assert client.publish_adapter(NAME, small(3), config()) > 1
        assert client.publish_adapter("other", small(3), config()) > 0


class TestDeaths:
    """Whoever ends, requests go on."""

    def test_companion(self, client: CompanionClient, leases: AdapterLeases, place: Place) -> None:
        """The trainer hands its adapters to the next companion, with their numbers; who asks meanwhile waits."""
        for step in (1, 2):
            client.publish_adapter(NAME, small(step), config())
        before, pid = bound_now(leases), place.companion_pid()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), 5, "the companion is gone")
        assert bound_now(leases) == before
        assert place.companion_pid() != pid
        assert fetched(leases, before)[A_NAME][0, 0] == 2
        assert client.publish_adapter(NAME, small(3), config()) == 3

    @pytest.mark.parametrize("when", ["stage", "commit_staged"])
    def test_companion_of_a_trainer_that_publishes(
        self, client: CompanionClient, leases: AdapterLeases, place: Place, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        """It publishes to the next one, and training goes on."""
        client.publish_adapter(NAME, small(1), config())
        pid, inner = place.companion_pid(), getattr(Lease, when)

        def dying(self: Lease, *args: Any, **named: Any) -> int:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            number: int = inner(self, *args, **named)
            return number

        monkeypatch.setattr(Lease, when, dying)
        assert client.publish_adapter(NAME, small(2), config()) == 2
        assert place.companion_pid() != pid
        assert fetched(leases, bound_now(leases))[A_NAME][0, 0] == 2
        assert len(client.list_adapters()[0].leases) == 1

    def test_trainer(self, client: CompanionClient, leases: AdapterLeases) -> None:
        """An adapter stays when its trainer goes."""
        client.publish_adapter(NAME, small(1), config())
        client.close()
        until(lambda: not client.list_adapters()[0].leases, 5, "the trainer's lease has ended")
        assert fetched(leases, bound_now(leases))[A_NAME][0, 0] == 1

    def test_numbers_begin_anew(self, client: CompanionClient, leases: AdapterLeases, place: Place) -> None:
        """After both have gone, a generation of the same number and another content is another adapter."""
        client.publish_adapter(NAME, small(1), config())
        before = bound_now(leases)
        client.close()
        client.remove_adapter(NAME)
        with connect("cpu", place.settings, spawn=False) as connection:
            pid = connection.shutdown()
        until(lambda: not alive(pid), 5, "the companion is gone")
        place.companion()
        assert client.publish_adapter(NAME, small(2), config()) == 1
        after = bound_now(leases)
        assert (after.generation, after.content == before.content) == (1, False)
        with pytest.raises(StaleError, match="another one than before"):
            leases.fetch(before)


class TestFrontEnd:
    """Requests of an engine, and the generations that are held for them."""

    @pytest.fixture
    def front(self, place: Place) -> FrontEnd:
        return FrontEnd(place.settings)

    def test_next_request(self, client: CompanionClient, front: FrontEnd) -> None:
        """A request is bound to what is current when it comes; all of one generation have one lease."""
        client.publish_adapter(NAME, small(1), config())
        first = [front.serve(Asked(NAME)) for _ in range(3)]
        assert len({id(each) for each in first}) == 1
        client.publish_adapter(NAME, small(2), config())
        second = front.serve(Asked(NAME))
        assert [each.bound.generation for each in (first[0], second)] == [1, 2]
        assert front.serve(second.bound) is second
        assert len([each for each in client.list_adapters()[0].leases if each.client == "engine"]) == 2

    def test_held(self, client: CompanionClient, front: FrontEnd, leases: AdapterLeases) -> None:
        """A generation stays as long as a request of it, however many come after it, and no longer."""
        client.publish_adapter(NAME, small(1), config())
        served = front.serve(Asked(NAME))
        for step in range(2, 6):
            client.publish_adapter(NAME, small(step), config())
        numbers = [each.number for each in client.list_adapters()[0].generations]
        assert numbers == [1, 4, 5]
        assert fetched(leases, served.bound)[A_NAME][0, 0] == 1
        del served
        until(lambda: len(client.list_adapters()[0].generations) == 2, 5, "the first one is forgotten")

    def test_forgotten(self, client: CompanionClient, front: FrontEnd) -> None:
        """What an engine may forget: generations of before that no request is bound to, and what was removed."""
        served = []
        for step in range(3):
            client.publish_adapter(NAME, small(step), config())
            served.append(front.serve(Asked(NAME)))
            assert not front.is_sent(served[-1])
            assert front.sent(served[-1]) == []
            assert front.is_sent(served[-1])
        first, last = served[0].number, served[-1].number
        del served[0]
        assert front.sent(served[-1]) == [first]
        assert front.sent(served[-1]) == []
        second = served[0].number
        served.clear()
        assert front.removed(Asked(NAME, 1)) == []
        assert sorted(front.removed(Asked(NAME))) == sorted([second, last])

    def test_what_was_removed_and_nobody_asks_for(self, client: CompanionClient, front: FrontEnd) -> None:
        """An engine forgets it when it is given another one: each name of ever more would keep its memory there."""
        numbers: list[int] = []
        for step in range(3 * LOOKED_FOR):
            client.publish_adapter(f"{NAME}-{step}", small(step), config())
            served = front.serve(Asked(f"{NAME}-{step}"))
            front.sent(served)
            numbers.append(served.number)
        del served
        kept, *gone = numbers
        for step in range(1, 3 * LOOKED_FOR):
            client.remove_adapter(f"{NAME}-{step}")
        forgotten: list[int] = []
        for step in range(4):
            client.publish_adapter(NAME, small(step), config())
            served = front.serve(Asked(NAME))
            forgotten += front.sent(served)
        assert set(gone) <= set(forgotten)
        assert kept not in forgotten

    def test_removed_meanwhile(self, client: CompanionClient, front: FrontEnd) -> None:
        """A request in flight keeps what it has; the next one is refused."""
        client.publish_adapter(NAME, small(1), config())
        served = front.serve(Asked(NAME))
        client.remove_adapter(NAME)
        [entry] = client.list_adapters()
        assert entry.state is EntryState.RETIRED
        with pytest.raises(EntryNotFoundError):
            front.serve(Asked(NAME))
        assert served.bound.generation == 1

    def test_companion_replaced(self, client: CompanionClient, front: FrontEnd, place: Place) -> None:
        """After its companion's death a request is bound anew, to the same generation."""
        client.publish_adapter(NAME, small(1), config())
        served, pid = front.serve(Asked(NAME)), place.companion_pid()
        os.kill(pid, signal.SIGKILL)
        until(served.lease.lease.lost.is_set, 5, "the lease is lost")
        again = front.serve(Asked(NAME))
        assert again is not served
        assert (again.bound, again.number) == (served.bound, served.number)

    def test_an_answer_that_is_lost(
        self, client: CompanionClient, front: FrontEnd, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests stay bound to what they have, whatever becomes of a question about what comes next."""
        client.publish_adapter(NAME, small(1), config())
        served = front.serve(Asked(NAME))
        inner, answers = CompanionConnection.status, [CompanionUnavailableError("no answer")]

        def status(self: CompanionConnection, *args: Any, **named: Any) -> CompanionStatus:
            for error in answers:
                answers.clear()
                raise error
            return inner(self, *args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(CompanionConnection, "status", status)
            assert front.serve(Asked(NAME)).bound == served.bound
        for step in range(2, 6):
            client.publish_adapter(NAME, small(step), config())
        assert 1 in [each.number for each in client.list_adapters()[0].generations]
        del served
        until(lambda: len(client.list_adapters()[0].generations) == 2, 5, "the first one is forgotten")

    def test_companions_that_die_while_requests_come(
        self, client: CompanionClient, front: FrontEnd, place: Place
    ) -> None:
        """Each request is held by a companion that lives, as far as was known when it came; or the error is typed."""
        client.publish_adapter(NAME, small(1), config())
        over, served, wrong = threading.Event(), 0, list[object]()

        def ask() -> None:
            nonlocal served
            while not over.is_set():
                try:
                    its = front.serve(Asked(NAME)).lease.lease
                    # One whose companion died just now may be given up as soon as it is given: not twice, though.
                    if its.released and front.serve(Asked(NAME)).lease.lease is its:
                        wrong.append("released")
                except CompanionError:
                    continue
                except BaseException as error:
                    wrong.append(error)
                    return
                served += 1

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for _ in range(6):
            before, count = place.companion_pid(), served
            os.kill(before, signal.SIGKILL)
            until(lambda: place.companion_pid() != before and served > count + 20, 20, "the next one serves")  # noqa: B023
        over.set()
        for thread in threads:
            thread.join(30)
        assert wrong == []

    def test_gone(self, client: CompanionClient, front: FrontEnd, place: Place) -> None:
        """What workers may not find any more, though it is held here: a request of it is bound anew."""
        client.publish_adapter(NAME, small(1), config())
        client.publish_adapter("other", small(1), config())
        removed, lost = front.serve(Asked(NAME)), front.serve(Asked("other"))
        assert not removed.is_gone
        client.remove_adapter(NAME)
        until(lambda: removed.is_gone, 5, "it is told")
        assert not lost.is_gone
        os.kill(place.companion_pid(), signal.SIGKILL)
        until(lambda: lost.is_gone, 5, "the lease is lost")

    def test_a_generation_that_has_gone(self, client: CompanionClient, front: FrontEnd) -> None:
        """What a request asked for by number is not bound for ever, if the engine never had it."""
        client.publish_adapter(NAME, small(1), config())
        served = front.serve(Asked(NAME, 1))
        assert front.serve(Asked(NAME, 1)) is served
        client.remove_adapter(NAME)
        until(lambda: served.is_gone, 5, "it is told")
        with pytest.raises(EntryNotFoundError):
            front.serve(Asked(NAME, 1))

    def test_a_number_of_what_was_removed(self, client: CompanionClient, front: FrontEnd, place: Place) -> None:
        """It is an error while other requests of it run, or is what has the number now."""
        client.publish_adapter(NAME, small(1), config())
        served = front.serve(Asked(NAME, 1))
        front.sent(served)
        client.remove_adapter(NAME)
        for _ in range(2):
            with pytest.raises(EntryNotFoundError):
                front.serve(Asked(NAME, 1))
            until(lambda: served.is_gone, 5, "it is told")
        assert front.serve(served.bound) is served
        with connect("cpu", place.settings, spawn=False) as connection:
            pid = connection.shutdown()
        until(lambda: not alive(pid) and served.lease.lease.lost.is_set(), 5, "the companion is gone")
        place.companion()
        assert client.publish_adapter(NAME, small(2), config()) == 1
        again = front.serve(Asked(NAME, 1))
        assert (again.bound.generation, again.bound == served.bound) == (1, False)

    def test_at_once(self, client: CompanionClient, front: FrontEnd) -> None:
        """Requests that come together have one lease."""
        client.publish_adapter(NAME, small(1), config())
        served: list[Any] = []
        threads = [threading.Thread(target=lambda: served.append(front.serve(Asked(NAME)))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(each) for each in served}) == 1
        until(
            lambda: len([each for each in client.list_adapters()[0].leases if each.client == "engine"]) == 1,
            5,
            "the other leases have ended",
        )


def kept_by(leases: AdapterLeases) -> _Kept:
    return _Kept(leases, torch.device("cpu"), "full")


class TestWorker:
    """What a worker keeps, to load it again in the middle of a step."""

    def test_kept(self, client: CompanionClient, leases: AdapterLeases) -> None:
        """An adapter that was removed can be loaded until it is forgotten; then its descriptors are closed."""
        client.publish_adapter(NAME, small(1), config())
        bound, kept = bound_now(leases), kept_by(leases)
        with none_left_open():
            assert kept.fetch(bound, 7) is kept.fetch(bound, 7)
            client.remove_adapter(NAME)
            fds = kept.fetch(bound, 7).file.fds
            with safe_open(f"/proc/self/fd/{fds[0]}", framework="pt") as file:
                assert file.get_tensor(A_NAME)[0, 0] == 1
            for _ in range(2):
                kept.forget(7)
        with pytest.raises(EntryNotFoundError):
            kept.fetch(bound, 7)

    def test_same_number(self, client: CompanionClient, leases: AdapterLeases) -> None:
        """Two front ends may give two adapters one number; each has its own bytes."""
        kept = kept_by(leases)
        for step, name in enumerate(("one", "other", "one")):
            client.publish_adapter(name, small(step), config())
            with safe_open(f"/proc/self/fd/{kept.fetch(bound_now(leases, Asked(name)), 7).file.fds[0]}", "pt") as file:
                assert file.get_tensor(A_NAME)[0, 0] == step

    def test_most(self, client: CompanionClient, leases: AdapterLeases, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that was loaded longest ago goes first."""
        monkeypatch.setattr("vllm_companion_plugin.engine.vllm.adapters.loading.MAX_KEPT", 2)
        kept, bounds = kept_by(leases), []
        for number in range(3):
            client.publish_adapter(str(number), small(number), config())
            bounds.append(bound_now(leases, Asked(str(number))))
            kept.fetch(bounds[-1], number)
            kept.fetch(bounds[0], 0)
        for number in range(3):
            client.remove_adapter(str(number))
        for number in (0, 2):
            kept.fetch(bounds[number], number)
        with pytest.raises(EntryNotFoundError):
            kept.fetch(bounds[1], 1)


def resident_kib(pid: int | str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def test_500_generations(client: CompanionClient, leases: AdapterLeases, place: Place) -> None:
    """Memory and descriptors stay as they are in the companion, in the trainer and in an engine's processes.

    The last two are this process, with one request in flight at any time.
    """
    front, pid = FrontEnd(place.settings), place.companion_pid()

    def use(step: int) -> Any:
        client.publish_adapter(NAME, small(step, rank=16, width=4096), config(16))
        served = front.serve(Asked(NAME))
        front.sent(served)
        leases.fetch(served.bound).close()
        return served

    def now() -> dict[str, int]:
        gc.collect()
        until(lambda: len(client.list_adapters()[0].generations) == 2, 5, "earlier generations are forgotten")
        return {
            "companion's memory": resident_kib(pid),
            "own memory": resident_kib("self"),
            "companion's descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "own descriptors": len(open_now()),
            "own threads": threading.active_count(),
        }

    for step in range(100):
        served = use(step)
    before = now()
    for step in range(100, 600):
        served = use(step)
    after = now()
    assert served.bound.generation == 600
    # An adapter has 512 KiB.
    most = {name: 8 << 10 if "memory" in name else 4 for name in before}
    assert {name: after[name] - before[name] for name in before if after[name] - before[name] > most[name]} == {}
