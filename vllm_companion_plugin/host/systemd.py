"""Whether systemd will end what this process starts: a service takes all processes of its cgroup with it.

`KillMode=control-group` is the default (systemd.kill(5)); a process leaves its cgroup by no fork and no session.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from vllm_companion_plugin.core.text import printable


def own_service() -> str | None:
    """The unit of the systemd service that this process runs in; None if it runs in none."""
    with contextlib.suppress(OSError):
        return service_of(Path("/proc/self/cgroup").read_text(errors="backslashreplace"))
    return None


def service_of(cgroup: str) -> str | None:
    """The service in whose own cgroup a process is, by its /proc/PID/cgroup; None if it is in another one.

    What lies below a service, as containers do below their manager's, is not ended by systemd itself. A login or a
    container is a scope.
    """
    paths = dict(line.split(":", 2)[1:] for line in cgroup.splitlines() if line.count(":") >= 2)
    # systemd's own hierarchy with cgroups of version 1, else the only one.
    path = paths.get("name=systemd") or paths.get("", "")
    unit = path.rpartition("/")[2]
    return printable(unit) if unit.endswith(".service") else None
