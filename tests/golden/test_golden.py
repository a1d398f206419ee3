"""What every command prints, at three widths, on a terminal and through a pipe, in a UTF-8 and in an ASCII locale.

    python -m tests.golden.test_golden          # writes tests/golden/*.txt anew; look at the difference before a commit

Commands are the real ones, over the real protocol; a stand-in that answers with fixed statuses takes the companion's
place where a table is shown, because pids and times would differ in every run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.place import PATIENCE_S, Place, speaking
from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    GenerationStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
)
from vllm_companion_plugin.core.text import columns_of
from vllm_companion_plugin.core.versions import PROTOCOL_VERSION
from vllm_companion_plugin.wire import codec, messages

HERE = Path(__file__).resolve().parent
WIDTHS = (80, 120, 200)
LOCALES: dict[str, dict[str, str]] = {
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
}
LONG = "/mnt/models/" + "a-long-directory-name/" * 4 + "Llama-3.1-8B-Instruct-with-a-long-ending-FP8"
assert len(LONG) > 100
COMMANDS = (
    *("serve", "status", "watch", "unload", "generations", "rollback", "advance", "stop", "upgrade", "verify"),
    *("metrics", "doctor", "completion"),
)
WITHIN_S = 200


def entry(id: str, model: str, *pids: int, **changes: Any) -> EntryStatus:
    now = time.time()
    leases = tuple(LeaseStatus(pid, "vLLM 0.33.0", LeaseState.ATTACHED, now - 4000) for pid in pids)
    made = EntryStatus(
        EntryKey(id * 8, model, fields={"dtype": "bfloat16"}, source=model),
        *(EntryState.READY, 1, 16_395_304_960, 291, "memfd", 1_760_000_000.0, 3.4, None, leases),
    )
    key = replace(
        made.key, **{name: changes.pop(name) for name in ("rank", "role", "fields", "kind") if name in changes}
    )
    if made.state is changes.get("state", EntryState.READY):
        changes.setdefault("generations", (GenerationStatus(1, "", now - 4000, made.size_bytes, True, pids),))
    return replace(made, key=key, **changes)


def generations(*numbers: int, pids: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
    """What an entry has of these, of which the last one is current; the second one has a version that is long."""
    now = time.time()
    some = [
        GenerationStatus(
            *(
                number,
                f"step-{number - 1}" + "-of-a-long-experiment" * (index == 1),
                now - 12 * 60 ** (len(numbers) - index),
            ),
            *(16_395_304_960, number == numbers[-1], pids.get(number, ()), numbers[index - 1] if index else 0),
        )
        for index, number in enumerate(numbers)
    ]
    return {"generation": some[-1].number, "version": some[-1].version, "generations": tuple(some)}


def statuses() -> CompanionStatus:
    """Two loads of one model, equal ends, a rank, a draft, a variant, Unicode, a long path, a load, one unloaded.

    One has what a trainer wrote, one what a trainer writes in place, and one sleeps; one is an adapter.
    """
    now = time.time()
    written = generations(1, 5, 6, pids={1: (4712,), 6: (4711,)})
    trained = generations(1, 2, pids={2: (4717,)})
    trained["generations"] = (trained["generations"][0], replace(trained["generations"][1], trained=True))
    sleeps = LeaseStatus(4716, "vLLM 0.33.0", LeaseState.ASLEEP, now - 60)
    loader = LoaderInfo(5120, "vLLM 0.33.0", now - 754, Progress("loading", 6 << 30, 15 << 30), now)
    trainer = LeaseStatus(4717, "trainer", LeaseState.ATTACHED, now - 60)
    adapter = GenerationStatus(7, "step-7", now - 60, 528_384, True, (4717,), 6)
    waiting = LeaseStatus(5121, "vLLM 0.33.0", LeaseState.WAITING, now - 600)
    return CompanionStatus(
        *("cpu", 4102, "0.1.0", PROTOCOL_VERSION, 1_760_000_000.0, 600.0, 0.0),
        (
            entry("3f2a91c0", "Qwen/Qwen3-8B", 4711, 4712, **written),
            entry("9b1c22d0", "Qwen/Qwen3-8B", 4713, fields={"dtype": "float16"}),
            entry("3f2a91c1", "Qwen/Qwen3-8B", 4717, fields={"dtype": "bfloat16", "variant": "scale is 5"}, **trained),
            entry("b81e07aa", LONG, *range(6000, 6009), rank="tp0/2"),
            entry(
                *("ada97e00", "team/my-adapter"),
                **{
                    "kind": "adapter",
                    "fields": {"adapter": "team/my-adapter"},
                    "size_bytes": 528_384,
                    "version": "step-7",
                },
                **{"generation": 7, "tensor_count": 24, "load_s": 0.0, "leases": (trainer,), "generations": (adapter,)},
            ),
            entry("c0ffee00", "/models/a/llama", expires_at_unix_s=now + 11_250),
            entry(
                *("faded000", "org/parked"),
                **{"state": EntryState.PARKED, "leases": (sleeps,), "version": "step-1", "host_bytes": 16_395_304_960},
                ready_unix_s=now - 7200,
            ),
            entry("c0ffee01", "/models/b/llama", 4714, state=EntryState.RETIRED, size_bytes=310 << 20),
            entry("d00dfeed", "org/模型-8B", 4715, role="draft", size_bytes=5 << 10),
            entry(
                *("e0e0e0e0", "org/loading"), state=EntryState.LOADING, size_bytes=0, loader=loader, leases=(waiting,)
            ),
        ),
    )


class Companion:
    """Answers as the companion `status`, and unloads whatever is asked for."""

    def __init__(self, status: Callable[[], CompanionStatus], socket: str) -> None:
        self._status, self._socket = status, socket

    def Status(self, request: Any, context: Any) -> Any:
        return codec.companion_status_to_message(self._status())

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        yield self.Status(request, context)
        os.unlink(self._socket)  # it has ended, and is followed by none

    def Unload(self, request: Any, context: Any) -> Any:
        chosen = [e for e in self._status().entries if e.key.id.startswith(request.query.key_id)]
        chosen = [e for e in chosen if request.query.model in ("", e.key.model)]
        return messages.UnloadResponse(unloaded=[codec.entry_status_to_message(e) for e in chosen])

    def MakeCurrent(self, request: Any, context: Any) -> Any:
        return messages.MakeCurrentResponse()

    def __getattr__(self, name: str) -> Any:
        def unexpected(request: Any, context: Any) -> Any:
            raise AssertionError(f"no command under test calls {name}")

        return unexpected


@dataclass(frozen=True)
class Case:
    """A command and what it finds: nothing, an empty companion, or a full one."""

    name: str
    arguments: tuple[str, ...]
    finds: str = "nothing"
    fits: bool = True
    """No line is wider than the terminal. Errors are one line, however wide, and JSON and scripts are for programs."""


CASES = [
    Case("help", ()),
    *(Case(f"{command}-help", (command, "--help")) for command in COMMANDS),
    *(Case(f"{command}-misspelt", (command, "--runtim-dir", "x"), fits=False) for command in COMMANDS),
    Case("misspelt", ("statsu",), fits=False),
    Case("version", ("--version",)),
    Case("status", ("status",), "full"),
    Case("status-wide", ("status", "--wide"), "full", fits=False),
    Case("status-quiet", ("status", "-q"), "full"),
    Case("status-json", ("status", "--json"), "full", fits=False),
    Case("status-empty", ("status",), "empty"),
    Case("watch", ("watch",), "full"),
    Case("unload", ("unload", "Qwen3-8B"), "full", fits=False),
    Case("unload-id", ("unload", "b81e07aa"), "full", fits=False),
    Case("unload-ambiguous", ("unload", "llama"), "full", fits=False),
    Case("generations", ("generations",), "full"),
    Case("generations-json", ("generations", "Qwen3-8B", "--json"), "full", fits=False),
    Case("generations-missing", ("generations", "nobodys"), "full", fits=False),
    Case("generations-empty", ("generations",), "empty"),
    Case("rollback", ("rollback", "3f2a91c0"), "full", fits=False),
    Case("rollback-to", ("rollback", "3f2a91c0", "--to", "1"), "full", fits=False),
    Case("rollback-missing", ("rollback", "3f2a91c0", "--to", "4"), "full", fits=False),
    Case("rollback-none", ("rollback", "9b1c22d0"), "full", fits=False),
    Case("rollback-parked", ("rollback", "org/parked"), "full", fits=False),
    Case("advance-gone", ("advance", "m", "--engine", "http://127.0.0.1:1"), fits=False),
    Case("advance-url", ("advance", "m", "--engine", "127.0.0.1:1"), fits=False),
    Case("advance-which", ("advance", "m"), fits=False),
    Case("unload-which", ("unload",), "full", fits=False),
    *(
        Case(f"{name}-nothing", (name, *more), fits=False)
        for name, *more in (
            ["status"],
            ["watch"],
            ["unload", "m"],
            ["generations"],
            ["rollback", "m"],
            ["stop"],
            ["upgrade"],
        )
    ),
    Case("serve-refused", ("serve", "--dtype", "float16"), fits=False),
    Case("serve-setting", ("serve", "--linger-s", "soon", "--device", "cpu"), fits=False),
    Case("verify-which", ("verify", "--json"), fits=False),
    Case("metrics-which", ("metrics",), fits=False),
    Case("doctor", ("doctor",), fits=False),
    Case("doctor-json", ("doctor", "--json"), fits=False),
    Case("completion-bash", ("completion", "bash"), fits=False),
    Case("completion-zsh", ("completion", "zsh"), fits=False),
]


@contextlib.contextmanager
def nurseries(place: Place) -> Iterator[Mapping[str, subprocess.Popen[str]]]:
    """A process for each locale, in which commands run."""
    os.makedirs(place.settings.runtime_dir, mode=0o700, exist_ok=True)  # whichever command comes first
    made = {}
    for name, variables in LOCALES.items():
        environment = {**place.environment, **variables, "NO_COLOR": "1", "TERM": "dumb"}
        environment["PATH"] = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
        environment.pop("COLUMNS", None)
        made[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.golden.nursery"],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"},
            env=environment,
        )
    try:
        yield made
    finally:
        for process in made.values():
            process.communicate(timeout=WITHIN_S)


@contextlib.contextmanager
def found(place: Place, what: str) -> Iterator[None]:
    """What the commands find at the socket."""
    if what == "nothing":
        yield
        return
    shown = statuses if what == "full" else lambda: replace(statuses(), entries=(), linger_s=-1.0)
    with speaking(place, Companion(shown, place.paths.grpc_socket)):
        yield


def outputs(case: Case, made: Mapping[str, subprocess.Popen[str]], place: Place) -> dict[str, str]:
    """What a command printed and its exit status, by conditions."""
    shown = {}
    for width, (locale, process), terminal in itertools.product(WIDTHS, made.items(), (True, False)):
        request = {"arguments": case.arguments, "columns": width, "terminal": terminal}

        def ask(process: subprocess.Popen[str] = process, request: dict[str, Any] = request) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            said: dict[str, Any] = json.loads(process.stdout.readline())
            return said

        with found(place, case.finds):
            answer, late = ask(), time.monotonic() + PATIENCE_S
            while "lost companion" in answer["out"] and time.monotonic() < late:  # of another test, which ends it soon
                answer = ask()
        text = without_chance(answer["out"], place)
        name = f"{width} columns, {'terminal' if terminal else 'pipe'}, {locale}"
        shown[name] = f"{text}exit status {answer['status']}\n"
        assert locale != "ASCII" or text.isascii()
        wide = [line for line in answer["out"].splitlines() if columns_of(line) > width]
        assert not (case.fits and wide), f"{name}: {wide}"
    return shown


def without_chance(text: str, place: Place) -> str:
    """Replace what differs between two runs: paths, versions, clocks, limits of this host, other companions."""
    text = text.replace(place.settings.runtime_dir, "RUNTIME_DIR").replace(os.path.dirname(sys.executable), "BIN")
    text = re.sub(r"(\d\d:){2}\d\d", "HH:MM:SS", text)
    text = re.sub(rf"(?m)^{re.escape(__version__)}$", "VERSION", text)
    text = re.sub(r'("since_unix_s": |"expires_at_unix_s": |"ready_unix_s": )[\d.]+', r"\1SECONDS", text)
    text = re.sub(
        r"(grpcio|protobuf|filelock|vLLM|PyTorch)(: | *\", *\"level\": \"ok\",\n *\"text\": \")[\w.+]+", r"\1\2X", text
    )
    text = re.sub(r"in \d+\.\d s", "in X s", text)
    text = re.sub(r"for 12m(3[4-9]|[45]\d)s", "for 12m34s", text)  # on a machine that is busy
    text = re.sub(r"at most \d+", "at most X", text)
    text = re.sub(r"\d+ of 107 bytes", "X of 107 bytes", text)
    text = re.sub(r"All \d+ checks", "All X checks", text)
    text = re.sub(r"(?m)^ok    companion elsewhere: .*\n +-> .*\n", "", text)
    return re.sub(r' *\{\n *"name": "companion elsewhere",(?:\n.*){4},?\n', "", text)


def golden_text(shown: Mapping[str, str]) -> str:
    """The outputs in a file, each once, below all conditions under which it appeared."""
    conditions: dict[str, list[str]] = {}
    for name, text in shown.items():
        conditions.setdefault(text, []).append(name)
    parts = []
    for text, names in conditions.items():
        heading = "always" if len(names) == len(shown) else "\n".join(names)
        parts.append("".join(f"==== {line}\n" for line in heading.splitlines()) + text)
    return "\n".join(parts)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Mapping[str, subprocess.Popen[str]], Place]]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as root:
        place = Place(root)
        with nurseries(place) as made:
            yield made, place


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_command_prints_what_its_golden_file_shows(
    case: Case, running: tuple[Mapping[str, subprocess.Popen[str]], Place]
) -> None:
    assert golden_text(outputs(case, *running)) == (HERE / f"{case.name}.txt").read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {case.name for case in CASES}


def write() -> None:
    for path in HERE.glob("*.txt"):
        path.unlink()
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as root:
        place = Place(root)
        with nurseries(place) as made:
            for case in CASES:
                text = golden_text(outputs(case, made, place))
                (HERE / f"{case.name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
