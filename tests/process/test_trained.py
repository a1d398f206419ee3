"""A generation that its owner writes in place, and what becomes of it: real processes around a real companion."""

from __future__ import annotations

import subprocess

import pytest

from tests.process.test_update import LOADED, Start, entry_of, has, held, loaded
from tests.process.test_update import start as start
from tests.process.update_child import digests, values
from tests.support.place import Place, until

__all__ = ["start"]


@pytest.fixture
def companion(place: Place) -> subprocess.Popen[str]:
    return loaded(place)


class TestOwner:
    def test_writes_what_a_reader_sees(self, place: Place, companion: object, start: Start) -> None:
        """At once, without a call; the reader never maps it writable, and neither does the owner between steps."""
        reader, owner = start(), start()
        assert has(reader.tell("attach"), LOADED, 1)
        owned = owner.tell("own", version="step-1")
        assert (owned["generation"], owned["digests"]) == (2, digests(values(LOADED)))
        assert has(reader.tell("look"), LOADED, 1), "nobody is moved"
        reader.tell("advance")
        for step in (1, 2):
            owner.tell("step", step=step)
            seen = reader.tell("look")
            assert (seen["generation"], seen["digests"]) == (2, digests(values(step)))
            assert reader.tell("rights")["rights"] == ["r--s"]
            assert owner.tell("rights")["rights"] == ["r--s", "r--s"]
        assert reader.tell("verify")["said"] == "not verified: it is trained, and has no checksums"
        assert [each.trained for each in entry_of(place).generations] == [False, True]

    def test_that_is_killed_leaves_what_it_wrote(self, place: Place, companion: object, start: Start) -> None:
        """Readers keep it, the next one attaches to it, nobody writes, and the generation before is the way back."""
        reader, owner = start(), start()
        owner.tell("own", version="step-1")
        reader.tell("attach")
        owner.tell("step", step=1, only=["embed.weight"])  # it dies in the middle of one
        owner.kill()
        until(lambda: len(entry_of(place).leases) == 1, 5, "the companion knows that the owner is gone")
        half = digests({**values(LOADED), "embed.weight": values(1)["embed.weight"]})
        assert reader.tell("look")["digests"] == half
        last = start()
        assert last.tell("attach")["digests"] == half
        assert held(place) == [(1, ""), (2, "step-1")]
        assert has(reader.tell("advance", to=1), LOADED, 1)
        assert has(last.tell("advance", to=1), LOADED, 1)
        assert "error" not in start().tell("write", step=3)
        assert has(reader.tell("advance"), 3, 3)

    def test_goes_on_with_the_next_companion(self, place: Place, companion: object, start: Start) -> None:
        """After this one died: the generation is handed back as it is, and steps reach who comes then."""
        assert isinstance(companion, subprocess.Popen)
        reader, owner = start(), start()
        owner.tell("own", version="step-1")
        reader.tell("attach")
        companion.kill()
        companion.wait(30)
        for process in (owner, reader):
            answer = process.tell("wait_known")
            assert (answer["lost"], answer["generation"], answer["version"]) == (False, 2, "step-1")
        assert [(each.number, each.trained) for each in entry_of(place).generations] == [(2, True)]
        late = start()
        late.tell("attach")
        owner.tell("step", step=1)
        for process in (reader, late):
            assert process.tell("look")["digests"] == digests(values(1))
        assert late.tell("rights")["rights"] == ["r--s"]

    def test_keeps_the_bytes_on_the_device_while_others_sleep(
        self, place: Place, companion: object, start: Start
    ) -> None:
        """Who wakes has what was written meanwhile, and knows that what it has cloned is of before."""
        reader, owner = start(), start()
        owner.tell("own", version="step-1")
        reader.tell("attach")
        assert reader.tell("sleep") == {"where": "device"}
        owner.tell("step", step=1)
        woken = reader.tell("wake")
        assert (woken["source"], woken["digests"], woken["is_stale"]) == ("device", digests(values(1)), True)

    def test_that_has_left_lets_it_be_parked(self, place: Place, companion: object, start: Start) -> None:
        """In host memory, where its bytes are as it left them; also while nobody owns it they come back."""
        reader, owner = start(), start()
        owner.tell("own", version="step-1")
        reader.tell("attach")
        owner.tell("step", step=1)
        assert owner.tell("leave") == {}
        until(lambda: len(entry_of(place).leases) == 1, 5, "the companion knows that the owner has left")
        assert reader.tell("sleep", level=2) == {"where": "host"}, "no checkpoint has it"
        woken = reader.tell("wake")
        assert (woken["source"], woken["generation"], woken["digests"]) == ("host", 2, digests(values(1)))

    def test_does_not_reach_memory_that_is_private(self, place: Place, companion: object, start: Start) -> None:
        """An engine that has made the bytes its own has those of that moment."""
        reader, owner = start(), start()
        owner.tell("own", version="step-1")
        reader.tell("attach")
        owner.tell("step", step=1)
        reader.tell("privatize")
        owner.tell("step", step=2)
        assert reader.tell("look")["digests"] == digests(values(1))
