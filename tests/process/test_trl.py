"""TRL's drop-in, a real companion, and engines that do not switch. tests/vllm/test_fleet.py has those that do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.process.test_update import client, entry_of, held, loaded
from tests.process.update_child import MODEL, values
from tests.support.place import Place
from tests.unit.test_fleet import Rollout
from vllm_companion_plugin.core.plans import error_answer
from vllm_companion_plugin.errors import FleetError, LayoutError
from vllm_companion_plugin.trainers.trl import CompanionWeightTransfer

REFUSES = {"prepare": [error_answer(LayoutError("its kernels use other copies"))]}


def transfer(place: Place, *engines: Any) -> CompanionWeightTransfer:
    return CompanionWeightTransfer(MODEL, engines, device="cpu", runtime_dir=place.settings.runtime_dir)


def send(to: CompanionWeightTransfer) -> None:
    to.send_weights(iter([("steps", values(1)["steps"])]))


class TestSendWeights:
    """Whoever attaches later gets what the engines have."""

    def test_refused(self, place: Place) -> None:
        """No engine has switched: what they have is current again, and the error says both."""
        loaded(place)
        engine = Rollout(**REFUSES)
        to = transfer(place, Rollout(), engine)
        with pytest.raises(FleetError, match=r"use other copies\. Generation 1 is current again\. ") as raised:
            send(to)
        assert [each.state for each in raised.value.report.engines] == ["old", "old"]
        assert (entry_of(place).generation, held(place)) == (1, [(1, ""), (2, "step-1")])
        engine.faults.clear()
        send(to)
        assert (entry_of(place).generation, entry_of(place).version) == (3, "step-2")
        to.destroy()

    def test_no_engine(self, place: Place) -> None:
        """Nobody was told anything."""
        loaded(place)
        with pytest.raises(FleetError, match=r"is no engine.* Generation 1 is current again\. Name the URL"):
            send(transfer(place, object()))
        assert entry_of(place).generation == 1

    def test_lost(self, place: Place) -> None:
        """An engine has switched, so what it has stays current."""
        loaded(place)
        died = type("EngineDeadError", (Exception,), {})()
        with pytest.raises(FleetError, match="1 of 2 engines have taken") as raised:
            send(transfer(place, Rollout(), Rollout(switch=died, resume=died)))
        assert "current again" not in str(raised.value)
        assert entry_of(place).version == "step-1"

    def test_overtaken(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another one has made something else current meanwhile, which stays so."""
        loaded(place)

        class Slow(Rollout):
            def collective_rpc(self, *arguments: Any, **options: Any) -> Any:
                with client(place).update(MODEL, "others") as new:
                    new.load({"steps": values(2)["steps"]})
                monkeypatch.setattr(Slow, "collective_rpc", Rollout.collective_rpc)
                return super().collective_rpc(*arguments, **options)

        wanted = r"other copies.* before step-1 could not be made so again: Generation 2 of .* is not current"
        with client(place).attach(MODEL), pytest.raises(FleetError, match=wanted):
            send(transfer(place, Slow(**REFUSES)))
        assert entry_of(place).version == "others"
