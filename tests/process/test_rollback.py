"""`generations` and `rollback` against a real companion, whose weights a real trainer writes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.process.test_cli import cli
from tests.process.test_update import MODEL, client, entry_of, held, loaded
from tests.process.update_child import digests, values
from tests.support.place import KEY, Place, speaking
from tests.support.publishing import Small, load
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import CompanionStatus, EntryState, EntryStatus, GenerationStatus
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.errors import StaleError
from vllm_companion_plugin.wire import codec, messages
from vllm_companion_plugin.wire.forking import grpc
from vllm_companion_plugin.wire.rpc import ERROR_METADATA


@pytest.fixture
def written(place: Place) -> Place:
    """A companion that keeps two generations besides the current one, and has had three updates."""
    place.environment["COMPANION_KEEP_PREVIOUS"] = "2"
    loaded(place)
    for step in (1, 2, 3):
        with client(place).update(MODEL, version=f"step-{step}") as new:
            new.load(values(step))
    assert held(place) == [(2, "step-1"), (3, "step-2"), (4, "step-3")]
    return place


class TestRollback:
    """The way back, step by step or by number."""

    def test_goes_back_as_far_as_generations_are_kept(self, written: Place) -> None:
        """Each time to the one that was current when the current one was written."""
        text = "Generation {} of test/model (single) is current on cpu, in place of {}.\n"
        assert cli(written, "rollback", "model") == (0, text.format("3 (step-2)", "4 (step-3)"), "")
        with client(written).attach(MODEL, name="reader") as found:
            assert digests(found.tensors) == digests(values(2))
            code, out, _ = cli(written, "rollback", KEY.id[:8])
            assert (code, out.splitlines()[0]) == (0, text.format("2 (step-1)", "3 (step-2)").rstrip())
            assert "maps generation 3 (step-2) until it advances." in out
        code, out, error = cli(written, "rollback", MODEL)
        assert (code, out) == (1, "")
        assert "has no generation 1; generation 2 (step-1) is current." in error
        assert "Held besides it: 3 (step-2), 4 (step-3). Choose with --to." in error
        assert cli(written, "rollback", MODEL, "--to", "4")[:2] == (0, text.format("4 (step-3)", "2 (step-1)"))
        same = "Generation 4 (step-3) of test/model (single) is current on cpu already.\n"
        assert cli(written, "rollback", MODEL, "--to", "4")[:2] == (0, same)
        assert cli(written, "rollback", MODEL, "--to", "1")[0] == 1
        assert entry_of(written).generation == 4

    def test_skips_what_was_rolled_back(self, written: Place) -> None:
        """What was written after a rollback goes back to where it came from, not to a higher number."""
        cli(written, "rollback", MODEL, "--to", "3")
        with client(written).update(MODEL, version="again") as new:
            new.load(values(4))
        assert (entry_of(written).generation, [number for number, _ in held(written)]) == (5, [3, 4, 5])
        assert cli(written, "rollback", MODEL)[0] == 0
        assert (entry_of(written).generation, entry_of(written).version) == (3, "step-2")

    def test_leaves_alone_what_nobody_wrote_to(self, written: Place) -> None:
        """A draft may have its target's name."""
        with connect("cpu", written.settings, spawn=False) as connection:
            load(connection, Small(), key=replace(KEY, id="cd" * 32, role="draft"))
            code, out, _ = cli(written, "rollback", MODEL)
        assert (code, out) == (
            0,
            "Generation 3 (step-2) of test/model (single) is current on cpu, in place of 4 (step-3).\n",
        )

    def test_of_nothing(self, place: Place) -> None:
        """What a checkpoint has; and a companion that has not begun, or has something else."""
        assert cli(place, "rollback", MODEL)[0] == 4
        loaded(place)
        code, _, error = cli(place, "rollback", MODEL)
        assert (code, "has no earlier one that is known; generation 1 is current" in error) == (1, True)
        code, _, error = cli(place, "rollback", "other/model")
        assert (code, "Nothing that is held matches model 'other/model'. `vllm-companion status` lists" in error) == (
            1,
            True,
        )
        assert cli(place, "rollback", MODEL, "--rank", "tp0/2")[0] == 1
        assert cli(place, "rollback", MODEL, "--to", "first")[0] == 2
        assert held(place) == [(1, "")]


