"""What can be decided of a model, and what became of it: data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import Granted, Lease
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine.identity import checkpoint
from vllm_companion_plugin.engine.identity.digest import Digests
from vllm_companion_plugin.engine.vllm import devices
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host.election import LoaderElection


@dataclass
class Found:
    """Where a checkpoint is and what it contains.

    Attributes:
        path: None if that is not known.
        content: identity of each file there.
        folders: below it that count, too.
        digests: of files that were read.
    """

    path: Path | None = None
    content: dict[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    digests: Digests = field(default_factory=Digests)


@dataclass
class Attach:
    """The weights are held: map them. Owns the attachment.

    Attributes:
        wanted: the key of this engine's own checkpoint.
        key: the key under which the entry was asked for; that of a copy of the checkpoint, if it is one.
        seconds: since the companion was asked, of which `waited_s` for somebody else to load.
        found: where this engine would have loaded from.
        announced: vLLM subtracted the entry from this engine's memory budget.
    """

    device: devices.EngineDevice
    wanted: EntryKey
    key: EntryKey
    attachment: Attachment
    seconds: float
    waited_s: float
    found: Found
    announced: bool = False

    def announce(self) -> int:
        """The bytes to subtract."""
        self.announced = True
        return self.attachment.size_bytes

    def close(self) -> None:
        self.attachment.close()


@dataclass
class Load:
    """Elected: load, publish, keep. Owns lease and election."""

    device: devices.EngineDevice
    key: EntryKey
    lease: Lease
    granted: Granted
    election: LoaderElection
    found: Found

    @property
    def checkpoint_bytes(self) -> int:
        """For progress; 0 if not known."""
        path = self.found.path
        try:
            return checkpoint.weight_bytes(path) if path else 0
        except OSError:
            return 0

    def check_unchanged(self) -> None:
        """Raise `NotShareableError` if what was loaded may not be what the key names."""
        path, before = self.found.path, self.found.content
        if path is None:
            return
        now = checkpoint.identity(path, self.found.digests, self.found.folders)
        if now != before:
            names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
            raise NotShareableError(f"{', '.join(names)} of {path} changed while it was loaded.")

    def close(self) -> None:
        self.election.release()
        self.lease.release()


@dataclass
class Alone:
    """Load normally, without the companion, for `reason`; `failure` is the code of the error, if it is one."""

    reason: str
    failure: str = ""


Decision = Attach | Load | Alone


@dataclass(frozen=True)
class Outcome:
    """What became of one model in this process.

    Attributes:
        what: "attached", "copied", "published" or "alone".
        model: as the engine names it.
        role: "target" or "draft".
        rank: as in its key; empty if alone.
        reason: why it is alone, or which variant it published; empty otherwise.
        size_bytes: of the arena, 0 if alone.
        seconds: from the decision's question to the finished model; of an attached one.
        ways: modules by the way in which their post-processing was run.
    """

    what: str
    model: str
    role: str = "target"
    rank: str = ""
    reason: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    ways: Mapping[str, int] = field(default_factory=dict)
