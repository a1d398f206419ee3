"""The one table of settings, from which environment, flags, extra-config keys and docs derive.

A value comes from, in this order: the flag or `--model-loader-extra-config` key, the
environment variable `COMPANION_<NAME>` unless it is empty, the default. No other module reads `COMPANION_*`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from vllm_companion_plugin.core.text import did_you_mean
from vllm_companion_plugin.errors import SettingsError

ENV_PREFIX = "COMPANION_"
_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a JSON object"}
LONGEST_WAIT_S = 30 * 86400.0
"""Upper limit of durations in seconds: the operating system cannot wait for ever."""


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        type: type of the values; `dict` means a JSON object.
        choices: allowed values; empty if the type allows all of its values.
        minimum: least allowed number.
        maximum: greatest allowed number.
        absolute: the value must be a path that means the same in every process.
        engine: users may give the setting as an extra-config key of `--load-format companion`.
        flag: users may give the setting as a flag of `vllm-companion`.
        commands_only: only commands with this flag read the setting; engines and companions do not.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    absolute: bool = False
    engine: bool = False
    flag: bool = False
    commands_only: bool = False

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, value: Any, origin: str) -> Any:
        """Convert `value` to this setting's type and check it. Raises `SettingsError` naming `origin`."""
        parsed = self._convert(value)
        if parsed is None:
            expected = " | ".join(self.choices) or _IN_WORDS[self.type]
            raise SettingsError(f"{origin}: {value!r} is not valid for {self.name!r}; expected {expected}.")
        if self.minimum is not None and parsed < self.minimum:
            raise SettingsError(f"{origin}: {self.name!r} is {value!r}; the least allowed value is {self.minimum:g}.")
        if self.maximum is not None and parsed > self.maximum:
            raise SettingsError(
                f"{origin}: {self.name!r} is {value!r}; the greatest allowed value is {self.maximum:g}."
            )
        if self.absolute and not os.path.isabs(parsed):
            raise SettingsError(
                f"{origin}: {self.name!r} is {value!r}, which is another directory for each process.",
                remedy=f"Give a path from the root, e.g. {os.path.abspath(os.path.expanduser(parsed))}",
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
        if self.type is dict:
            return _json_object(value)
        if not isinstance(value, str) or not value or (self.choices and value not in self.choices):
            return None
        return value if _fits_in_environment(value) else None


def _fits_in_environment(text: str) -> bool:
    """Tell whether `text` can be passed to a child process and can name a file."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _json_object(value: Any) -> dict[str, Any] | None:
    """Return `value`, or the JSON of its text, as JSON would carry it; None if it is no object."""
    try:
        parsed = json.loads(value if isinstance(value, str) else json.dumps(value, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def xdg_problem() -> str | None:
    """Say why `XDG_RUNTIME_DIR` names no directory for us; None if the directory is usable, or if none is set.

    The directory may be another user's, after `sudo -E`. It may also belong to a session that has ended or never
    began, as in a cron job or a container.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        return None
    if not os.path.isabs(base):
        return "is no path from the root"
    try:
        owner = os.stat(base).st_uid
    except OSError as error:
        return (error.strerror or "cannot be looked at").lower()
    if owner != os.getuid():
        return f"belongs to uid {owner}"
    if not os.path.isdir(base) or not os.access(base, os.W_OK | os.X_OK):
        return "is no directory that we can write"
    return None


def default_runtime_dir() -> str:
    """Return `$XDG_RUNTIME_DIR/vllm-companion`, or a directory per user below the temp directory.

    Raises:
        SettingsError: no temp directory exists either.
    """
    if (base := os.environ.get("XDG_RUNTIME_DIR")) and xdg_problem() is None:
        return os.path.join(base, "vllm-companion")
    try:
        return os.path.join(tempfile.gettempdir(), f"vllm-companion-{os.getuid()}")
    except FileNotFoundError as error:
        raise SettingsError(
            f"There is no place for the runtime directory: {error.strerror}.",
            remedy="Set COMPANION_RUNTIME_DIR to a directory that you can write.",
        ) from error


TABLE: tuple[Setting, ...] = (
    Setting(
        "runtime_dir",
        str,
        None,
        "Directory of sockets, locks and logs, as a path from the root: mode 0700, owned by the user. Default: "
        "$XDG_RUNTIME_DIR/vllm-companion if that directory exists, else vllm-companion-UID in the temp directory.",
        absolute=True,
        engine=True,
        flag=True,
    ),
    Setting(
        "linger_s",
        float,
        600.0,
        "Seconds that an auto-spawned companion keeps a model without a client before it frees the memory, and that "
        "the companion itself stays without any client. If an engine needs the memory, the companion drops idle "
        "models sooner.",
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
        "Port on 127.0.0.1 where `serve` and `metrics` answer Prometheus for all companions of the runtime directory. "
        "0: off.",
        minimum=0,
        maximum=65535,
        flag=True,
        commands_only=True,
    ),
    Setting(
        "spawn_timeout_s",
        float,
        30.0,
        "Seconds to wait for a companion to start.",
        minimum=0.1,
        maximum=LONGEST_WAIT_S,
        engine=True,
        flag=True,
    ),
    Setting(
        "wait_timeout_s",
        float,
        600.0,
        "Seconds without any progress of the loading process after which a waiting engine gives up the wait. "
        "The limit bounds silence, not duration.",
        minimum=0.1,
        maximum=LONGEST_WAIT_S,
        engine=True,
        flag=True,
    ),
    Setting(
        "source_format",
        str,
        "auto",
        "vLLM load format that reads the checkpoint if this engine is the one that loads.",
        engine=True,
    ),
    Setting(
        "source_extra_config",
        dict,
        {},
        "Options of the `source_format` loader, as `--model-loader-extra-config` gives them without a companion: a "
        "JSON object.",
        engine=True,
    ),
    Setting(
        "share",
        str,
        "readonly",
        "readonly: map the companion's copy. copy: clone that copy into the engine's own memory "
        "(a fast load without sharing, for engines that must own their weights).",
        choices=("readonly", "copy"),
        engine=True,
    ),
    Setting(
        "when_asleep",
        str,
        "auto",
        "Where the weights of an entry stay while every engine that maps them sleeps. auto: in host memory if one of "
        "them sleeps at level 1, nowhere if all sleep at level 2. stay: on the device. park: in host memory. drop: "
        "nowhere, so that the first engine that wakes loads them again. While one engine is awake nothing moves.",
        choices=("auto", "stay", "park", "drop"),
        engine=True,
    ),
    Setting(
        "on_write",
        str,
        "privatize",
        "What happens when vLLM or a training framework is about to write to shared weights (reload_weights with other "
        "weights, load_weights of the model). privatize: the engine gets memory of its own first, at the same "
        "addresses and with the same bytes. refuse: an error, before anything is written.",
        choices=("privatize", "refuse"),
        engine=True,
    ),
    Setting(
        "follow_updates",
        bool,
        False,
        "Take weights that a trainer has written in place of the checkpoint's, at the start and after sleep. Otherwise "
        "an engine that starts then loads its checkpoint alone, and one that wakes wants the weights that it had.",
        engine=True,
    ),
    Setting(
        "update_chunk_mib",
        int,
        256,
        "Most MiB of new weights that a trainer hands to vLLM's headless process at once, in memory of its own beside "
        "the current generation and the next one.",
        minimum=1,
    ),
    Setting(
        "keep_previous",
        int,
        1,
        "How many generations of an entry that were current before a companion keeps on the device, as the way back, "
        "besides those that engines map. The one that is being written takes the place of one of them.",
        minimum=0,
        maximum=64,
        engine=True,
        flag=True,
    ),
    Setting(
        "arena",
        str,
        "auto",
        "How GPU memory is shared if this engine is the one that loads. cuda_vmm: as file descriptors, mapped "
        "read-only. cuda_ipc: by a keeper process, mapped writable. auto: cuda_vmm if GPU and driver support it.",
        choices=("auto", "cuda_vmm", "cuda_ipc"),
        engine=True,
    ),
    Setting(
        "verify",
        str,
        "full",
        "How much of the weights an attaching engine compares with the checksums of their publication. full: all. "
        "sample: about a sixteenth, another one each time. off: nothing.",
        choices=("full", "sample", "off"),
        engine=True,
    ),
    Setting(
        "fallback",
        bool,
        True,
        "true: if sharing is not possible, load normally, with a warning that says why. false: fail instead.",
        engine=True,
    ),
    Setting(
        "cpu_prepack",
        bool,
        False,
        "CPU only: let vLLM pack the weights for its fastest kernels. Each engine then needs a private copy.",
        engine=True,
    ),
    Setting(
        "gc_freeze",
        bool,
        True,
        "While an engine starts, take what exists when it begins to load out of Python's garbage collection, as vLLM "
        "does by itself once the engine is up: each collection until then would walk all of it.",
        engine=True,
    ),
)
BY_NAME = {setting.name: setting for setting in TABLE}
EVERYWHERE = frozenset(setting.name for setting in TABLE if not setting.commands_only)
"""Names of the settings that engines, companions and all commands read."""


@dataclass(frozen=True)
class Settings:
    """All settings of this process, resolved. Each field is a row of `TABLE`."""

    runtime_dir: str
    linger_s: float
    log_level: str
    log_format: str
    metrics_port: int
    spawn_timeout_s: float
    wait_timeout_s: float
    source_format: str
    source_extra_config: dict[str, Any]
    share: str
    when_asleep: str
    on_write: str
    follow_updates: bool
    update_chunk_mib: int
    keep_previous: int
    arena: str
    verify: str
    fallback: bool
    cpu_prepack: bool
    gc_freeze: bool


class Given(TypedDict, total=False):
    """Settings by name, as Python programs give them; all are optional. Each key is a row of `TABLE`."""

    runtime_dir: str
    linger_s: float
    log_level: str
    log_format: str
    metrics_port: int
    spawn_timeout_s: float
    wait_timeout_s: float
    source_format: str
    source_extra_config: dict[str, Any]
    share: str
    when_asleep: str
    on_write: str
    follow_updates: bool
    update_chunk_mib: int
    keep_previous: int
    arena: str
    verify: str
    fallback: bool
    cpu_prepack: bool
    gc_freeze: bool


assert [f.name for f in fields(Settings)] == [s.name for s in TABLE]
assert list(Given.__annotations__) == [s.name for s in TABLE]


def resolve(
    given: Mapping[str, Any] | None = None, *, origin: str = "flag", reads: Collection[str] = EVERYWHERE
) -> Settings:
    """Resolve settings from `given` (None values are absent), then the environment, then the defaults.

    Args:
        given: values by name, from flags or extra config.
        origin: the source of `given`, for messages.
        reads: names of the settings that the caller uses. The environment variables of all others are ignored.

    Raises:
        SettingsError: a name is unknown, or a value does not fit.
    """
    present = {name: value for name, value in (given or {}).items() if value is not None}
    unknown = sorted(map(str, set(present) - set(BY_NAME)))
    if unknown:
        named = ", ".join(name + did_you_mean(name, BY_NAME) for name in unknown)
        raise SettingsError(f"{origin}: unknown key(s) {named}; known keys: {', '.join(BY_NAME)}.")
    return Settings(**{setting.name: _value(setting, present, origin, setting.name in reads) for setting in TABLE})


def _value(setting: Setting, given: Mapping[str, Any], origin: str, is_read: bool) -> Any:
    if setting.name in given:
        return setting.parse(given[setting.name], origin)
    if is_read and (value := os.environ.get(setting.env)):
        if _LINK_VALUE.match(value) and setting.type is int:
            raise SettingsError(
                f"environment variable {setting.env}: {value!r} is the address of a Kubernetes service of that name, "
                "not a setting.",
                remedy="Set `enableServiceLinks: false` in the pod's spec, or the variable itself; empty means the "
                "default.",
                variable=setting.env,
            )
        try:
            return setting.parse(value, f"environment variable {setting.env}")
        except SettingsError as error:
            error.variable = setting.env
            raise
    return default_runtime_dir() if setting.name == "runtime_dir" else setting.default


def resolve_extra_config(extra: Any) -> Settings:
    """Resolve the settings of an engine from `--model-loader-extra-config`.

    Raises:
        SettingsError: `extra` is no mapping, a key is unknown or not for engines, or a value is bad.
    """
    origin = "--model-loader-extra-config"
    if not isinstance(extra or {}, Mapping):
        raise SettingsError(f"{origin}: expected a JSON object, got {extra!r}.")
    known = [setting.name for setting in TABLE if setting.engine]
    unknown = sorted(map(str, set(extra or {}) - set(known)))
    if unknown:
        named = ", ".join(name + did_you_mean(name, known) for name in unknown)
        raise SettingsError(
            f"{origin}: unknown key(s) {named} for --load-format companion; known keys: {', '.join(known)}."
        )
    return resolve(extra, origin=origin)


def unknown_variables() -> list[str]:
    """List variables that look like settings, but are neither settings nor variables of a Kubernetes service."""
    known = {setting.env for setting in TABLE}
    return sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(ENV_PREFIX)
        and name not in known
        and not _LINK_NAME.search(name)
        and not _LINK_VALUE.match(value)
    )


def to_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that give a child process the same settings."""
    values = ((setting, getattr(settings, setting.name)) for setting in TABLE)
    return {s.env: json.dumps(value) if s.type is dict else str(value) for s, value in values}


def to_markdown() -> str:
    """Return the table of docs/settings.md."""
    lines = ["| setting | default | environment | extra config | flag | meaning |", "| --- " * 6 + "|"]
    for setting in TABLE:
        value = json.dumps(setting.default) if setting.type in (bool, dict) else str(setting.default)
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
