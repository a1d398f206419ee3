"""Who loads, who waits and who attaches: asked of a real companion, which may go away meanwhile."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints.copies import copy_of
from tests.support.configs import config
from tests.support.deciding import Engines, publish
from tests.support.keys import key_of
from tests.support.place import Place
from vllm_companion_plugin.client.connection import CompanionConnection
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine import decide, decisions, session
from vllm_companion_plugin.engine.vllm import sharing
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, NotShareableError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening

pytestmark = pytest.mark.usefixtures("one_rank")


def test_what_is_held_takes_one_question(engines: Engines, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status, which lists every entry with its files, is asked for only if the entry is not there."""
    engines.load(tiny)
    asked, paths = list[str](), device_paths("cpu", engines.settings)

    def counted(name: str) -> None:
        inner = getattr(CompanionConnection, name)

        def ask(self: CompanionConnection, *args: Any, **options: Any) -> Any:
            if self._paths == paths:  # and not by a thread that an earlier test has left
                asked.append(name)
            return inner(self, *args, **options)

        monkeypatch.setattr(CompanionConnection, name, ask)

    for name in ("status", "attach", "check_protocol"):
        counted(name)
    bound = engines.decide(tiny, kv_cache_memory_bytes=1 << 20)  # or the room for it would be asked about
    assert isinstance(bound, decisions.Attach)
    assert asked == ["attach"]


def test_copies_that_start_together_load_once(engines: Engines, first: Path) -> None:
    copied = copy_of(first)
    loader = engines.decide(first)
    assert isinstance(loader, decisions.Load)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(engines.decide(copied)))
    other.start()
    other.join(1)
    assert other.is_alive(), "it waits"
    publish(loader)
    other.join(30)
    assert isinstance(found[0], decisions.Attach)


def test_whoever_was_elected_looks_again(engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both asked before either was known, so each has an election of its own; the device's lock orders them."""
    copied = copy_of(first)
    loader = engines.decide(first)
    assert isinstance(loader, decisions.Load)
    held = decide._held
    asked: list[Any] = []

    def blind_at_first(status: Any, wanted: EntryKey, *rest: Any) -> EntryKey:
        asked.append(rest)
        return wanted if len(asked) == 1 else held(status, wanted, *rest)

    monkeypatch.setattr(decide, "_held", blind_at_first)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(engines.decide(copied)))
    other.start()
    other.join(1)
    assert other.is_alive(), "it waits for the lock"
    publish(loader)
    other.join(30)
    assert isinstance(found[0], decisions.Attach)
    assert len(asked) == 2


def test_who_was_elected_for_a_copy_takes_its_own_if_that_is_there_by_then(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_of(first)
    engines.load(first)
    held, answers = decide._held, [key_of(copied)]
    monkeypatch.setattr(decide, "_held", lambda *rest: answers.pop() if answers else held(*rest))
    assert engines.attaches(first)


def test_an_engine_that_writes_to_its_weights_copies_what_is_held_and_publishes_nothing(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "must_own_reason", lambda config: "EPLB moves expert weights in place")
    with pytest.raises(NotShareableError, match=r"EPLB .* nobody holds them to be copied"):
        engines.decide(first)
    assert session.current()._connections["cpu"].status().entries == ()
    asked_for = replace(engines.settings, share="copy")
    made = config(first)
    loader = decide._decide(made, made.model_config, asked_for)
    assert isinstance(loader, decisions.Load)
    publish(loader)
    assert engines.attaches(first)
    loader.close()


def test_what_a_failed_engine_was_to_load_is_left_to_the_next_in_the_same_process(
    engines: Engines, first: Path
) -> None:
    """An engine may end between its decision and its load: its share of the memory may be too small."""
    made = config(first)
    assert isinstance(decide.decide(made, made.model_config, engines.settings), decisions.Load)
    again = config(first)
    del made
    gc.collect()
    decision = decide.decide(again, again.model_config, replace(engines.settings, wait_timeout_s=30))
    assert isinstance(decision, decisions.Load)
    session.current().forget(again.model_config)
    decision.close()


@pytest.mark.parametrize("how", ["killed", "stopped", "told to end"])
def test_a_companion_that_goes_away_is_followed_by_one_that_answers(
    engines: Engines, place: Place, tiny: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """For a moment the system accepts connections to the one that is gone, or going."""
    ask, gone = decide._Question.ask, []

    def end_first(self: Any, *args: Any, **options: Any) -> Any:
        if not gone:
            gone.append(place.companion_pid())
            if how == "stopped":
                self.connection.shutdown()
            else:
                os.kill(gone[0], signal.SIGKILL if how == "killed" else signal.SIGTERM)
            raise CompanionUnavailableError("it is gone")
        return ask(self, *args, **options)

    monkeypatch.setattr(decide._Question, "ask", end_first)
    engines.load(tiny)
    assert place.companion_pid() != gone[0]


def test_who_knew_a_companion_that_was_killed_and_followed_asks_the_next_one(
    engines: Engines, place: Place, first: Path
) -> None:
    engines.load(first)
    place.processes[-1].kill()
    place.processes[-1].wait(30)
    following = threading.Thread(target=place.companion)
    following.start()
    while not is_listening(place.paths):  # a channel that has failed waits before it connects again
        with contextlib.suppress(CompanionError):
            session.current()._connections["cpu"].status()
    following.join(30)
    assert isinstance(engines.decide(first), decisions.Load)
