"""Engines that decide beside a real companion whether they load, in this process; none is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tests.support import publishing
from tests.support.configs import config
from tests.support.place import Place
from vllm_companion_plugin.engine import decide, decisions
from vllm_companion_plugin.settings import Settings


class Engines:
    """Decisions of engines on one device, and what the loading ones publish."""

    def __init__(self, place: Place) -> None:
        self.settings: Settings = place.settings
        self._decisions: list[Any] = []

    def decide(self, model: Path, **options: Any) -> decisions.Attach | decisions.Load:
        made = config(model, **options)
        decision = decide._decide(made, made.model_config, self.settings)
        assert not isinstance(decision, decisions.Alone)
        self._decisions.append(decision)
        return decision

    def load(self, model: Path, **options: Any) -> decisions.Load:
        """Decide, expect to be elected, and publish something under the key."""
        decision = self.decide(model, **options)
        assert isinstance(decision, decisions.Load)
        publish(decision)
        return decision

    def attaches(self, model: Path, **options: Any) -> bool:
        decision = self.decide(model, **options)
        decision.close()
        return isinstance(decision, decisions.Attach)

    def close(self) -> None:
        for decision in self._decisions:
            decision.close()


def publish(decision: decisions.Load) -> None:
    """Something small, as the weights of whoever was elected."""
    publishing.publish(decision.granted.publication, nn.Linear(2, 2))
    decision.election.release()


def kept(engines: Engines) -> int:
    """How many digests of files are kept."""
    directory = Path(engines.settings.runtime_dir, "digests")
    return len([path for path in directory.iterdir() if path.name != "lock"]) if directory.exists() else 0
