"""Any process may be killed at any step: rounds of chaos, of which tests/process/chaos.py says what has to hold."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SEEDS = (20261121, 7)
"""They run side by side, as a round mostly waits for a process to start."""


@pytest.mark.alone
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_after_each_round_of_chaos_everything_is_in_its_place(rounds: int) -> None:
    """In so many rounds of each seed."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.process.chaos", "--seed", str(seed), "--rounds", str(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in SEEDS
    ]
    try:
        outputs = [run.communicate(timeout=900)[0] for run in runs]
    finally:
        for run in runs:
            run.send_signal(signal.SIGINT)  # does nothing to one that has ended
        for run in runs:
            run.communicate()
    for run, output in zip(runs, outputs, strict=True):
        print(output)
        assert run.returncode == 0, output[-12_000:]
