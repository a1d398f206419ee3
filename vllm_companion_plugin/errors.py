"""Every error this project raises, one tree.

A message says what happened, to which model, rank and device, and what to do about it.
Each class carries two constants: `code`, its stable name on the wire and in docs/errors.md,
and `grpc_status`, the gRPC status it travels under. This table is the only mapping.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CompanionError(Exception):
    """Base of all errors. `expected` errors are answers; the others are faults.

    Attributes:
        what: what happened, to which model, rank and device.
        remedy: what to do about it, a sentence or a command; empty if nothing can be done. The text of the error ends
            with it.
    """

    code: ClassVar[str] = "internal"
    grpc_status: ClassVar[str] = "INTERNAL"
    expected: ClassVar[bool] = False

    def __init__(self, what: str = "", *, remedy: str = "") -> None:
        super().__init__(f"{what} {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class SettingsError(CompanionError, ValueError):
    """A setting has an unknown name or an impossible value. Correct the setting.

    Attributes:
        variable: the environment variable that set it; empty if something else did.
    """

    code = "settings"
    grpc_status = "INVALID_ARGUMENT"
    expected = True

    def __init__(self, what: str = "", *, remedy: str = "", variable: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.variable = variable


class RuntimeDirError(CompanionError):
    """The runtime directory is not ours, too open, or cannot be written."""

    code = "runtime_dir"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class CompanionUnavailableError(CompanionError):
    """No companion answers for this device, and none could be started."""

    code = "unavailable"
    grpc_status = "UNAVAILABLE"
    expected = True


class ForkedError(CompanionError):
    """This process was forked from one that uses the companion, and cannot use it."""

    code = "forked"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class CompanionReplacedError(CompanionUnavailableError):
    """The companion ended to make room for another one, which takes over what is mapped."""

    code = "replaced"


class AlreadyRunningError(CompanionError):
    """Another companion already holds the lock of this device."""

    code = "already_running"
    grpc_status = "ALREADY_EXISTS"
    expected = True


class ProtocolMismatchError(CompanionError):
    """Client and companion speak different protocol versions."""

    code = "protocol_mismatch"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class BadRequestError(CompanionError):
    """Input that cannot be taken, or a message that no correct client sends: wrong order, size, token or content."""

    code = "bad_request"
    grpc_status = "INVALID_ARGUMENT"


class TicketError(CompanionError):
    """A ticket for file descriptors is unknown, spent or expired."""

    code = "ticket"
    grpc_status = "PERMISSION_DENIED"


class LimitError(CompanionError):
    """The companion has as many clients, entries or descriptors as it allows. What it holds stays."""

    code = "limit"
    grpc_status = "RESOURCE_EXHAUSTED"


class EntryNotFoundError(CompanionError):
    """Nothing is published under this key or name."""

    code = "not_found"
    grpc_status = "NOT_FOUND"
    expected = True


class EntryInUseError(CompanionError):
    """The entry still has leases; nothing was unloaded."""

    code = "in_use"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class StaleError(CompanionError):
    """Another generation is current than the one that a client goes by; nothing was written or changed."""

    code = "stale"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class LeaseLostError(CompanionError):
    """The companion ended the lease or went away while it was needed."""

    code = "lease_lost"
    grpc_status = "ABORTED"


class OvertakenError(CompanionError):
    """A client was elected to load an entry, and another one that maps it hands it back instead."""

    code = "overtaken"
    grpc_status = "ABORTED"
    expected = True


class WaitTimeoutError(CompanionError, TimeoutError):
    """A bounded wait ended. The message says who was waited for, for what and how long."""

    code = "wait_timeout"
    grpc_status = "DEADLINE_EXCEEDED"
    expected = True


class ManifestError(CompanionError):
    """A manifest is damaged or contradicts itself; nothing was mapped."""

    code = "manifest"
    grpc_status = "DATA_LOSS"


class IntegrityError(CompanionError):
    """Weights in memory are not those that were published; they were not used."""

    code = "integrity"
    grpc_status = "DATA_LOSS"


class LayoutError(CompanionError):
    """Other weights cannot take the place of those that an engine maps: they are laid out differently."""

    code = "layout"
    grpc_status = "FAILED_PRECONDITION"


class UpdateError(CompanionError):
    """vLLM could not process new weights, or its headless process ended. Nothing of them stays."""

    code = "update"
    grpc_status = "ABORTED"


class CommitUnknownError(CompanionError):
    """New weights were to be committed, and the answer was lost: they are current, or nothing of them stays."""

    code = "commit_unknown"
    grpc_status = "UNKNOWN"


class UpdateRefusedError(CompanionError):
    """Engines did not take new weights. They go on with those that they have."""

    code = "update_refused"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class SharedWeightsError(CompanionError):
    """Something would write to weights that other processes use, and the setting `on_write` refuses that."""

    code = "shared_weights"
    grpc_status = "FAILED_PRECONDITION"


class NotSharedError(CompanionError):
    """Parameters of a model that shared an entry's memory have been replaced, so that it is a second copy."""

    code = "not_shared"
    grpc_status = "FAILED_PRECONDITION"


class ArenaError(CompanionError):
    """Memory could not be created, mapped, exported or imported, or its engine sleeps or has made it private."""

    code = "arena"
    grpc_status = "RESOURCE_EXHAUSTED"


class NotShareableError(CompanionError):
    """This model cannot be shared as it is configured; it loads normally instead.

    Args:
        reason: why, naming the module where there is one.
    """

    code = "not_shareable"
    grpc_status = "FAILED_PRECONDITION"
    expected = True


class ParityError(CompanionError):
    """A restored module tree differs from the published one; it was not used.

    Attributes:
        where: the module, tensor or value that differs, by its full name; empty if it is none of these.
        here: what this engine has there; empty if it is no value.
    """

    code = "parity"
    grpc_status = "DATA_LOSS"

    def __init__(self, what: str, where: str = "", here: str = "") -> None:
        super().__init__(what)
        self.where = where
        self.here = here


class FleetError(CompanionError):
    """Engines that were to switch together did not all do so. The report says what each of them has.

    Attributes:
        report: a `fleet.FleetReport`.
    """

    code = "fleet"
    grpc_status = "ABORTED"

    def __init__(self, what: str = "", *, remedy: str = "", report: Any = None) -> None:
        super().__init__(what, remedy=remedy)
        self.report = report


class EngineVersionError(CompanionError):
    """This vLLM version lacks something the companion needs."""

    code = "engine_version"
    grpc_status = "UNIMPLEMENTED"
    expected = True


def _tree(cls: type[CompanionError]) -> dict[str, type[CompanionError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[CompanionError]] = _tree(CompanionError)


def from_code(code: str, message: str) -> CompanionError:
    """The typed error that a companion reported; unknown codes become `CompanionError`."""
    return BY_CODE.get(code, CompanionError)(message)
