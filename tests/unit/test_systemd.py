"""Which systemd service takes a process with it, by the text of /proc/PID/cgroup; nothing here runs systemd."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_companion_plugin.host import spawn, systemd
from vllm_companion_plugin.settings import resolve

V1 = """12:pids:/system.slice/vllm.service
9:memory:/system.slice/vllm.service
1:name=systemd:/system.slice/vllm.service
0::/system.slice/other.service
"""


class TestService:
    """A process in the cgroup of a service ends with it."""

    @pytest.mark.parametrize(
        ("cgroup", "service"),
        [
            pytest.param("0::/system.slice/vllm.service\n", "vllm.service", id="system"),
            pytest.param("0::/system.slice/system-vllm.slice/vllm@8b.service\n", "vllm@8b.service", id="template"),
            pytest.param(
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vllm.service\n", "vllm.service", id="user"
            ),
            pytest.param(V1, "vllm.service", id="version-1"),
            pytest.param("0::/user.slice/user-1000.slice/session-3.scope\n", None, id="login"),
            pytest.param("0::/user.slice/user-1000.slice/user@1000.service/app.slice/tmux.scope", None, id="terminal"),
            pytest.param("0::/system.slice/docker-0123abcd.scope\n", None, id="container"),
            pytest.param("0::/system.slice/k3s.service/kubepods/pod1/abc\n", None, id="below-a-service"),
            pytest.param("0::/\n", None, id="root"),
            pytest.param("0::/x:y/a:b.service\n", "a:b.service", id="colons"),
            pytest.param("nonsense\n\n4:\n", None, id="nonsense"),
            pytest.param("", None, id="empty"),
        ],
    )
    def test_is_read_from_the_cgroup(self, cgroup: str, service: str | None) -> None:
        """The innermost cgroup decides: a scope below a service is not ended with it."""
        assert systemd.service_of(cgroup) == service

    @pytest.mark.parametrize("service", ["vllm.service", None])
    def test_of_whoever_starts_a_companion_is_said_once(
        self, service: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The line names the unit that is the answer."""
        settings = replace(resolve(), runtime_dir=str(tmp_path / "r"))
        monkeypatch.setattr(systemd, "own_service", lambda: service)
        monkeypatch.setattr(spawn, "start_detached", lambda *_: "ok")
        monkeypatch.setattr(spawn.logger, "propagate", True)
        with caplog.at_level(logging.WARNING):
            spawn.ensure_companion("cpu", settings)
        said = [m for m in caplog.messages if "vllm.service" in m and "docs/deploy/vllm-companion@.service" in m]
        assert len(said) == (1 if service else 0)
