"""A trainer writes new weights while clients use the old ones: real processes around a real companion."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.process.test_metrics import collect, value
from tests.process.update_child import MODEL, Child, digests, values
from tests.support.place import KEY, Place, alive, until
from tests.support.publishing import Small, hold_zeros, load
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.cli.main import main as cli
from vllm_companion_plugin.client import headless, lease
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import Ready, connect
from vllm_companion_plugin.client.processed import ProcessedUpdate
from vllm_companion_plugin.client.update import updating
from vllm_companion_plugin.core.status import EntryState, EntryStatus, LeaseState
from vllm_companion_plugin.errors import (
    BadRequestError,
    CommitUnknownError,
    CompanionError,
    EntryInUseError,
    SettingsError,
    StaleError,
    TicketError,
)
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.spawn import is_listening

LOADED = 0
"""The step that stands for the checkpoint's weights."""


class Process:
    """One that runs tests/process/update_child.py, for tests that kill it or count what it has."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, do: str, **options: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=100)[1][-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


Start = Callable[[], Process]
Here = Callable[..., Child]
Tells = Process | Child


@pytest.fixture
def start(place: Place) -> Start:
    return lambda: Process(place.run("-m", "tests.process.update_child"))


@pytest.fixture
def here(place: Place) -> Iterator[Here]:
    """The same in this process: `here()`."""
    made: list[Child] = []

    def one(**settings: Any) -> Child:
        made.append(Child(CompanionClient("cpu", runtime_dir=place.settings.runtime_dir, **settings)))
        return made[-1]

    yield one
    for child in made:
        if hasattr(child, "attachment"):
            child.attachment.close()


@pytest.fixture
def companion(place: Place) -> subprocess.Popen[str]:
    return loaded(place)


def loaded(place: Place) -> subprocess.Popen[str]:
    """A companion that holds `Small` with the weights of step 0, which its loader has left."""
    process = place.companion()
    model = Small()
    with torch.no_grad():
        for name, tensor in values(LOADED).items():
            model.get_parameter(name).copy_(tensor) if name != "steps" else model.get_buffer(name).copy_(tensor)
    with connect("cpu", place.settings, spawn=False) as connection:
        load(connection, model)
    until(lambda: not entry_of(place).leases, 5, "the loader has left")
    return process


def entry_of(place: Place) -> EntryStatus:
    (entry,) = client(place).status().entries
    return entry


def client(place: Place) -> CompanionClient:
    return CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)


def held(place: Place) -> list[tuple[int, str]]:
    return [(each.number, each.version) for entry in client(place).status().entries for each in entry.generations]


def has(answer: dict[str, Any], step: int, generation: int) -> bool:
    """Whether a client has the bytes, the number and the version of this step."""
    assert "error" not in answer, answer
    version = f"step-{step}" if step else ""
    return (answer["digests"], answer["generation"], answer["version"]) == (
        digests(values(step)),
        generation,
        version,
    )


def test_twenty_updates_reach_two_clients_when_these_want_them(
    place: Place, companion: subprocess.Popen[str], start: Start
) -> None:
    """Bytes are compared each time; descriptors and mappings of all processes stay as many as they were."""
    quick, slow, trainer = start(), start(), start()
    first = [quick.tell("attach"), slow.tell("attach")]
    assert all(has(answer, LOADED, 1) for answer in first)
    opened: list[int] = []

    def open_now() -> list[int]:
        return [
            memfds(companion.pid),
            *(count for process in (quick, slow, trainer) for count in process.tell("open").values()),
        ]

    def no_more_is_open() -> bool:
        """What gRPC and a commit leave behind closes soon, and not at once."""
        return all(count <= before for count, before in zip(open_now(), opened, strict=True))

    for step in range(1, 21):
        assert trainer.tell("write", step=step) == {}
        behind = 3 * ((step - 1) // 3)
        assert has(slow.tell("look"), behind, behind + 1), "nobody is moved"
        answers = [quick.tell("advance")]
        if step % 3 == 0:
            answers.append(slow.tell("advance"))
        assert all(has(answer, step, step + 1) for answer in answers)
        assert [answer["address"] for answer in answers] == [x["address"] for x in first[: len(answers)]]
        wanted = {step, step + 1, behind + 1 if step % 3 else step + 1}
        assert [number for number, _ in held(place)] == sorted(wanted)
        if step == 3:
            time.sleep(1)
            opened = open_now()
        elif step % 3 == 0:
            until(no_more_is_open, 10, f"no more is open than before: {opened}")
    assert len(os.listdir(place.paths.holders)) <= 3, "notes of generations that have gone are removed"
    entry = entry_of(place)
    assert (entry.generation, entry.version) == (21, "step-20")
    assert [(each.number, len(each.pids)) for each in entry.generations] == [(19, 1), (20, 0), (21, 1)]


def memfds(pid: int) -> int:
    """Descriptors of arenas that a process has."""
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(str(link.readlink()))
    return sum(target.startswith("/memfd:vllm-companion") for target in targets)


def test_generations_are_counted(place: Place, companion: Any, start: Start, here: Here) -> None:
    """What is on the device, which one is current, and what became of updates, as Prometheus reads it."""
    engine, trainer = start(), start()
    engine.tell("attach")
    for step in (1, 2):
        here().tell("write", step=step)
    trainer.tell("begin", step=3)
    trainer.kill()
    until(lambda: len(entry_of(place).leases) == 1, 5, "the companion knows that the trainer is gone")
    client(place).make_current(MODEL, 1)
    found = collect(place)
    assert value(found, "generations") == 2
    assert value(found, "current_generation") == 1
    assert value(found, "updates_total", result="committed") == 2
    assert value(found, "updates_total", result="aborted") == 1
    assert value(found, "rollbacks_total") == 1


class TestTrainer:
    """One writes at a time, and leaves a whole generation or nothing."""

    def test_that_is_killed_leaves_nothing(self, place: Place, companion: Any, start: Start) -> None:
        """The next one may write at once."""
        engine, trainer = start(), start()
        engine.tell("attach")
        before = memfds(companion.pid)
        assert trainer.tell("begin", step=1) == {"wrote": 4}
        trainer.kill()
        until(lambda: len(entry_of(place).leases) == 1, 5, "the companion knows that it is gone")
        assert held(place) == [(1, "")]
        until(lambda: memfds(companion.pid) == before, 5, "nothing of it is open")
        assert has(engine.tell("look"), LOADED, 1)
        assert "error" not in start().tell("write", step=2)
        assert has(engine.tell("advance"), 2, 2)

    def test_is_named_to_a_second_one(self, place: Place, companion: Any, start: Start) -> None:
        """Which writes as soon as the first one is done, on top of that one's weights."""
        first, second = start(), start()
        first.tell("begin", step=1)
        refused = second.tell("write", step=2)
        assert refused["error"] == EntryInUseError.code
        assert f"trainer (pid {first.process.pid}) writes the next generation" in refused["text"]
        assert first.tell("finish") == {}
        assert "error" not in second.tell("write", step=2, only=["steps"])
        answer = second.tell("attach")
        expected = digests({**values(1), "steps": values(2)["steps"]})
        assert (answer["digests"], answer["generation"], answer["version"]) == (expected, 3, "step-2")

    def test_sends_what_has_changed(self, place: Place, companion: Any, here: Here) -> None:
        """The rest is what it was in the generation before. A tied tensor is written under each of its names."""
        with client(place).update(MODEL, version="one") as new:
            assert sorted(new.names) == ["embed.weight", "head.weight", "quantized", "steps", "turned"]
            assert new.load([("head.weight", values(7)["embed.weight"])]) == 1
        with client(place).attach(MODEL) as found:
            assert digests(found.tensors) == digests({**values(LOADED), "embed.weight": values(7)["embed.weight"]})
            assert torch.equal(found.tensors["head.weight"], found.tensors["embed.weight"])

    def test_may_give_a_module(self, place: Place, companion: Any) -> None:
        """Its parameters and buffers, however they lie in memory."""
        model = Small()
        with client(place).update(MODEL, version="one") as new:
            assert new.load(model) == 4
        with client(place).attach(MODEL) as found:
            assert digests(found.tensors) == digests({**dict(model.named_parameters()), **dict(model.named_buffers())})

    def test_that_raises_commits_nothing(self, place: Place, companion: Any) -> None:
        """The error is its own, and it may try again."""

        def fail(attachment: Attachment) -> None:
            with updating(attachment, "one", place.settings) as new:
                new.load(values(1))
                raise ZeroDivisionError

        with client(place).attach(MODEL) as attachment:
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    fail(attachment)
            assert held(place) == [(1, "")]
            assert entry_of(place).leases[0].state is LeaseState.ATTACHED

    def test_whose_update_is_over(self, place: Place, companion: Any, here: Here) -> None:
        """It may commit by itself, and then nothing more is written nor committed."""
        client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
        with client.update(MODEL, version="unused") as new:
            new.load(values(1))
            assert new.commit("step-1") == new.generation == 2
            for use in (lambda: new.load(values(2)), lambda: new.commit("step-2"), new.complete):
                with pytest.raises(BadRequestError, match=r"This update of .* is over"):
                    use()
        with pytest.raises(BadRequestError, match=r"This update of .* is over"):
            new.load(values(2))
        (entry,) = client.status().entries
        assert [each.version for each in entry.generations] == ["", "step-1"]

    def test_whose_processed_update_is_over(self, place: Place, companion: Any) -> None:
        """What it would take nobody would get."""
        with client(place).attach(MODEL) as attachment:
            handed: Any = SimpleNamespace(hand_over=None)
            new = ProcessedUpdate(attachment, handed, place.settings)
            new.check([])
            new.close()
            for use in (lambda: new.load(values(1)), lambda: new.check([])):
                with pytest.raises(BadRequestError, match=r"This update of .* is over"):
                    use()

    @pytest.mark.parametrize("version", ["", "x" * 5000, 7, b"7"])
    def test_needs_a_version(self, place: Place, companion: Any, version: Any) -> None:
        """One that can be shown."""
        with pytest.raises(BadRequestError), client(place).update(MODEL, version=version) as new:
            new.load(values(1))
        assert held(place) == [(1, "")]

    @pytest.mark.parametrize("number", [-1, 1 << 60, "1", 1.0, None])
    def test_names_a_generation_by_a_number(self, place: Place, companion: Any, here: Here, number: Any) -> None:
        """What is none is refused as such, wherever it is given."""
        made = client(place)
        with pytest.raises(BadRequestError, match="is no number of a generation"):
            made.make_current(MODEL, number)
        with (
            pytest.raises(BadRequestError, match="is no number of a generation"),
            made.update(MODEL, version="one", base=number),
        ):
            raise AssertionError("it writes")
        here().tell("attach")
        with made.attach(MODEL) as attachment, pytest.raises(BadRequestError, match="is no number of a generation"):
            attachment.prepare(number, place.settings)
        assert held(place) == [(1, "")]

    def test_is_told_all_that_does_not_fit(self, place: Place, companion: Any) -> None:
        """Before anything is written: what is committed then is what was there."""
        bad = values(1) | {
            "embed.weight": torch.zeros(64, 17, dtype=torch.bfloat16),
            "turned": torch.zeros(3, 6, dtype=torch.float64),
            "lm_head.weight": torch.zeros(1),
        }
        with client(place).update(MODEL, version="one") as new, pytest.raises(BadRequestError) as told:
            new.load(bad)
        for text in (
            "embed.weight of shape (64, 17) instead of (64, 16)",
            "turned of torch.float64 instead of torch.float32",
            "lm_head.weight, which it does not have",
        ):
            assert text in str(told.value)
        with client(place).attach(MODEL) as found:
            assert digests(found.tensors) == digests(values(LOADED))

    def test_that_is_refused_writes_nothing(self, place: Place, companion: Any) -> None:
        """A version that cannot be shown, before anybody attaches; what is not finite, before it is written."""
        with pytest.raises(BadRequestError, match="version"), client(place).update("nobody's", version="a\nb"):
            raise AssertionError("nothing to write")
        bad = values(1)
        bad["turned"][1, 2] = float("nan")
        with (
            pytest.raises(BadRequestError, match=r"test/model \(single\) on cpu cannot take turned, which has values"),
            client(place).update(MODEL, version="one", check_finite=True) as new,
        ):
            new.load(bad)
        assert held(place) == [(1, "")]
        assert entry_of(place).leases == ()

    def test_that_shall_be_processed_needs_to_know_how(self, place: Place, companion: Any) -> None:
        """Which tensors vLLM loads, the publisher has not observed here. Nothing is started for it."""
        with (
            pytest.raises(BadRequestError, match="was not observed by its publisher"),
            client(place).update(MODEL, version="one", mode="processed"),
        ):
            raise AssertionError("nothing to write")
        with pytest.raises(SettingsError, match="'swift'"), client(place).update(MODEL, "one", mode="swift"):  # type: ignore[arg-type]
            raise AssertionError("no such mode")
        assert held(place) == [(1, "")]

    @pytest.mark.parametrize("when", ["before it began", "while it wrote"])
    def test_overwrites_no_other(self, place: Place, companion: Any, start: Start, here: Here, when: str) -> None:
        """If it says by which generation it goes, and another one has become current."""
        engine = start()
        engine.tell("attach")
        here().tell("write", step=1)
        base = 2 if when == "while it wrote" else 1

        def write() -> None:
            with client(place).update(MODEL, version="mine", base=base) as new:
                assert when == "while it wrote"
                new.load(values(2))
                client(place).make_current(MODEL, 1, base=2)

        with pytest.raises(StaleError, match=rf"Generation {base} of test/model \(single\) is not current"):
            write()
        assert [version for _, version in held(place)] == ["", "step-1"]
        current = entry_of(place).generation
        with client(place).update(MODEL, version="mine", base=current) as new:
            new.load(values(2))
        assert (entry_of(place).generation, entry_of(place).version) == (3, "mine")

    def test_advances_to_what_was_committed_before_it_began(self, place: Place, companion: Any, here: Here) -> None:
        """What it does not send comes from the generation that is current, not from one that it happened to map."""
        with client(place).attach(MODEL) as attachment:
            here().tell("write", step=1)
            with updating(attachment, "step-2", place.settings) as new:
                new.load({"steps": values(2)["steps"]})
            assert not attachment.arena.fds.closed  # it can still hand back what it maps
        with client(place).attach(MODEL) as found:
            assert digests(found.tensors) == digests({**values(1), "steps": values(2)["steps"]})


