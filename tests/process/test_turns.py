"""Engines of several ranks: how they decide when they start together, and how the ranks are told apart."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.support.checkpoints import models
from tests.support.place import Place, alive, until

DEVICES = [f"GPU-00000000-0000-0000-0000-00000000000{digit}" for digit in "12"]


def test_engines_of_two_ranks_decide_in_turn_and_replicas_have_names(place: Place, tmp_path: Path) -> None:
    models.make("llama", tmp_path / "llama", tiny=True)
    place.environment["COMPANION_WAIT_TIMEOUT_S"] = "30"
    try:
        child = place.run(
            str(Path(__file__).with_name("ranks_child.py")), str(tmp_path / "llama"), str(tmp_path), *DEVICES
        )
        out, err = child.communicate(timeout=250)
        found = json.loads(out.splitlines()[-1])
        assert found, err[-3000:]
        decided, named = found
        # Not crosswise: that would have ended in errors after the wait's timeout.
        assert [what for _, _, what in decided] in (["Load", "Load", "Attach", "Attach"], ["Attach"] * 2 + ["Load"] * 2)
        # Experts are split over data parallel ranks.
        assert named == [[0, "0/2"], [1, "1/2"]]
    finally:
        for device in DEVICES:
            lock = Path(place.settings.runtime_dir, device, "companion.lock")
            if lock.exists():
                pid = int(lock.read_text())
                os.kill(pid, signal.SIGTERM)
                until(lambda pid=pid: not alive(pid), 5, "the companion is gone")
