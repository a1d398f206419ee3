"""What waking costs while the bytes are on the device, on a CPU: a model of 8B in memory that nobody touches.

    python -m benchmarks.waking [--turns 300] [--alone]

Another process maps the entry and stays awake; with --alone there is none, and the entry stays by `when_asleep`. This
process sleeps and wakes beside a companion of its own. `answer` is what it takes to be told what to map and to have the
descriptors, `map` is mmap, `hold` is what the next companion would need, and `rest` is Python around them. On a machine
that has other work, `chrt -f 1` before it keeps that out. Times on a GPU come from sleeping_together.py.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client import sleeping
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Ready, connect
from vllm_companion_plugin.client.mirror import Held
from vllm_companion_plugin.client.sleeper import Sleeper
from vllm_companion_plugin.core.arena import ARENA_CHECKSUM, ArenaInfo, Checksums, piece_count
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.host.spawn import listener_pid
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.kinds.memfd import SEALS, MemfdMapping
from vllm_companion_plugin.settings import Settings, resolve
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import prepare
from vllm_companion_plugin.wire.manifest import manifest_to_bytes

CPU = torch.device("cpu")
LAYERS, HIDDEN, INNER, HEADS, VOCABULARY = 32, 4096, 14336, 6144, 128256
KEY = EntryKey(
    "cd" * 32,
    "meta-llama/Llama-3.1-8B",
    fields={f"field-{number}": "ab" * 32 for number in range(60)},
    source="/models/llama",
    files={f"model-{number:05}-of-00004.safetensors": "ef" * 32 for number in range(12)},
)
BLOCK_BYTES = 960 << 20
"""On a GPU; on a CPU the arena would be one."""
WARM = 20


def model() -> nn.Module:
    """The parameters of a Llama of 8B. Nobody writes to them, so they take no memory."""

    def linear(rows: int, columns: int) -> nn.Module:
        return nn.utils.skip_init(nn.Linear, columns, rows, bias=False, dtype=torch.bfloat16)

    def norm() -> nn.Module:
        return nn.LayerNorm(HIDDEN, bias=False, dtype=torch.bfloat16)

    def layer() -> nn.Module:
        attention = nn.ModuleDict({"qkv_proj": linear(HEADS, HIDDEN), "o_proj": linear(HIDDEN, HIDDEN)})
        mlp = nn.ModuleDict({"gate_up_proj": linear(2 * INNER, HIDDEN), "down_proj": linear(HIDDEN, INNER)})
        return nn.ModuleDict({"self_attn": attention, "mlp": mlp, "before": norm(), "after": norm()})

    layers = nn.ModuleList(layer() for _ in range(LAYERS))
    ends = {"embed": linear(VOCABULARY, HIDDEN), "norm": norm(), "lm_head": linear(VOCABULARY, HIDDEN)}
    return nn.ModuleDict({"layers": layers, **ends})


def memfd_of_holes(size_bytes: int) -> int:
    """As large as it says, without a page."""
    fd = os.memfd_create("vllm-companion-waking", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def publish(connection: CompanionConnection, settings: Settings) -> Attachment:
    """The entry, in an arena that holds nothing."""
    lease = connection.attach(KEY, may_load=True, client_name="publisher")
    granted = lease.wait(10)
    assert isinstance(granted, Granted)
    packed = prepare(capture(model()), Stage.UNPROCESSED, arenas.MEMFD, CPU)
    size_bytes = packed.placement.size_bytes
    sizes = tuple(min(BLOCK_BYTES, size_bytes - start) for start in range(0, size_bytes, BLOCK_BYTES))
    sums = Checksums(ARENA_CHECKSUM, tuple(range(2**60, 2**60 + piece_count(size_bytes))))
    arena = arenas.open_arena(ArenaInfo(arenas.MEMFD, sizes, sums), Descriptors(map(memfd_of_holes, sizes)))
    manifest = manifest_to_bytes(packed.manifest)
    generation = granted.publication.publish(arena.info, arena.fds, manifest, len(packed.manifest.tensors))
    held = Held(KEY, generation, arena.info, arena.fds, manifest, granted.publication.published)
    made = Attachment("cpu", CPU, lease, held, arena, packed.manifest)
    made.mirror(settings, "publisher")
    return made


def stay_awake() -> None:
    """Map the entry, and say so, until the standard input ends."""
    with connect("cpu", resolve({}), spawn=False) as connection:
        lease = connection.attach(KEY, may_load=False, client_name="awake")
        ready = lease.wait(10)
        assert isinstance(ready, Ready)
        with Attachment.open("cpu", CPU, lease, ready):
            print("awake", flush=True)
            sys.stdin.read()


@contextlib.contextmanager
def another() -> Iterator[None]:
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.waking", "--awake"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "awake\n"
    try:
        yield
    finally:
        child.communicate()


class Clock:
    """Seconds of each turn, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.turn: dict[str, float] = defaultdict(float)

    def clocked(self, part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **named)
            finally:
                self.turn[part] += time.perf_counter() - started

        return call

    def take(self, whole_s: float) -> None:
        for part, seconds in self.turn.items():
            self.seconds[part].append(seconds)
        self.seconds["rest"].append(whole_s - sum(self.turn.values()))
        self.seconds["wake"].append(whole_s)
        self.turn.clear()


@contextlib.contextmanager
def clocks(clock: Clock) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part, owner, name in (
            ("answer", Sleeper, "wake"),
            ("answer", Ready, "redeem"),
            ("map", arenas.Arena, "map_again"),
            ("hold", sleeping, "Mirror"),
        ):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, clock.clocked(part, getattr(owner, name))))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--awake", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    MemfdMapping.populate = lambda self: None  # type: ignore[method-assign]  # it would make all pages
    if args.awake:
        stay_awake()
        return
    with tempfile.TemporaryDirectory(prefix="vcw-", dir="/tmp") as place:
        os.environ["COMPANION_RUNTIME_DIR"] = f"{place}/r"
        settings = resolve({})
        connection = connect("cpu", settings, spawn=True)
        one = publish(connection, settings)
        print(
            f"{one.size_bytes / 2**30:.2f} GiB in {len(one.held.arena.block_sizes)} blocks, manifest of "
            f"{len(one.held.manifest)} bytes; load {os.getloadavg()[0]:.2f}"
        )
        pid = listener_pid(connection.paths)
        clock = Clock()
        with another() if not args.alone else contextlib.nullcontext():
            ticks = cpu_s(pid)
            for turn in range(WARM + args.turns):
                one.fall_asleep(1, WhenAsleep.STAY)
                one.let_go(settings, "sleeper")
                with clocks(clock):
                    time.sleep(0.01)  # threads of falling asleep have ended
                    started = time.perf_counter()
                    one.wake(connection, settings, "sleeper", unexpected)
                    whole_s = time.perf_counter() - started
                clock.take(whole_s)
                if turn < WARM:
                    clock.seconds.clear()
            print(f"companion: {1e3 * (cpu_s(pid) - ticks) / (WARM + args.turns):.2f} ms of a processor a turn")
        one.close()
        connection.close()
        os.kill(pid, signal.SIGTERM)
    for part, seconds in clock.seconds.items():
        deciles = [1e3 * each for each in statistics.quantiles(seconds, n=10)]
        print(f"  {part:7} median {deciles[4]:6.2f} ms, p90 {deciles[8]:6.2f}, least {1e3 * min(seconds):6.2f}")


def unexpected(*_: object) -> Attachment:
    raise AssertionError("the entry is there")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