LOSES = """
import asyncio, os, runpy, signal, sys
from vllm_companion_plugin.holder.service.service import CompanionService
inner = CompanionService.CommitStaged
async def commit(self, request, context):
    {before}
    answer = await inner(self, request, context)
    {after}
    return answer
CompanionService.CommitStaged = commit
sys.argv = ["holder", "--device", "cpu"]
runpy.run_module("vllm_companion_plugin.holder", run_name="__main__")
"""
DIES, IS_SILENT = "os.kill(os.getpid(), signal.SIGKILL)", "await asyncio.sleep(10)"


class TestLostAnswer:
    """A trainer is told what nobody knows, and writing again by the generation that it went by writes once."""

    @staticmethod
    def losing(place: Place, monkeypatch: pytest.MonkeyPatch, *, before: str = "pass", after: str = "pass") -> None:
        """A companion that does something else before it commits, or before it answers; with weights of step 0."""
        code = LOSES.format(before=before, after=after)
        with monkeypatch.context() as patch:
            patch.setattr(place, "run", lambda *_: Place.run(place, "-c", code))
            loaded(place)
        monkeypatch.setattr(lease, "ANSWER_TIMEOUT_S", 3.0)

    @staticmethod
    def write(place: Place, step: int) -> None:
        """By the checkpoint's generation."""
        with client(place).update(MODEL, version=f"step-{step}", base=1) as new:
            new.load(values(step))

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_dies(self, place: Place, monkeypatch: pytest.MonkeyPatch, here: Here, when: str) -> None:
        """What was committed has gone with the companion, as nobody maps it: the next one can be written."""
        self.losing(place, monkeypatch, **{when: DIES})
        engine = here()
        engine.tell("attach")
        died = place.companion_pid()
        with pytest.raises(CommitUnknownError, match=r"step-1 is current by now, or nothing.* generations.*base=1: "):
            self.write(place, 1)
        until(lambda: place.companion_pid() != died and is_listening(place.paths), 30, "the next one is there")
        engine.tell("wait_known")
        assert held(place) == [(1, "")]
        self.write(place, 2)
        assert has(here().tell("attach"), 2, 2)

    def test_is_silent(self, place: Place, monkeypatch: pytest.MonkeyPatch, here: Here) -> None:
        """What was committed is current, and stays so: a second time is refused."""
        self.losing(place, monkeypatch, after=IS_SILENT)
        with pytest.raises(CommitUnknownError, match="no answer came in time"):
            self.write(place, 1)
        with pytest.raises(StaleError, match=r"generation 2 \(step-1\) is"):
            self.write(place, 1)
        assert has(here().tell("attach"), 1, 2)

    def test_of_the_headless_process(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """It commits for the trainer, and may have ended before or after that."""
        monkeypatch.setattr(headless, "MODULE", "tests.process.headless_child")
        process = headless.Headless("cpu", torch.device("cpu"), KEY.id, MODEL, (), place.settings)
        process.begin("step-1", 0)
        with pytest.raises(CommitUnknownError, match=r"headless process .* step-1 is current by now, or .*base=1"):
            process.commit("step-1", 1)
        assert process.ended


class TestClient:
    """A client switches when it wants to."""

    def test_goes_back_and_forth(self, place: Place, companion: Any, here: Here) -> None:
        """A rollback moves nobody, and is what new clients get."""
        engine = here()
        engine.tell("attach")
        here().tell("write", step=1)
        assert has(engine.tell("advance"), 1, 2)
        (entry,) = client(place).make_current(MODEL, 1)
        assert (entry.generation, entry.version) == (1, "")
        assert has(engine.tell("look"), 1, 2)
        assert has(here().tell("attach"), LOADED, 1)
        assert has(engine.tell("advance"), LOADED, 1)
        client(place).make_current(MODEL, 2)
        assert has(engine.tell("advance"), 1, 2)
        refused = engine.tell("advance", to=9)
        assert refused["error"] == "not_found"
        assert has(engine.tell("look"), 1, 2)

    def test_is_told_what_is_current(self, place: Place, companion: Any, here: Here) -> None:
        """A commit and a rollback, and again by the next companion. Nothing is mapped by that."""
        engine = here()
        engine.tell("attach")
        assert engine.attachment.current == 1
        here().tell("write", step=1)
        until(lambda: engine.attachment.current == 2, 5, "it is told of the commit")
        assert has(engine.tell("look"), LOADED, 1)
        client(place).make_current(MODEL, 1)
        until(lambda: engine.attachment.current == 1, 5, "it is told of the rollback")

    def test_that_is_killed_between_prepare_and_advance_changes_nothing(
        self, place: Place, companion: Any, start: Start, here: Here
    ) -> None:
        """For those who were about to switch with it."""
        engines = [start(), start()]
        for engine in engines:
            engine.tell("attach")
        here().tell("write", step=1)
        for engine in engines:
            assert engine.tell("prepare") == {"prepared": 2}
        engines[0].kill()
        until(lambda: len(entry_of(place).leases) == 1, 5, "the companion knows that it is gone")
        assert has(engines[1].tell("look"), LOADED, 1)
        assert has(engines[1].tell("switch"), 1, 2)
        assert held(place) == [(1, ""), (2, "step-1")]

    def test_never_gets_one_generation_for_another(self, place: Place, companion: Any, here: Here) -> None:
        """What was dropped between the question and the descriptors is refused."""
        trainer = here()
        trainer.tell("write", step=1)
        with connect("cpu", place.settings, spawn=False) as connection:
            lease = connection.attach(model=MODEL, may_load=False, client_name="slow")
            ready = lease.wait(30)
            assert isinstance(ready, Ready)
            ready.redeem().close()
            trainer.tell("write", step=2)
            other = lease.generation(3, ready.manifest)
            for step in (3, 4):
                trainer.tell("write", step=step)
            with pytest.raises(TicketError, match="Generation 3 of test/model was dropped"):
                other.redeem()

    def test_with_processed_copies_keeps_what_they_were_made_of(self, place: Place, companion: Any, here: Here) -> None:
        """It advances to nothing else, and does not follow when it wakes: its copies would be of other weights."""
        engine, other = here(follow_updates=True), here()
        engine.tell("attach"), other.tell("attach")
        engine.attachment.fix("its kernels use copies")
        here().tell("write", step=1)
        refused = engine.tell("advance")
        assert refused["error"] == "layout"
        assert "cannot advance to generation 2: its kernels use copies" in refused["text"]
        assert has(engine.tell("look"), LOADED, 1)
        other.tell("advance")
        engine.tell("sleep")
        assert has(engine.tell("wake"), LOADED, 1)
        assert has(engine.tell("advance", to=1), LOADED, 1)

    def test_hands_back_what_a_trainer_wrote(
        self, place: Place, companion: subprocess.Popen[str], start: Start, here: Here
    ) -> None:
        """Number and version survive the companion; and a client that was behind can advance afterwards."""
        engine, behind = start(), here()
        engine.tell("attach"), behind.tell("attach")
        here().tell("write", step=1)
        engine.tell("advance")
        before = entry_of(place)
        companion.kill()
        companion.wait(30)
        answer = engine.tell("wait_known")
        assert has(answer, 1, 2)
        assert not answer["lost"]
        answer = behind.tell("wait_known")
        assert has(answer, LOADED, 1)
        assert not answer["lost"]
        after = entry_of(place)
        assert (after.generation, after.version, after.ready_unix_s) == (2, "step-1", before.ready_unix_s)
        assert [(each.number, each.pids) for each in after.generations] == [(2, (engine.process.pid,))]
        assert has(behind.tell("advance"), 1, 2)
        assert "error" not in here().tell("write", step=2)
        assert has(behind.tell("advance"), 2, 3)

    def test_is_shown_on_what_the_next_companion_does_not_have(
        self, place: Place, companion: Any, start: Start, here: Here, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Which has what was current alone, and shows who maps something else until that client advances."""
        quick, slow = start(), start()
        for engine in (quick, slow):
            engine.tell("attach")
        here().tell("write", step=1)
        quick.tell("advance")
        companion.kill()
        companion.wait(30)
        for engine in (quick, slow):
            engine.tell("wait_known")
        assert held(place) == [(2, "step-1")]
        pids = [quick.process.pid, slow.process.pid]
        entry = entry_of(place)
        assert {lease.pid: lease.generation for lease in entry.leases} == dict(zip(pids, (2, 1), strict=True))
        assert entry.not_held == {1: (pids[1],)}
        options = ["--runtime-dir", place.settings.runtime_dir]
        assert cli(["status", *options]) == Exit.DONE
        assert f"1 is used by {pids[1]} and not held." in " ".join(capsys.readouterr().out.split())
        assert cli(["generations", *options]) == Exit.DONE
        assert ["1", "-", "not", "held", "-", str(pids[1]), "-"] in [
            line.split() for line in capsys.readouterr().out.splitlines()
        ]
        assert has(slow.tell("advance"), 1, 2)
        assert entry_of(place).not_held == {}

    def test_advances_though_the_companion_dies(
        self, place: Place, companion: subprocess.Popen[str], start: Start
    ) -> None:
        """It asks the next one, as it does when it falls asleep: updates go on."""
        engine, other, trainer = start(), start(), start()
        engine.tell("attach"), other.tell("attach")
        for step in range(1, 6):
            assert trainer.tell("write", step=step) == {}
            assert has(other.tell("advance"), step, step + 1)
            pid = place.companion_pid()
            os.kill(pid, signal.SIGKILL)
            until(lambda: not alive(pid), 5, "it is dead")  # noqa: B023
            assert has(engine.tell("advance"), step, step + 1)

    def test_is_told_that_the_entry_was_unloaded(self, companion: object, place: Place, here: Here) -> None:
        """It keeps what it maps, and cannot advance."""
        engine = here()
        engine.tell("attach")
        with connect("cpu", place.settings, spawn=False) as connection:
            connection.unload(force=True)
        until(lambda: engine.attachment._mirror is None or engine.attachment._mirror.ended, 5, "it is told")
        answer = engine.tell("advance")
        assert (answer["error"], "was unloaded" in answer["text"]) == ("not_found", True)

    @pytest.mark.parametrize("forward", [False, True])
    def test_hands_back_what_was_current_after_a_rollback(
        self, place: Place, companion: subprocess.Popen[str], start: Start, here: Here, forward: bool
    ) -> None:
        """Not the newest one, though that is mapped, too; unless that was made current again."""
        back, newest = start(), here()
        back.tell("attach"), newest.tell("attach")
        here().tell("write", step=1)
        newest.tell("advance")
        client(place).make_current(MODEL, 1)
        if forward:
            client(place).make_current(MODEL, 2)
        companion.kill()
        companion.wait(30)
        for engine in (newest, back):
            assert not engine.tell("wait_known")["lost"]
        entry = entry_of(place)
        assert (entry.generation, entry.version) == ((2, "step-1") if forward else (1, ""))
        assert has(newest.tell("look"), 1, 2)
        assert newest.attachment.current == entry.generation
        assert has(back.tell("advance"), 1, 2) if forward else has(newest.tell("advance"), LOADED, 1)
        assert "error" not in here().tell("write", step=2)
        assert held(place)[-1] == (3, "step-2")
        assert has(newest.tell("advance"), 2, 3)


class TestSleeper:
    """A client that wakes gets what it had, unless it follows."""

    def updated(self, engine: Tells, other: Tells, trainer: Tells, steps: int) -> None:
        """`engine` slept while `trainer` wrote so many generations, and `other` was awake all the time."""
        engine.tell("attach"), other.tell("attach")
        assert engine.tell("sleep") == {"where": "device"}
        for step in range(1, steps + 1):
            trainer.tell("write", step=step)
            other.tell("advance")

    def test_gets_its_own_generation_if_that_is_held(
        self, place: Place, companion: Any, start: Start, here: Here
    ) -> None:
        """The companion knows which one it maps."""
        engine, other = start(), here()
        self.updated(engine, other, here(), 1)
        assert has(engine.tell("wake"), LOADED, 1)
        pids = {each.number: each.pids for each in entry_of(place).generations}
        assert pids == {1: (engine.process.pid,), 2: (os.getpid(),)}

    def test_is_refused_if_that_is_gone(self, place: Place, companion: Any, here: Here) -> None:
        """It stays asleep, and nothing is mapped. If what it had is current again it wakes."""
        engine, other = here(), here()
        self.updated(engine, other, here(), 2)
        assert [number for number, _ in held(place)] == [2, 3]
        refused = engine.tell("wake")
        assert refused["error"] == "layout"
        assert "what the engine had is not held any more" in refused["text"]
        assert "follow_updates" in refused["text"]

    @pytest.mark.parametrize("how", ["by the setting", "by having advanced before"])
    def test_gets_the_new_one_if_it_follows(self, place: Place, companion: Any, here: Here, how: str) -> None:
        """Whatever is current."""
        engine, trainer = here(follow_updates=how == "by the setting"), here()
        engine.tell("attach")
        if how == "by having advanced before":
            trainer.tell("write", step=1)
            engine.tell("advance")
            latest = 4
        else:
            latest = 3
        other = here()
        other.tell("attach")
        engine.tell("sleep")
        for step in range(latest - 2, latest):
            trainer.tell("write", step=step)
            other.tell("advance")
        assert has(engine.tell("wake"), latest - 1, latest)

    @pytest.mark.parametrize("level", [1, 2])
    @pytest.mark.parametrize("follows", [False, True])
    def test_leaves_what_was_written_in_host_memory(
        self, place: Place, companion: Any, here: Here, level: int, follows: bool
    ) -> None:
        """As the last one, though it maps an older generation: no checkpoint has the current one."""
        engine = here(follow_updates=follows)
        engine.tell("attach")
        assert here().tell("write", step=1) == {}
        until(lambda: len(entry_of(place).leases) == 1, 5, "the trainer has left")
        assert engine.tell("sleep", level=level) == {"where": "host"}
        entry = entry_of(place)
        assert (entry.state, entry.generation, entry.version) == (EntryState.PARKED, 2, "step-1")
        woken = engine.tell("wake")
        if follows:
            assert has(woken, 1, 2)
        else:
            assert (woken["error"], entry_of(place).state) == ("layout", EntryState.PARKED)

    def test_gets_no_checkpoint_though_the_clock_was_set_back(
        self, place: Place, companion: subprocess.Popen[str], here: Here
    ) -> None:
        """What was loaded since has a higher number, whatever the time was."""
        engine = here()
        engine.tell("attach")
        here().tell("write", step=1)
        engine.tell("advance")
        engine.tell("sleep")
        its = engine.attachment.held
        engine.attachment.held = replace(its, published=replace(its.published, ready_unix_s=time.time() + 1e6))
        with connect("cpu", place.settings, spawn=False) as connection:
            connection.unload(key_id=KEY.id, force=True)
            load(connection, Small())
        refused = engine.tell("wake")
        assert refused.get("error") == "layout"
        assert "was step-1, which a trainer had written, and nobody has it any more" in refused["text"]

    @pytest.mark.parametrize("is_loaded_since", [False, True])
    def test_gets_no_checkpoint_for_what_a_trainer_wrote(
        self, place: Place, companion: subprocess.Popen[str], here: Here, is_loaded_since: bool
    ) -> None:
        """All slept when the companion died: what they had is lost, and they are told so.

        Also if another one has loaded the checkpoint since, though its number is lower than that of what was lost.
        """
        engine = here()
        engine.tell("attach")
        here().tell("write", step=1)
        engine.tell("advance")
        until(lambda: len(entry_of(place).leases) == 1, 5, "the trainer has left")
        engine.tell("sleep")
        companion.kill()
        companion.wait(30)
        if is_loaded_since:
            place.companion()
            until(lambda: is_listening(place.paths), 20, "the next one listens")
            hold_zeros(place).close()
            assert held(place) == [(1, "")]
        refused = engine.tell("wake")
        assert refused["error"] == "layout"
        assert "was step-1, which a trainer had written, and nobody has it any more" in refused["text"]

    @pytest.mark.parametrize("follows", [False, True])
    def test_knows_that_its_number_was_given_again(
        self, place: Place, companion: subprocess.Popen[str], start: Start, here: Here, follows: bool
    ) -> None:
        """The companion that had it has died, and what was handed back to the next one is older."""
        behind, engine = start(), here()
        behind.tell("attach"), engine.tell("attach")
        here().tell("write", step=1)
        engine.tell("advance")
        until(lambda: len(entry_of(place).leases) == 2, 5, "the trainer has left")
        engine.tell("sleep")
        engine.attachment._follows = follows
        companion.kill()
        companion.wait(30)
        behind.tell("wait_known")
        here().tell("write", step=2)
        assert held(place) == [(1, ""), (2, "step-2")]
        woken = engine.tell("wake")
        if follows:
            assert has(woken, 2, 2)
            assert woken["is_stale"], "what it has cloned is of before"
        else:
            assert woken["error"] == "layout"


class TestHolder:
    """Who only holds weights for the next companion."""

    def test_follows(self, place: Place, companion: subprocess.Popen[str], here: Here) -> None:
        """A `serve` holds what is current, and hands it back with its version. No older one stays because of it."""
        serve = place.run("-m", "vllm_companion_plugin.cli.main", "serve", "--device", "cpu")
        until(lambda: memfds(serve.pid) == 1, 20, "the weights are held, by one descriptor")
        trainer = here()
        for step in range(1, 6):
            assert trainer.tell("write", step=step) == {}
        until(lambda: held(place) == [(5, "step-4"), (6, "step-5")], 10, "the older ones are let go")
        until(lambda: [number for _, number in notes.held(place.paths)] == [6], 10, "the newest one is noted")
        until(lambda: memfds(serve.pid) == 1, 10, "nothing else is held")
        companion.kill()
        companion.wait(30)

        def is_back() -> bool:
            with contextlib.suppress(CompanionError):
                return held(place) == [(6, "step-5")]
            return False

        until(is_back, 30, "it is handed back")
        assert has(here().tell("attach"), 5, 6)
        serve.terminate()
        serve.wait(30)

    def test_hands_back_no_generation_of_what_was_unloaded(
        self, place: Place, companion: subprocess.Popen[str], start: Start, here: Here
    ) -> None:
        """A client that hangs is not told, and its note says nothing any more."""
        engine = start()
        engine.tell("attach")
        assert here().tell("write", step=1) == {}
        assert [number for _, number in notes.held(place.paths)] == [1]
        engine.process.send_signal(signal.SIGSTOP)
        with connect("cpu", place.settings, spawn=False) as connection:
            connection.unload(model=MODEL, force=True)
        assert list(notes.held(place.paths)) == []
        engine.process.send_signal(signal.SIGCONT)
        assert has(engine.tell("look"), LOADED, 1)
