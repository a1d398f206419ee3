"""The one table of settings. Environment, flags, extra-config keys and docs derive from it.

A value comes from, in this order: the flag or `--model-loader-extra-config` key, the
environment variable `COMPANION_<NAME>`, the default. No other module reads `COMPANION_*`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_companion_plugin.errors import SettingsError

ENV_PREFIX = "COMPANION_"
LONGEST_WAIT_S = 30 * 86400.0
"""The operating system cannot wait for ever, and nobody wants to."""


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        choices: allowed values; empty for any of the type.
        minimum: least allowed number.
        maximum: greatest allowed number.
        engine: may be given as an extra-config key of `--load-format companion`.
        flag: may be given as a flag of `vllm-companion`.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    engine: bool = False
    flag: bool = False

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, value: Any, origin: str) -> Any:
        """`value` as this setting's type, checked. Raises `SettingsError` naming `origin`."""
        parsed = self._convert(value)
        if parsed is None:
            expected = " | ".join(self.choices) or self.type.__name__
            raise SettingsError(f"{origin}: {value!r} is not valid for {self.name!r}; expected {expected}.")
        if self.minimum is not None and parsed < self.minimum:
            raise SettingsError(f"{origin}: {self.name!r} is {value!r}; the least allowed value is {self.minimum:g}.")
        if self.maximum is not None and parsed > self.maximum:
            raise SettingsError(
                f"{origin}: {self.name!r} is {value!r}; the greatest allowed value is {self.maximum:g}."
            )
        return parsed

    def _convert(self, value: Any) -> Any:
        if self.type is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
        if self.type is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else None
        if self.type is float:
            if isinstance(value, bool):
                return None
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                return None
            return number if number == number else None  # NaN compares unequal to itself
        if not isinstance(value, str) or not value or (self.choices and value not in self.choices):
            return None
        return value if _fits_in_environment(value) else None


def _fits_in_environment(text: str) -> bool:
    """Whether `text` can be given to a child process, and name a file."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_ours(path: str) -> bool:
    """Not another user's, whose environment came with `sudo -E`; what is not there can be made."""
    try:
        return os.stat(path).st_uid == os.getuid()
    except OSError:
        return True


