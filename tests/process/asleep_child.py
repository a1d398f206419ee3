"""Clients for a test to kill: a nursery that has imported PyTorch, and forks one for each line of its standard input.

A line is a JSON object: "do", and "key". The fork prints its pid once it has done that, and then waits to be killed:

    awake     attach
    asleep 1, asleep 2    attach, and fall asleep at that level
    wake      attach, fall asleep and wake as often as it takes, until this kills it in the middle of bringing back
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from tests.support.sleeping import Sleeping, seeded
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import CompanionUnavailableError, LeaseLostError, TicketError
from vllm_companion_plugin.settings import resolve

TRIES_S = 30.0


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            be(order["do"], EntryKey(order["key"], order["model"]))


def be(what: str, key: EntryKey) -> None:
    """Never returns."""
    sleeping = Sleeping(resolve(), key, seeded())
    one = attached(sleeping)
    if what.startswith("asleep"):
        sleeping.sleep(one, int(what[-1]))
    tell(os.getpid())
    if what == "wake":
        Publication.hand_back = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
        sleeping.sleep(one, 1)
        sleeping.wake(one)
    while True:
        signal.pause()


def attached(sleeping: Sleeping) -> Attachment:
    """Tried again and again: the companion may have been killed a moment ago."""
    late = time.monotonic() + TRIES_S
    while True:
        try:
            return sleeping.attach()
        except (CompanionUnavailableError, LeaseLostError, TicketError):
            if time.monotonic() > late:
                raise
            time.sleep(0.02)


def tell(value: Any) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
