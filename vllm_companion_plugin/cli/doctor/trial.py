"""A check of `doctor`: start a companion in a temporary directory, give it memory, and get that memory back."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

from vllm_companion_plugin import memory
from vllm_companion_plugin.cli.doctor.check import FAIL, OK, Check
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Ready, connect
from vllm_companion_plugin.client.shutdown import shut_down
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.errors import CompanionError, IntegrityError
from vllm_companion_plugin.host.runtime_dir import MAX_SOCKET_PATH
from vllm_companion_plugin.memory.kinds import memfd
from vllm_companion_plugin.settings import resolve

KEY = EntryKey("d0c7" * 16, "doctor")
CONTENT = os.urandom(1 << 16)
ANSWER_S = 10.0
LINGER_S = 30.0
"""How long the companion outlives a `doctor` that is killed."""
NAME = "trial"


def check_trial() -> Iterator[Check]:
    """Do what engines do with a companion of device cpu, which needs neither a GPU nor vLLM."""
    # A long TMPDIR is no fault: the runtime directory has its own check.
    try:
        place = None if len(tempfile.gettempdir()) < MAX_SOCKET_PATH - 50 else "/tmp"
        directory = tempfile.mkdtemp(prefix="vcd-", dir=place)
    except OSError as error:  # a full disk, or no file may be written
        yield Check(NAME, FAIL, f"no temporary directory: {error}", "make room, or set TMPDIR to where there is some")
        return
    settings = resolve({"runtime_dir": f"{directory}/r", "linger_s": LINGER_S, "log_format": "text"})
    started = time.monotonic()
    try:
        with connect("cpu", settings, spawn=True) as connection:
            try:
                _share(connection)
            finally:
                shut_down(connection)
    except CompanionError as error:
        first, *rest = str(error).splitlines()
        text = f"{first} {rest[-1].strip()}" if rest else first
        yield Check(NAME, FAIL, f"a companion in a temporary directory: {text}", "repair what failed above")
    else:
        took_s = time.monotonic() - started
        yield Check(NAME, OK, f"a companion started, took memory, gave it back and ended, in {took_s:.1f} s")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _share(connection: CompanionConnection) -> None:
    """Publish a block of memory and get it as another client does. Raises `CompanionError`."""
    with connection.attach(KEY, may_load=True, client_name="doctor") as lease:
        outcome = lease.wait(ANSWER_S)
        if not isinstance(outcome, Granted):
            raise IntegrityError("A new companion has an entry already.")
        fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, CONTENT)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, memfd.SEALS)
        with memory.Descriptors([fd]) as fds:
            outcome.publication.publish(ArenaInfo(memory.MEMFD, (len(CONTENT),)), fds, b"doctor", 1)
        with connection.attach(model=KEY.model, may_load=False, client_name="doctor") as reader:
            ready = reader.wait(ANSWER_S)
            if not isinstance(ready, Ready):
                raise IntegrityError("The companion does not have what it was given.")
            with ready.redeem() as got:
                if os.pread(got[0], len(CONTENT), 0) != CONTENT or ready.manifest != b"doctor":
                    raise IntegrityError("The companion gave other bytes than it was given.")
