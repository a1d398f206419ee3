"""Every process that maps an entry can hand it to the next companion: one that dies takes nothing with it.

Every process that keeps an entry's descriptors has all that a companion needs to know about it. The
first to notice that the companion has died starts another one, and hands the entry back under its old
generation; the others of the same entry find it there and only renew their leases.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Lease, Ready, connect
from vllm_companion_plugin.core.arena import ArenaInfo
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import Published
from vllm_companion_plugin.errors import (
    ArenaError,
    BadRequestError,
    CompanionError,
    CompanionReplacedError,
    CompanionUnavailableError,
    EntryNotFoundError,
    LeaseLostError,
    TicketError,
)
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.settings import Settings

logger = logging.getLogger("vllm.companion.mirror")

SAID_AFTER_S = 60.0
RETRY_S, RETRY_MOST_S = 0.1, 2.0
"""Between attempts to hand back: at first, and after many."""
POLL_S = 0.02
DIES_S = 1.0
"""Until a companion that has died is known to have, by its stream."""
KNOWN_TIMEOUT_S = 10.0
"""For the next companion, if this one has died, to know what this process holds, before a call fails that needs it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """An entry that this process maps.

    Attributes:
        fds: one a block; borrowed.
    """

    key: EntryKey
    generation: int
    arena: ArenaInfo
    fds: Sequence[int]
    manifest: bytes
    published: Published

    @classmethod
    def of(cls, ready: Ready, fds: Sequence[int]) -> Held:
        """What is ready, with its descriptors."""
        return cls(ready.key, ready.generation, ready.arena, fds, ready.manifest, ready.published)


