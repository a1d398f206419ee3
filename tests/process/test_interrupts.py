"""Signals whose handlers raise (Ctrl-C) wherever the main thread is."""

from __future__ import annotations

import gc

import pytest

from tests.support.place import Place, until
from tests.support.publishing import hold_zeros

INTERRUPTED = """
import faulthandler, gc, random, signal, sys, time
import torch
from vllm_companion_plugin import CompanionClient

faulthandler.dump_traceback_later(200, exit=True)
client, chance, is_armed = CompanionClient("cpu"), random.Random(11), False

def interrupt(*_):
    if is_armed:
        raise KeyboardInterrupt

def attach():
    with client.attach("test/model") as attachment:
        attachment.tensors

def update():
    with client.update("test/model", "step") as new:
        new.load({"steps": torch.arange(5)})

def watch():
    for _ in client.watch(5):
        break

signal.signal(signal.SIGALRM, interrupt)
counts = {True: 0, False: 0}
for number in range(120):
    call = chance.choice([attach, update, watch, client.status])
    began = time.monotonic()
    call()
    usual_s = time.monotonic() - began
    try:
        is_armed = True
        signal.setitimer(signal.ITIMER_REAL, max(1e-4, chance.random() * usual_s))
        call()
        is_armed = False
    except KeyboardInterrupt:
        counts[True] += 1
    except RuntimeError:  # of Python's own locks
        pass
    is_armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
gc.collect()
print(counts[True] > 30, flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(300)
def test_nothing_is_left_and_nobody_waits_for_ever(place: Place) -> None:
    place.companion()
    client = hold_zeros(place)
    process = place.run("-c", INTERRUPTED)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n", process.communicate(timeout=100)[1][-3000:]
    until(lambda: not any(entry.leases for entry in client.status().entries), 10, "all leases have ended")
    with client.update("test/model", "next") as new:
        assert new.names
    process.communicate("", timeout=100)
    assert process.returncode == 0


def test_an_attachment_that_nobody_has_any_more_ends(place: Place) -> None:
    """As after an interruption before the caller had it. What its tensors view stays mapped, and is in use."""
    place.companion()
    client = hold_zeros(place)
    client.attach("test/model")
    until(lambda: not any(entry.leases for entry in client.status().entries), 5, "its lease has ended")
    tensor = client.attach("test/model").tensors["embed.weight"]
    gc.collect()
    assert not tensor.any()
    assert [len(entry.leases) for entry in client.status().entries] == [1]
    del tensor
    until(lambda: not any(entry.leases for entry in client.status().entries), 5, "its lease has ended")
