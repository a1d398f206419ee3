"""A restricted pod: a user id that no passwd file knows, no capability, nothing to write to but its volumes.

What Kubernetes prepares (mounts, their owners and modes, the user) is made here by root in a mount namespace.
docs/deploy/kubernetes/restricted/ has the manifest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_companion_plugin.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
UID = 1000650000

# The interpreter may be below a directory that is closed to others, as root's home is. What is mounted over that
# shows the interpreter and nothing else.
PREPARE = f"""
set -e
mount --make-rprivate /
base=$1 closed=$2 mode=$3; shift 3
mount -t tmpfs -o size=64m,mode=0755 tmpfs /mnt
mkdir -p /mnt/volume /mnt/base
if [ -n "$closed" ]; then
  mount --bind "$base" /mnt/base
  mount -t tmpfs -o mode=0755 tmpfs "$closed"
  mkdir -p "$base"
  mount --move /mnt/base "$base"
fi
chgrp {UID} /mnt/volume
chmod "$mode" /mnt/volume
case $PWD in /tmp*) ;; *) mount -t tmpfs -o mode=0755 tmpfs /tmp ;; esac
cd /
exec setpriv --reuid {UID} --regid 0 --groups {UID} --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""

WHOLE_PATH = """
import os, pwd, subprocess, sys
import torch
from tests.support.publishing import KEY, Small, load
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.settings import resolve

try:
    raise SystemExit(f"uid {os.getuid()} is {pwd.getpwuid(os.getuid())}")
except KeyError:
    pass
assert not os.access(os.path.expanduser("~"), os.W_OK)
ATTACH = '''
from tests.support.publishing import KEY
from vllm_companion_plugin import CompanionClient
with CompanionClient("cpu").attach(KEY.model) as weights:
    print("sum", weights.tensors["embed.weight"].double().sum().item())
'''

def run(*arguments):
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

with connect("cpu", resolve(), spawn=True) as connection:
    model = Small()
    load(connection, model)
    assert run("-c", ATTACH).split() == ["sum", str(model.embed.weight.double().sum().item())]
    shown = run("-m", "vllm_companion_plugin.cli.main", "status", "--wide")
    assert KEY.model in shown and "ready" in shown, shown
    run("-m", "vllm_companion_plugin.cli.main", "stop")
print("done")
"""


def closed_directory() -> str:
    """The first directory above the interpreter that is closed to others; empty if there is none."""
    above = [*reversed(Path(sys.base_prefix).parents), Path(sys.base_prefix)]
    return next((str(path) for path in above if not path.stat().st_mode & 0o001), "")


def in_pod(mode: str, code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a pod whose volume has this mode."""
    environment = {
        **{"PATH": "/usr/bin:/bin", "HOME": "/", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        **{"PYTHONDONTWRITEBYTECODE": "1", "COMPANION_RUNTIME_DIR": "/mnt/volume/r", "COMPANION_LINGER_S": "20"},
    }
    places = [sys.base_prefix, closed_directory(), mode]
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", PREPARE, "sh", *places, sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "timeout": 100, "cwd": ROOT, "env": environment},
    )


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if os.getuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv"))):
        pytest.skip("only root can make mounts and take another user id, by unshare(1) and setpriv(1)")
    tried = in_pod("0777", f"import grpc, torch, {main.__name__}")
    if tried.returncode:
        pytest.skip(f"no pod can be made here: {tried.stderr[-300:]}")


@pytest.mark.timeout(400)
class TestRestrictedPod:
    """Publishing, attaching, status and stop, as uid 1000650000."""

    @pytest.mark.parametrize("mode", ["3777", "2775"], ids=["emptyDir in memory", "claim with fsGroup"])
    def test_whole_path(self, mode: str) -> None:
        """An emptyDir of medium Memory is sticky, and the group of a claim with fsGroup is the user's own."""
        done = in_pod(mode, WHOLE_PATH)
        assert done.stdout == "done\n", done.stderr

    def test_open_volume(self) -> None:
        """A plain emptyDir is open to all users, and the message says what is wrong with it."""
        done = in_pod("2777", WHOLE_PATH)
        assert "RuntimeDirError: /mnt/volume, above the runtime directory, has mode 2777" in done.stderr
        assert "medium: Memory" in done.stderr
