"""Any process may be killed at any step: rounds of chaos, of which tests/process/chaos.py says what has to hold."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SEEDS = (20261121, 7)
ROUNDS = 100
"""Of each seed. The two run side by side, as a round mostly waits for a process to start."""


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_after_each_of_200_rounds_of_chaos_everything_is_in_its_place() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process.chaos", "--seed", str(seed), "--rounds", str(ROUNDS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in SEEDS
    ]
    try:
        outputs = [run.communicate(timeout=380)[0] for run in runs]
    finally:
        for run in runs:
            run.send_signal(signal.SIGINT)  # does nothing to one that has ended
        for run in runs:
            run.communicate()
    for run, output in zip(runs, outputs, strict=True):
        print(output)
        assert run.returncode == 0, output[-12_000:]