class TestGenerations:
    """What there is, for people and for programs."""

    def test_are_shown(self, written: Place) -> None:
        """Version, state, users; as JSON with times and with what each one follows."""
        with client(written).attach(MODEL, name="reader"):
            client(written).make_current(MODEL, 3)
            code, out, _ = cli(written, "generations")
            rows = [line.split() for line in out.splitlines()]
            assert (code, rows[0]) == (0, ["GEN", "VERSION", "STATE", "SIZE", "USED", "BY", "AGE"])
            assert rows[1] == [KEY.id[:8], "model", "on", "cpu"]
            assert [row[:3] for row in rows[2:]] == [
                ["2", "step-1", "before"],
                ["3", "step-2", "current"],
                ["4", "step-3", "held"],
            ]
            assert rows[4][5].isdecimal()
            (entry,) = json.loads(cli(written, "generations", "model", "--json")[1])
            assert (entry["device"], entry["model"], entry["key_id"], entry["state"]) == ("cpu", MODEL, KEY.id, "ready")
            assert [(x["number"], x["follows"], x["is_current"], len(x["pids"])) for x in entry["generations"]] == [
                (2, 1, False, 0),
                (3, 2, True, 0),
                (4, 3, False, 1),
            ]
            assert all(abs(time.time() - x["ready_unix_s"]) < 60 for x in entry["generations"])
            shown = "generation 3 (step-2) is current, 2 (step-1) is kept, 4 (step-3) is used by"
            assert shown in " ".join(cli(written, "status")[1].split())
            (status,) = json.loads(cli(written, "status", "--json")[1])
            assert status["entries"][0]["generations"] == entry["generations"]
        assert cli(written, "generations", "nothing")[0] == 1

    def test_are_the_checkpoint_s(self, place: Place) -> None:
        """Of a model that nobody has updated, which `status` says nothing about."""
        loaded(place)
        assert cli(place, "generations")[1].splitlines()[2].split()[:3] == ["1", "-", "current"]
        assert "generation" not in cli(place, "status")[1]


class Refuses:
    """A companion of two ranks, of which the second one is committed to while the command runs."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        some = tuple(
            GenerationStatus(number, f"step-{number}", 1.0, 4096, number == 2, (), number - 1) for number in (1, 2)
        )
        made = EntryStatus(KEY, EntryState.READY, 2, 4096, 1, "memfd", 1.0, 1.0, None, (), generations=some)
        self.entries = tuple(
            replace(made, key=replace(KEY, id=digit * 64, rank=rank))
            for digit, rank in (("a", "tp0/2"), ("b", "tp1/2"))
        )

    def Status(self, request: Any, context: Any) -> Any:
        status = CompanionStatus("cpu", 5, "0", PROTOCOL_VERSION, 1.0, 600.0, 0.0, self.entries)
        return codec.companion_status_to_message(status)

    def MakeCurrent(self, request: Any, context: Any) -> Any:
        self.asked.append((request.query.key_id[0], request.generation, request.base))
        if request.query.key_id.startswith("b"):
            context.set_trailing_metadata(((ERROR_METADATA, StaleError.code),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Generation 2 is not current.")
        return messages.MakeCurrentResponse()

    def __getattr__(self, name: str) -> Any:
        def unexpected(request: Any, context: Any) -> Any:
            raise AssertionError(f"the command calls {name}")

        return unexpected


def test_a_rollback_of_all_ranks_or_of_none(place: Place) -> None:
    """If one of them is refused, those before it are taken back."""
    refuses = Refuses()
    with speaking(place, refuses):
        code, out, error = cli(place, "rollback", MODEL)
    assert (code, out) == (1, "")
    assert "Generation 2 is not current." in error
    assert refuses.asked == [("a", 1, 2), ("b", 1, 2), ("a", 2, 1)]
