"""A ward: the companion of one device that `serve` keeps running, whichever process that is at the moment."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.client.connection import CompanionConnection, connect
from vllm_companion_plugin.client.mirror import Mirror, hold
from vllm_companion_plugin.client.shutdown import shut_down
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.status import CompanionStatus, EntryState
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, EntryNotFoundError, LeaseLostError
from vllm_companion_plugin.host import last_word
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening, starting
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.supervise.children import Child, Signals, end

NAME = f"vllm-companion serve {__version__}"
TRIES = 3
RETRY_S = 10.0
HOLD_S = 10.0
"""Longest wait for a hold, in seconds. A hold on a ready entry takes an instant, unless the entry was unloaded."""


class Ward:
    """A companion that this process owns. The ward holds all of its entries, too, and hands them to the next companion.

    A thread reads the companion's status; only the main thread may call the methods.

    Args:
        own_linger_s: seconds that the owned companion stays without a client; negative or infinite: for ever.
        expects_client: that time begins with the first client; an attribute, too.

    Attributes:
        pid: pid of the companion.
        error: why the companion ended; None if a user stopped it, it was idle for too long, or it runs.
        farewell: what the companion said at its end, if it was meant to end.
        ended: whether the companion has ended.
    """

    def __init__(self, device: str, settings: Settings, own_linger_s: float, *, expects_client: bool = False) -> None:
        self.device = device
        self.pid = 0
        self.expects_client = expects_client
        self.farewell = f"The companion of {device} was stopped."
        self.error: CompanionError | None = None
        self.ended = False
        self._settings = replace(settings, wait_timeout_s=min(settings.wait_timeout_s, HOLD_S))
        self._own_linger_s = own_linger_s if math.isfinite(own_linger_s) else -1.0
        self._children: list[Child] = []
        self._connection: CompanionConnection | None = None
        self._thread: threading.Thread | None = None
        self._holders: dict[tuple[str, int], Mirror] = {}
        self._refused_until: dict[tuple[str, int], float] = {}

    @property
    def started(self) -> bool:
        """Whether this companion, or an earlier one of this ward, runs as our child."""
        return bool(self._children)

    def start(self, signals: Signals) -> None:
        """Own the running companion, or start one as a child of this process.

        Raises:
            AlreadyRunningError: another process owns the companion.
            CompanionUnavailableError: no companion can be started, or each one dies at once.
            Stopped: a signal asked this process to end.
        """
        for left in reversed(range(TRIES)):
            self._ensure(signals)
            try:
                self._own(signals)
                return
            except CompanionUnavailableError:  # the companion was already ending
                if not left:
                    raise

    def _ensure(self, signals: Signals) -> None:
        paths = device_paths(self.device, self._settings)
        if is_listening(paths):
            return
        # Engines that map entries of the old companion, or an upgrade, may be starting a companion as well.
        what, pause = f"the companion of {self.device}", lambda seconds: signals.wait(timeout_s=seconds)
        with starting(paths.spawn_lock, what, paths.log, self._settings, pause=pause):
            if not is_listening(paths):
                for before in self._children:
                    before.process.poll()  # collects the process if it has ended
                child = Child(self.device, self._settings)
                self._children.append(child)
                try:
                    child.wait_ready(signals, self._settings.spawn_timeout_s)
                except CompanionError:  # many failed attempts must leave no process behind
                    end([child.process])
                    self._children.remove(child)
                    raise

    def _own(self, signals: Signals) -> None:
        connection = connect(self.device, self._settings, spawn=False)
        try:
            statuses = connection.watch(own_linger_s=self._own_linger_s, from_first_client=self.expects_client)
            first = next(statuses)
        except BaseException:
            connection.close()
            raise
        if self._connection is not None:
            self._connection.close()
            self._attach_again()
        self.pid, self._connection, self.error, self.ended = first.pid, connection, None, False
        arguments = (connection, itertools.chain([first], statuses), signals)
        self._thread = threading.Thread(target=self._follow, args=arguments, name="companion-ward", daemon=True)
        self._thread.start()

    def _attach_again(self) -> None:
        """Have holds whose leases went with the connection known again: nobody has noticed a companion's death."""
        for holder in self._holders.values():
            if holder.lease.released and not holder.lost:
                holder.attach_again()

    def _follow(self, connection: CompanionConnection, statuses: Iterator[CompanionStatus], signals: Signals) -> None:
        try:
            for status in statuses:
                self._keep(connection, status)
        except LeaseLostError as error:
            self.error, self.farewell = None, str(error)
        except CompanionError as error:
            self.error = None if last_word.was_left(connection.paths) else error
        except Exception as error:  # no error of this kind means that a user stopped the companion
            self.error = CompanionError(f"The companion of {self.device}: {type(error).__name__}: {error}")
        finally:
            self.ended = True
            signals.wake()

    def _keep(self, connection: CompanionConnection, status: CompanionStatus) -> None:
        """Hold the new entries and generations, and let go of the unloaded ones and of those that are not current."""
        for number in [number for number, holder in self._holders.items() if holder.ended]:
            self._holders.pop(number).close()
        for entry in status.entries:
            number = (entry.key.id, entry.generation)
            refused = time.monotonic() < self._refused_until.get(number, 0.0)
            if entry.state is not EntryState.READY or number in self._holders or refused:
                continue
            try:
                self._holders[number] = hold(connection, entry.key, self._settings, NAME)
            except (EntryNotFoundError, LeaseLostError, CompanionUnavailableError):
                continue  # the entry was unloaded, or the companion died: another status follows
            except CompanionError as error:
                # Each attempt changes the status. Without a pause the new status would start the next attempt at once.
                self._refused_until[number] = time.monotonic() + RETRY_S
                text = f"vllm-companion: {entry.key.title} would be lost with its companion: {error}"
                say(text, error=True)
        current = {entry.key.id: entry.generation for entry in status.entries if entry.state is EntryState.READY}
        for key_id, generation in list(self._holders):
            if current.get(key_id, generation) != generation:
                self._holders.pop((key_id, generation)).close()

    def let_go(self) -> None:
        """Give up the companion and all that this ward holds. The companion's linger time begins to count."""
        if self._connection is not None:
            self._connection.close()
        if self._thread is not None:
            self._thread.join(5)
        for holder in self._holders.values():
            holder.close()
        self._holders.clear()

    def stop(self) -> None:
        """End the companion, whoever started it, and let go of all that this ward holds."""
        adopted = self.pid not in [child.process.pid for child in self._children]
        try:
            if self._connection is not None and not self.ended and adopted:
                with contextlib.suppress(CompanionUnavailableError):  # the companion has already ended
                    shut_down(self._connection)
        except CompanionError as error:  # the caller still has to end the other wards
            say(f"vllm-companion: error: {error}", error=True)
        finally:
            end([child.process for child in self._children])
            self.let_go()
