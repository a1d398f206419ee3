"""Processes that fork while, or after, they use the companion."""

from __future__ import annotations

import pytest

from tests.support.place import Place
from tests.support.publishing import hold_zeros
from vllm_companion_plugin.core.entry_kinds import ADAPTER, WEIGHTS
from vllm_companion_plugin.wire.forking import SUPPORT

PUBLISHES = """
import multiprocessing, sys
import torch
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.errors import ForkedError

def published(client):
    sides = {f"layer.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    return client.publish_adapter("mine", sides, {"r": 4})

def publish(client, attachment):
    try:
        number = published(client)
    except ForkedError as error:
        print(f"{type(error).__name__} {error.__cause__}", flush=True)
        number = 0
    attachment.close()
    client.close()
    sys.exit(number)

client = CompanionClient("cpu")
attachment = client.attach("test/model")
published(client)
published(client)  # then there is memory for a third one
child = multiprocessing.get_context("fork").Process(target=publish, args=(client, attachment))
child.start()
child.join(30)
print(child.exitcode, flush=True)
child.kill()
print(published(client), attachment.lost, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("support", "said"),
    [("", ["ForkedError None", "0", "3 False"]), ("1", ["3", "4 False"])],
    ids=["by default", "with gRPC's support"],
)
def test_a_child_publishes_and_closes(place: Place, support: str, said: list[str]) -> None:
    """It is told why it cannot, or does so by a connection of its own. What its parent has is the parent's."""
    place.environment.pop(SUPPORT, None)
    if support:
        place.environment[SUPPORT] = support
    place.companion()
    client = hold_zeros(place)
    parent = place.run("-c", PUBLISHES)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in said] == [f"{line}\n" for line in said]
    held = {entry.key.kind: [lease.pid for lease in entry.leases] for entry in client.status().entries}
    assert held == {WEIGHTS: [parent.pid], ADAPTER: [parent.pid]}


INHERITS = """
import os
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.errors import ForkedError

client = CompanionClient("cpu")
attachment = client.attach("test/model")
client.close() if {closed} else None
for _ in range({times}):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            {use}
        except ForkedError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    said = os.read(read, 1000).decode()
    os.close(read)
print(said.replace(str(pid), "CHILD").replace(str(os.getpid()), "PARENT"), attachment.lost)
"""


@pytest.mark.parametrize("use", ["client.status()", 'client.attach("test/model")', 'CompanionClient("cpu").status()'])
@pytest.mark.parametrize("closed", [False, True])
def test_a_child_cannot_use_the_companion(place: Place, closed: bool, use: str) -> None:
    """Not by what it inherits, nor by its own; also if its parent has closed what it had."""
    place.environment.pop(SUPPORT, None)
    place.companion()
    hold_zeros(place)
    process = place.run("-c", INHERITS.format(closed=closed, use=use, times=20))
    output, errors = process.communicate(timeout=100)
    assert output == (
        "Process CHILD was forked from process PARENT, which uses the companion, and gRPC does not work in a fork. "
        "Start it by spawn, as VLLM_WORKER_MULTIPROCESSING_METHOD=spawn does with vLLM's processes, or set "
        f"{SUPPORT}=1 in the environment of both: then each fork takes up to a second. False\n"
    ), errors
    assert "fork" not in errors  # gRPC says there that its handlers do nothing
