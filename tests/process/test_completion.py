"""Completion in the shells themselves."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.test_cli import CLI, cli, publish, serve
from tests.support.place import KEY, Place
from vllm_companion_plugin.client.connection import connect

pytestmark = pytest.mark.usefixtures("serve_ends_its_companions")

BASH = """
source /dev/stdin <<< "$(vllm-companion completion bash)"
COMP_WORDS=(vllm-companion "$@"); COMP_CWORD=$#
_vllm_companion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def path(place: Place, tmp_path: Path) -> None:
    """`vllm-companion` is a command."""
    command = tmp_path / "vllm-companion"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(CLI)} "$@"\n')
    command.chmod(0o755)
    place.environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def complete(place: Place, *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", *words],
        **{"capture_output": True, "text": True, "env": place.environment, "timeout": 100},
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sta"], ["status"]),
        (["status", "--w"], ["--wide"]),
        (["status", "--device", ""], ["cpu", "all"]),
        (["serve", "--log-level", "D"], ["DEBUG"]),
        (["completion", ""], ["bash", "zsh"]),
        (["stop", "x"], []),
    ],
)
def test_bash_completes(place: Place, words: list[str], found: list[str]) -> None:
    assert complete(place, *words) == found


@pytest.mark.usefixtures("path")
def test_bash_completes_ids(place: Place) -> None:
    assert complete(place, "unload", "") == []
    serve(place)
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        for command in ("unload", "generations", "rollback"):
            assert complete(place, command, KEY.id[:2]) == [KEY.id[:8]]


class Zsh:
    """An interactive zsh that has the script in its `fpath`, on a terminal."""

    def __init__(self, environment: dict[str, str], functions: Path) -> None:
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            os.execvpe("zsh", ["zsh", "-f", "-i"], {**environment, "TERM": "dumb"})
        self._write(f"PROMPT=; fpath=({functions} $fpath); autoload -U compinit; compinit -u -D; print READ''Y\n")
        self._read_until("READY")

    def _write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _read_until(self, text: str) -> None:
        shown = ""
        while text not in shown:  # the test's own limit ends a wait for what never comes
            shown += os.read(self._terminal, 4096).decode()

    def completes(self, typed: str, whole: str) -> None:
        """Type words and a tab, and wait for the whole line."""
        self._write(f"\x15vllm-companion {typed}\t")
        self._read_until(f"vllm-companion {whole}")

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._terminal)


@pytest.mark.usefixtures("path")
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh is here")
def test_zsh_completes(place: Place, tmp_path: Path) -> None:
    (tmp_path / "_vllm-companion").write_text(cli(place, "completion", "zsh")[1])
    serve(place)
    with (
        connect("cpu", place.settings, spawn=False) as connection,
        contextlib.closing(Zsh(place.environment, tmp_path)) as zsh,
    ):
        publish(connection)
        zsh.completes("sta", "status ")
        zsh.completes("status --w", "status --wide ")
        zsh.completes("serve --log-level D", "serve --log-level DEBUG ")
        zsh.completes("completion z", "completion zsh ")
        zsh.completes(f"unload {KEY.id[:2]}", f"unload {KEY.id[:8]} ")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh is here")
def test_zsh_reads_its_script(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "_vllm-companion"
    script.write_text(cli(place, "completion", "zsh")[1])
    load = "autoload -U compinit; compinit -u -D; source $1; print -r -- $_comps[vllm-companion]"
    done = subprocess.run(
        ["zsh", "-f", "-c", load, "zsh", str(script)],
        capture_output=True,
        text=True,
        env=place.environment,
        timeout=100,
    )
    assert (done.stdout.strip(), done.stderr) == ("_vllm_companion", "")