def default_runtime_dir() -> str:
    """`$XDG_RUNTIME_DIR/vllm-companion`, or a directory per user below the temp directory."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and _is_ours(base):
        return os.path.join(base, "vllm-companion")
    return os.path.join(tempfile.gettempdir(), f"vllm-companion-{os.getuid()}")


TABLE: tuple[Setting, ...] = (
    Setting(
        "runtime_dir",
        str,
        None,
        "Directory of sockets, locks and logs: mode 0700, owned by the user. "
        "Default: $XDG_RUNTIME_DIR/vllm-companion, else vllm-companion-UID in the temp directory.",
        engine=True,
        flag=True,
    ),
    Setting(
        "linger_s",
        float,
        600.0,
        "Seconds that an auto-spawned companion keeps a model with nobody attached before it frees the memory, and "
        "that it stays itself with nobody attached to anything. An engine that needs the memory has idle models "
        "dropped sooner.",
        minimum=0,
        engine=True,
        flag=True,
    ),
    Setting(
        "log_level",
        str,
        "INFO",
        "Log level of the companion process.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        flag=True,
    ),
    Setting(
        "log_format",
        str,
        "text",
        "Format of the companion's log: text, or json (one object a line).",
        choices=("text", "json"),
        flag=True,
    ),
    Setting(
        "metrics_port",
        int,
        0,
        "Port of 127.0.0.1 where `serve` and `metrics` answer Prometheus for all companions of the runtime directory. "
        "0: off.",
        minimum=0,
        maximum=65535,
        flag=True,
    ),
    Setting(
        "spawn_timeout_s",
        float,
        30.0,
        "Seconds to wait for a companion that was just started.",
        minimum=0.1,
        maximum=LONGEST_WAIT_S,
        engine=True,
        flag=True,
    ),
    Setting(
        "wait_timeout_s",
        float,
        600.0,
        "Seconds without any progress of the loading process after which a waiting engine gives up on it. "
        "It bounds silence, not duration.",
        minimum=0.1,
        maximum=LONGEST_WAIT_S,
        engine=True,
        flag=True,
    ),
    Setting(
        "source_format",
        str,
        "auto",
        "vLLM load format that reads the checkpoint when this engine is the one that loads.",
        engine=True,
    ),
    Setting(
        "share",
        str,
        "readonly",
        "readonly: map the companion's copy. copy: clone it into memory of the engine's own "
        "(a fast load without sharing, for engines that must own their weights).",
        choices=("readonly", "copy"),
        engine=True,
    ),
    Setting(
        "arena",
        str,
        "auto",
        "How memory of a GPU is shared when this engine is the one that loads. cuda_vmm: as file descriptors, mapped "
        "read-only. cuda_ipc: by a keeper process, mapped writable. auto: cuda_vmm where GPU and driver can.",
        choices=("auto", "cuda_vmm", "cuda_ipc"),
        engine=True,
    ),
    Setting(
        "verify",
        str,
        "full",
        "How much of the weights is compared with the checksums of their publication when an engine attaches: all, "
        "about a sixteenth (another one each time), or nothing.",
        choices=("full", "sample", "off"),
        engine=True,
    ),
    Setting(
        "fallback",
        bool,
        True,
        "Load normally, with a warning that says why, when sharing is not possible; false: fail instead.",
        engine=True,
    ),
    Setting(
        "cpu_prepack",
        bool,
        False,
        "CPU only: let vLLM pack the weights for its fastest kernels, which costs a private copy in each engine.",
        engine=True,
    ),
)
BY_NAME = {setting.name: setting for setting in TABLE}


@dataclass(frozen=True)
class Settings:
    """All settings of this process, resolved. Field for field the rows of `TABLE`."""

    runtime_dir: str
    linger_s: float
    log_level: str
    log_format: str
    metrics_port: int
    spawn_timeout_s: float
    wait_timeout_s: float
    source_format: str
    share: str
    arena: str
    verify: str
    fallback: bool
    cpu_prepack: bool


assert [f.name for f in fields(Settings)] == [s.name for s in TABLE]


def resolve(given: Mapping[str, Any] | None = None, *, origin: str = "flag") -> Settings:
    """Settings from `given` (None values are absent), then environment, then defaults.

    Args:
        given: values by name, from flags or extra config.
        origin: where `given` came from, for messages.

    Raises:
        SettingsError: an unknown name, or a value that does not fit.
    """
    present = {name: value for name, value in (given or {}).items() if value is not None}
    unknown = sorted(map(str, set(present) - set(BY_NAME)))
    if unknown:
        raise SettingsError(f"{origin}: unknown key(s) {', '.join(unknown)}; known keys: {', '.join(BY_NAME)}.")
    return Settings(**{setting.name: _value(setting, present, origin) for setting in TABLE})


def _value(setting: Setting, given: Mapping[str, Any], origin: str) -> Any:
    if setting.name in given:
        return setting.parse(given[setting.name], origin)
    if setting.env in os.environ:
        return setting.parse(os.environ[setting.env], f"environment variable {setting.env}")
    return default_runtime_dir() if setting.name == "runtime_dir" else setting.default


def resolve_extra_config(extra: Any) -> Settings:
    """Settings of an engine from `--model-loader-extra-config`.

    Raises:
        SettingsError: not a mapping, a key that is unknown or not for engines, or a bad value.
    """
    origin = "--model-loader-extra-config"
    if not isinstance(extra or {}, Mapping):
        raise SettingsError(f"{origin}: expected a JSON object, got {extra!r}.")
    known = [setting.name for setting in TABLE if setting.engine]
    unknown = sorted(map(str, set(extra or {}) - set(known)))
    if unknown:
        raise SettingsError(
            f"{origin}: unknown key(s) {', '.join(unknown)} for --load-format companion; "
            f"known keys: {', '.join(known)}."
        )
    return resolve(extra, origin=origin)


def unknown_variables() -> list[str]:
    """Variables that look like settings and are none."""
    known = {setting.env for setting in TABLE}
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def to_environment(settings: Settings) -> dict[str, str]:
    """Variables that give a child process the same settings."""
    return {setting.env: str(getattr(settings, setting.name)) for setting in TABLE}


def to_markdown() -> str:
    """The table of docs/settings.md."""
    lines = ["| setting | default | environment | extra config | flag | meaning |", "| --- " * 6 + "|"]
    for setting in TABLE:
        value = str(setting.default).lower() if setting.type is bool else str(setting.default)
        choices = ", ".join(f"`{choice}`" for choice in setting.choices)
        cells = (
            f"`{setting.name}`",
            "" if setting.default is None else f"`{value}`",
            f"`{setting.env}`",
            "yes" if setting.engine else "",
            f"`{setting.option}`" if setting.flag else "",
            setting.help + (f" One of: {choices}." if choices else ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