class Mirror:
    """A hold on an entry, across the deaths of companions, until `close` or the end of the process.

    A companion that is stopped, or unloads the entry, means it: then nothing is handed back.

    Args:
        lease: on `held`, attached; owned by the mirror from now on.
        passive: use nothing, and leave it to others to start the next companion.
        connection: of the lease, if it has one of its own; owned, too.

    Raises:
        RuntimeDirError: the hold cannot be noted where a new companion would look for it.
        ArenaError: this process has no descriptors left.
    """

    def __init__(
        self,
        device: str,
        settings: Settings,
        held: Held,
        lease: Lease,
        client_name: str,
        *,
        passive: bool = False,
        connection: CompanionConnection | None = None,
    ) -> None:
        self._device = device
        self._settings = settings
        self._passive = passive
        self._client_name = client_name
        self._lease = lease
        self._connection = connection
        self._closed = threading.Event()
        self._mutex = threading.Lock()  # guards what is held: another thread uses its numbers only under it
        self._attaching = threading.Lock()  # one at a time: each closes the connection of the one before
        self._held, self._fds, self._note = self._hold(held)
        _mirrors.add(self)
        self._watch(lease)

    @property
    def ended(self) -> bool:
        """Whether nothing is to be handed back any more."""
        return self._closed.is_set()

    @property
    def lost(self) -> bool:
        """Whether no companion knows of this hold at the moment. What is mapped stays valid."""
        return self._lease.lost.is_set()

    @property
    def lease(self) -> Lease:
        """The one that a companion knows this hold by."""
        return self._lease

    def keep_lease(self) -> tuple[Lease, CompanionConnection | None]:
        """End the hold; its lease, and the connection that has to be closed with that. The caller owns both."""
        self._let_go()
        self._lease.forget(self._let_go, self._on_lost)
        return self._lease, self._connection

    def hold_instead(self, held: Held) -> None:
        """From now on another generation of the same entry is held, which this process maps instead.

        Raises:
            RuntimeDirError, ArenaError: as the constructor. What was held is.
        """
        held, fds, note = self._hold(held)
        with self._mutex:
            if not self._closed.is_set():
                fds, self._fds, note, self._note, self._held = self._fds, fds, self._note, note, held
            os.close(note)
            fds.close()

    def _hold(self, held: Held) -> tuple[Held, Descriptors, int]:
        """Descriptors of our own, as the owner may close its own at any time; and the note that we have them."""
        try:
            fds = Descriptors.duplicates(held.fds)
        except OSError as error:
            raise _no_descriptors(held, error) from error
        try:
            paths = device_paths(self._device, self._settings)
            return replace(held, fds=fds), fds, notes.hold(paths, held.key, held.generation)
        except BaseException:
            fds.close()
            raise

    def know_again(self) -> None:
        """Be attached again, as after the death of a companion, and end the lease of before.

        Raises:
            CompanionError: the companion does not take it.
        """
        with self._attaching:
            before = self._lease
            self._attach_again()
        before.release()

    def ask(self, question: Callable[[Lease], T]) -> T:
        """Ask the companion that knows of this hold; the next one, if this one dies meanwhile.

        Args:
            question: asked by the lease that a companion knows, once or several times.

        Raises:
            CompanionError: as `question`; as `know_again`.
        """
        late, renewed = time.monotonic() + KNOWN_TIMEOUT_S, False
        while True:
            self.wait_known(late - time.monotonic())
            lease = self._lease
            try:
                return question(lease)
            except (CompanionUnavailableError, BadRequestError, TicketError) as error:
                if self.ended:
                    raise
                if lease is not self._lease and time.monotonic() < late:
                    continue  # another thread has been attached again meanwhile
                refused = not isinstance(error, CompanionUnavailableError)
                # It has died, and the next one, that may answer there already, does not know the lease.
                if lease.lost.wait(DIES_S if refused else max(0.0, late - time.monotonic())):
                    if time.monotonic() > late:
                        raise
                elif (
                    isinstance(error, BadRequestError) and not renewed
                ):  # it may take us for asleep: an answer was lost
                    renewed = True
                    self.know_again()
                else:
                    raise

    def wait_known(self, timeout_s: float) -> None:
        """Return once a companion knows of this hold, nothing is to be handed back, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while self.lost and time.monotonic() < deadline and not self._closed.wait(POLL_S):
            pass

    def close(self) -> None:
        """End the hold and its lease. Idempotent."""
        with ExitStack() as steps:  # from the last one on; each is taken, also if those before it were interrupted
            if self._connection is not None:
                steps.callback(self._connection.close)
            steps.callback(self._lease.release)
            steps.callback(self._let_go)

    def _watch(self, lease: Lease) -> None:
        lease.on_retired(self._let_go)
        lease.on_lost(self._on_lost)

    def _let_go(self) -> None:
        """Nothing is to be handed back any more."""
        with self._mutex:
            if not self._closed.is_set():
                self._closed.set()
                os.close(self._note)
                self._fds.close()

    def _on_lost(self, error: CompanionError) -> None:
        if isinstance(error, CompanionUnavailableError):
            if self._closed.is_set():
                return
            try:
                self._check_wanted(self._held)
            except LeaseLostError as unheard:  # it ended before it could say so
                error = unheard
        title = self._held.key.short_title
        if not isinstance(error, CompanionUnavailableError):
            logger.info("%s What this process maps of %s stays.", error, title)
            self._let_go()
            return
        level, text = logging.INFO, "The companion of %s makes room for another one, which gets %s from this process."
        if not isinstance(error, CompanionReplacedError):
            level = logging.INFO if self._passive else logging.WARNING
            text = "The companion of %s has died; this process keeps what it has of %s and hands it to the next one."
        logger.log(level, text, self._device, title)
        self.attach_again()  # in another thread: this is that of a stream of gRPC

    def attach_again(self) -> None:
        """Start to be attached again, by a thread of its own: the lease was lost, or released with its connection."""
        threading.Thread(target=self._hand_back, name="companion-hand-back", daemon=True).start()

    def _hand_back(self) -> None:
        """For as long as it takes: this may be the last copy."""
        if self._closed.is_set():
            return
        title, pause_s, late = self._held.key.short_title, RETRY_S, time.monotonic() + SAID_AFTER_S
        while not self._closed.is_set():
            try:
                with self._attaching:
                    if self.lost or self._lease.released:  # `know_again` may have been quicker
                        self._attach_again()
                return
            except (LeaseLostError, EntryNotFoundError) as error:  # unloaded or stopped, on purpose
                logger.info("%s The weights stay mapped here.", error)
                self._let_go()
            except Exception as error:  # whatever it is: nobody else may have it
                if time.monotonic() > late:
                    late = math.inf
                    logger.warning("%s cannot be handed back yet: %s It stays here; trying on.", title, error)
                logger.debug("Handing back failed", exc_info=True)
                self._closed.wait(pause_s)
                pause_s = min(2 * pause_s, RETRY_MOST_S)

    def _note_again(self, paths: DevicePaths, held: Held) -> None:
        logger.warning(
            "The runtime directory %s was removed while %s is in use; making it anew. Leave it while engines run.",
            *(paths.directory, held.key.short_title),
        )
        note = notes.hold(paths, held.key, held.generation)
        with self._mutex:
            if self._is_held(held):
                note, self._note = self._note, note
            os.close(note)

    def _forget(self) -> None:
        """In a child that was forked off: the hold is its parent's alone, and ends with it.

        Locks are new: a thread of the parent may have held those that came along, and nobody frees them here.
        """
        is_open = not self._closed.is_set()
        self._closed, self._mutex, self._attaching = threading.Event(), threading.Lock(), threading.Lock()
        self._closed.set()
        if is_open:
            os.close(self._note)
            self._fds.close()

    def _is_held(self, held: Held) -> bool:
        """Whether that is what is to be handed back, and the numbers of its descriptors still mean it."""
        return held is self._held and not self._closed.is_set()

    def _check_wanted(self, held: Held) -> None:
        with self._mutex:
            if self._is_held(held) and notes.is_dismissed(self._note):
                raise LeaseLostError(f"{held.key.title} was unloaded, or its companion stopped.")

    def _is_note_removed(self, held: Held) -> bool:
        with self._mutex:
            return self._is_held(held) and notes.is_removed(self._note)

    def _duplicates(self, held: Held) -> Descriptors | None:
        """Descriptors to hand over, which nobody closes meanwhile; None if something else is held by now."""
        with self._mutex:
            try:
                return self._fds.dup() if self._is_held(held) else None
            except OSError as error:
                raise _no_descriptors(held, error) from error

    def _attach_again(self) -> None:
        held = None
        while held is not self._held and not self._closed.is_set():  # an engine may advance meanwhile
            held = self._held
            self._attach_with(held)

    def _attach_with(self, held: Held) -> None:
        started = time.monotonic()
        self._check_wanted(held)
        paths = device_paths(self._device, self._settings)
        if self._is_note_removed(held):
            self._note_again(paths, held)
        if self._passive and not is_listening(paths):
            raise CompanionUnavailableError(f"Nobody has started a new companion of {self._device} yet.")
        connection = connect(self._device, self._settings, spawn=not self._passive)
        try:
            lease = connection.attach(
                held.key,
                may_load=False,
                client_name=self._client_name,
                held_generation=held.generation,
                passive=self._passive,
            )
            outcome = lease.wait(self._settings.wait_timeout_s)
            if self._closed.is_set():
                connection.close()
                return
            # Another one may have been stopped since; it ended before this one began, so all that it said is there.
            self._check_wanted(held)
            if isinstance(outcome, Granted):
                if (fds := self._duplicates(held)) is None:
                    connection.close()
                    return
                with fds:
                    outcome.publication.hand_back(held.arena, fds, held.manifest, held.published, held.generation)
            elif (outcome.generation, outcome.published) != (held.generation, held.published) and not (
                outcome.manifest == held.manifest and (outcome.published.version or held.published.version)
            ):
                connection.close()
                logger.warning(
                    "%s was loaded anew; this process keeps its own copy until it ends.", held.key.short_title
                )
                self._let_go()
                return
        except BaseException:
            connection.close()
            raise
        done = "Handed back" if isinstance(outcome, Granted) else "Attached again to"
        logger.info(
            "%s %s, generation %d, in %.2f s", done, held.key.short_title, held.generation, time.monotonic() - started
        )
        with self._mutex:
            is_wanted = not self._closed.is_set()
            if is_wanted:
                self._lease, old, self._connection = lease, self._connection, connection
            else:  # the lease of before was given away, or released, meanwhile
                old = connection
        if old is not None:
            old.close()
        if is_wanted:
            self._watch(lease)


def hold(connection: CompanionConnection, key: EntryKey, settings: Settings, client_name: str) -> Mirror:
    """Hold a published entry for the next companion, without using it. The caller closes it.

    Raises:
        CompanionError: it is not held, or was unloaded meanwhile.
    """
    lease = connection.attach(key, may_load=False, client_name=client_name, passive=True)
    try:
        outcome = lease.wait(settings.wait_timeout_s)
        if not isinstance(outcome, Ready):
            raise LeaseLostError(f"{key.title} was unloaded meanwhile.")
        with outcome.redeem() as fds:
            held = Held.of(outcome, fds)
            return Mirror(connection.device, settings, held, lease, client_name, passive=True)
    except BaseException:
        lease.release()
        raise


def _no_descriptors(held: Held, error: OSError) -> ArenaError:
    return ArenaError(f"{held.key.title} cannot be held: {error.strerror}. Raise the limit of open files (ulimit -n).")


_mirrors: weakref.WeakSet[Mirror] = weakref.WeakSet()


def _forget_all() -> None:
    for mirror in list(_mirrors):
        mirror._forget()


# What a child inherits would look as if its parent lived on: a lock of flock(2) ends with its last descriptor.
os.register_at_fork(after_in_child=_forget_all)
