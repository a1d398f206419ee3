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
class Attach:
    """The weights are held: map them. Owns the attachment.

    Attributes:
        wanted: the key of this engine's own checkpoint.
        key: the key under which the entry was asked for; that of a copy of the checkpoint, if it is one.
        seconds: since the companion was asked, of which `waited_s` for somebody else to load.
        announced: vLLM subtracted the entry from this engine's memory budget.
        checkpoint: where this engine would have loaded from.
        content: identity of each file there.
    """

    device: devices.EngineDevice
    wanted: EntryKey
    key: EntryKey
    attachment: Attachment
    seconds: float
    waited_s: float
    announced: bool = False
    checkpoint: Path | None = None
    content: dict[str, str] = field(default_factory=dict)

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
    checkpoint: Path | None
    content: dict[str, str]
    folders: tuple[str, ...] = ()
    digests: Digests = field(default_factory=Digests)

    @property
    def checkpoint_bytes(self) -> int:
        """For progress; 0 if not known."""
        try:
            return checkpoint.weight_bytes(self.checkpoint) if self.checkpoint else 0
        except OSError:
            return 0

    def check_unchanged(self) -> None:
        """Raise `NotShareableError` if what was loaded may not be what the key names."""
        if self.checkpoint is None:
            return
        now = checkpoint.identity(self.checkpoint, self.digests, self.folders)
        if now != self.content:
            names = sorted(name for name in now.keys() | self.content.keys() if now.get(name) != self.content.get(name))
            raise NotShareableError(f"{', '.join(names)} of {self.checkpoint} changed while it was loaded.")

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


@dataclass
class Found:
    """Where a checkpoint is and what it contains, as `Load` has it."""

    path: Path | None
    content: dict[str, str]
    folders: tuple[str, ...]
    digests: Digests
