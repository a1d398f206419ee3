"""What `serve` takes care of: the companion of one device, whichever process that is at the moment."""

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
from vllm_companion_plugin.client.mirror import Holder, hold
from vllm_companion_plugin.client.shutdown import shut_down
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.status import CompanionStatus, EntryState
from vllm_companion_plugin.errors import CompanionError, CompanionUnavailableError, EntryNotFoundError, LeaseLostError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import is_listening, starting
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.supervise.children import Child, Signals, end

NAME = f"vllm-companion serve {__version__}"
TRIES = 3
RETRY_S = 10.0
HOLD_S = 10.0
"""What is ready is held in an instant, or was unloaded."""


class Ward:
    """A companion that belongs to us. All that it holds we hold, too, so that the next one gets it back.

    A thread follows what it says; all methods are the main thread's.

    Args:
        own_linger_s: seconds that it stays with nobody attached while it belongs to us; negative or infinite: for ever.

    Attributes:
        pid: of the companion.
        error: why it ended; None if it was stopped, or runs.
        ended: whether it has.
    """

    def __init__(self, device: str, settings: Settings, own_linger_s: float) -> None:
        self.device = device
        self.pid = 0
        self.error: CompanionError | None = None
        self.ended = False
        self._settings = replace(settings, wait_timeout_s=min(settings.wait_timeout_s, HOLD_S))
        self._own_linger_s = own_linger_s if math.isfinite(own_linger_s) else -1.0
        self._children: list[Child] = []
        self._connection: CompanionConnection | None = None
        self._thread: threading.Thread | None = None
        self._holders: dict[tuple[str, int], Holder] = {}
        self._refused_until: dict[tuple[str, int], float] = {}

    @property
    def started(self) -> bool:
        """Whether it runs as our child, or one before it did."""
        return bool(self._children)

    def start(self, signals: Signals) -> None:
        """Own the companion that runs, or start one as our child.

        Raises:
            AlreadyRunningError: it belongs to another process.
            CompanionUnavailableError: it cannot be started, or dies again and again.
            Stopped: a signal asked us to end.
        """
        for left in reversed(range(TRIES)):
            self._ensure(signals)
            try:
                self._own(signals)
                return
            except CompanionUnavailableError:  # it was on its way out when it was asked
                if not left:
                    raise

    def _ensure(self, signals: Signals) -> None:
        paths = device_paths(self.device, self._settings)
        if is_listening(paths):
            return
        # Engines that map its entries, or an upgrade, may be starting one as well.
        what, pause = f"the companion of {self.device}", lambda seconds: signals.wait(timeout_s=seconds)
        with starting(paths.spawn_lock, what, paths.log, self._settings, pause=pause):
            if not is_listening(paths):
                for before in self._children:
                    before.process.poll()  # collected, if it has ended
                child = Child(self.device, self._settings)
                self._children.append(child)
                try:
                    child.wait_ready(signals, self._settings.spawn_timeout_s)
                except CompanionError:  # of many attempts nothing may be left
                    end([child.process])
                    self._children.remove(child)
                    raise

    def _own(self, signals: Signals) -> None:
        connection = connect(self.device, self._settings, spawn=False)
        try:
            statuses = connection.watch(own_linger_s=self._own_linger_s)
            first = next(statuses)
        except BaseException:
            connection.close()
            raise
        if self._connection is not None:
            self._connection.close()
        self.pid, self._connection, self.error, self.ended = first.pid, connection, None, False
        arguments = (connection, itertools.chain([first], statuses), signals)
        self._thread = threading.Thread(target=self._follow, args=arguments, name="companion-ward", daemon=True)
        self._thread.start()

    def _follow(self, connection: CompanionConnection, statuses: Iterator[CompanionStatus], signals: Signals) -> None:
        try:
            for status in statuses:
                self._keep(connection, status)
        except LeaseLostError:
            self.error = None
        except CompanionError as error:
            self.error = error
        except Exception as error:  # whatever it is, it is not that somebody stopped the companion
            self.error = CompanionError(f"The companion of {self.device}: {type(error).__name__}: {error}")
        finally:
            self.ended = True
            signals.wake()

    def _keep(self, connection: CompanionConnection, status: CompanionStatus) -> None:
        """Hold what is new, and let go of what was unloaded."""
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
                continue  # unloaded, or the companion has died: a status follows
            except CompanionError as error:
                # Each attempt changes the status, which would bring the next one at once.
                self._refused_until[number] = time.monotonic() + RETRY_S
                text = f"vllm-companion: {entry.key.title} would be lost with its companion: {error}"
                say(text, error=True)

    def let_go(self) -> None:
        """It is nobody's any more, and we hold nothing. Its linger time begins to count."""
        if self._connection is not None:
            self._connection.close()
        if self._thread is not None:
            self._thread.join(5)
        for holder in self._holders.values():
            holder.close()
        self._holders.clear()

    def stop(self) -> None:
        """End it, whoever started it, and let go."""
        adopted = self.pid not in [child.process.pid for child in self._children]
        try:
            if self._connection is not None and not self.ended and adopted:
                with contextlib.suppress(CompanionUnavailableError):  # it has gone by itself
                    shut_down(self._connection)
        except CompanionError as error:  # the others are to end all the same
            say(f"vllm-companion: error: {error}", error=True)
        finally:
            end([child.process for child in self._children])
            self.let_go()
