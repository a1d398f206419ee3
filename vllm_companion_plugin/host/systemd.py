"""Finding out whether systemd will end what this process starts: it ends all processes of a service's cgroup.

`KillMode=control-group` is the default (systemd.kill(5)); neither a fork nor a new session leaves the cgroup.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from vllm_companion_plugin.core.text import printable


def own_service() -> str | None:
    """Return the unit of the systemd service that this process runs in; None if there is no such service."""
    with contextlib.suppress(OSError):
        return service_of(Path("/proc/self/cgroup").read_text(errors="backslashreplace"))
    return None


def service_of(cgroup: str) -> str | None:
    """Return the service in whose own cgroup a process is, from the text of /proc/PID/cgroup; None for other cgroups.

    Systemd itself does not end cgroups below a service, such as containers below their manager's. A login or a
    container is a scope.
    """
    paths = dict(line.split(":", 2)[1:] for line in cgroup.splitlines() if line.count(":") >= 2)
    # With cgroups of version 1 this is systemd's own hierarchy, with version 2 the only one.
    path = paths.get("name=systemd") or paths.get("", "")
    unit = path.rpartition("/")[2]
    return printable(unit) if unit.endswith(".service") else None
