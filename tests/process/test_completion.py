"""Completion in the shells themselves."""

from __future__ import annotations

import os
import shutil
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
        **{"capture_output": True, "text": True, "env": place.environment, "timeout": 30},
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


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh is here")
def test_zsh_reads_its_script(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "_vllm-companion"
    script.write_text(cli(place, "completion", "zsh")[1])
    load = "autoload -U compinit; compinit -u -D; source $1; print -r -- $_comps[vllm-companion]"
    done = subprocess.run(
        ["zsh", "-f", "-c", load, "zsh", str(script)], capture_output=True, text=True, env=place.environment, timeout=30
    )
    assert (done.stdout.strip(), done.stderr) == ("_vllm_companion", "")
