"""vLLM's headless process: it builds an entry's model and processes new weights for it, as their writer (adr/0016).

It is a child of the trainer's process, which needs no vLLM itself, and ends with it. One serves all updates of an
entry.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from vllm_companion_plugin import memory
from vllm_companion_plugin.client.children import environment_of
from vllm_companion_plugin.client.lease import commit_unknown
from vllm_companion_plugin.errors import UpdateError, WaitTimeoutError, from_code
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.wire.handover import Channel, Piece

MODULE = "vllm_companion_plugin.engine.run.processed"
END_TIMEOUT_S = 10.0
"""For a process that was told to end, before it is killed."""


class Headless:
    """A running headless process. Its output goes to this process's standard error.

    Args:
        device_id: whose companion holds the entry: a GPU's UUID, or "cpu".
        device: the same device, as PyTorch names it in this process.
        key_id: of the entry.
        label: which entry it is, for errors.
        flags: of vLLM, as `vllm-companion serve MODEL` takes them, beside those that follow from the entry's key.

    Raises:
        NotShareableError: with these flags vLLM would load the model differently; the error says how.
        UpdateError, WaitTimeoutError: it ended, or has not built the model.
        CompanionError: what kept it from building the model.
    """

    def __init__(
        self,
        device_id: str,
        device: torch.device,
        key_id: str,
        label: str,
        flags: Sequence[str],
        settings: Settings,
    ) -> None:
        self._label = label
        self._timeout_s = settings.wait_timeout_s
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    env=environment_of(device, settings),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C reaches it through us only
                )
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours, f"vLLM's headless process (pid {self.process.pid}) of {label}", self.process.pid)
        self._end = weakref.finalize(self, _end, self._channel, self.process)
        self._ask({"device": device_id, "key_id": key_id, "flags": list(flags)})

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def begin(self, version: str, base: int) -> None:
        """Have it become the entry's writer. Arguments and errors are those of `updating`."""
        self._ask({"version": version, "base": base})

    def hand_over(self, pieces: Sequence[Piece], arena: memory.Arena) -> None:
        """Give it pieces of tensors in `arena`, which it has copied then. Raises what vLLM's loading raises."""
        message = {
            "pieces": [piece.to_json() for piece in pieces],
            "kind": arena.info.kind,
            "block_sizes": arena.info.block_sizes,
        }
        self._ask(message, arena.fds)

    def commit(self, version: str, before: int) -> int:
        """Have it finish and commit; the number of the generation, which is current.

        Args:
            version, before: what it commits, and the generation that was current before, for the error.

        Raises:
            CommitUnknownError: it may be current: the process ended, or did not answer.
            CompanionError: what the process says. Nothing of it stays.
        """
        try:
            answer = self._exchange({"end": True})
        except (UpdateError, WaitTimeoutError) as error:
            raise commit_unknown(str(error), version, before) from error
        return int(self._checked(answer)["generation"])

    def abort(self) -> None:
        """Have it stop writing, before it was given anything."""
        self._ask({"end": False})

    def _ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        return self._checked(self._exchange(message, fds))

    def _exchange(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """What the process answers. Raises `UpdateError` if it ended instead, and `WaitTimeoutError`."""
        with contextlib.suppress(UpdateError):  # if it has ended it may have said why
            self._channel.send(message, fds)
        try:
            answer, none = self._channel.receive(self._timeout_s)
            none.close()
        except UpdateError as error:
            self.close()
            raise UpdateError(error.what, remedy="What it wrote to standard error says why.") from error
        except BaseException:  # what it answers next would be the answer to this
            self.close()
            raise
        return answer

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer, unless it is an error, which this raises."""
        if "error" in answer:
            if answer.get("ends", True):
                self.close()
            raise from_code(str(answer["error"]), str(answer["text"]))
        return answer

    def close(self) -> None:
        """End it. What it was writing is forgotten. Idempotent."""
        self._end()


def _end(channel: Channel, process: subprocess.Popen[bytes]) -> None:
    channel.close()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
