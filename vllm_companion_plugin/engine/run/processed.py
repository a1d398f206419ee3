"""`python -m vllm_companion_plugin.engine.run.processed FD PID`: vLLM's headless process, which a trainer starts.

It builds the model of an entry as an engine would, with a worker and without a KV cache, and loads new weights into
the entry's next generation whenever the trainer says so. FD is its socket to the trainer (`wire/handover.py`), PID the
trainer's process. It ends with either, or after an update that did not finish.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.plugins import load_general_plugins
from vllm.v1.executor.abstract import Executor

from vllm_companion_plugin.client.api import CompanionClient
from vllm_companion_plugin.client.handing import Taking
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine.live import LiveModel
from vllm_companion_plugin.engine.reloading import why_anew, write_generation
from vllm_companion_plugin.engine.session import current
from vllm_companion_plugin.engine.vllm import flags
from vllm_companion_plugin.errors import CompanionError, EntryNotFoundError, NotShareableError, UpdateError
from vllm_companion_plugin.wire.handover import Channel

logger = init_logger("vllm.companion")

# Fields of a key from which flags of vLLM follow. What other flags change, the trainer has to say.
_FLAGS = {
    "model.dtype": "--dtype",
    "model.quantization": "--quantization",
    "model.model_impl": "--model-impl",
    "cache.cache_dtype": "--kv-cache-dtype",
    "cache.mamba_cache_dtype": "--mamba-cache-dtype",
    "cache.mamba_ssm_cache_dtype": "--mamba-ssm-cache-dtype",
    "kernel.moe_backend": "--moe-backend",
    "kernel.linear_backend": "--linear-backend",
}
_SMALL = ("--gpu-memory-utilization", "0.01", "--max-num-seqs", "1", "--enforce-eager", "--skip-tokenizer-init")
"""No limit is in a key. What this process takes beside the weights, it takes from engines."""
MOST_SAID = 10_000
"""Characters of an error that a trainer is told: six bytes each, at worst, in a packet."""
_OF_VLLM = "env."
"""Fields of a key that begin so are variables of vLLM's environment."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one trainer until it closes the socket or ends."""
    fd, pid = map(int, sys.argv[1:] if arguments is None else arguments)
    channel = Channel(socket.socket(fileno=fd), f"The trainer (pid {pid})", pid)
    try:
        _serve(channel)
    except CompanionError as error:
        _say_error(channel, error)
        return 1
    except Exception as error:
        logger.exception("The headless process ends")
        _say_error(channel, UpdateError(f"vLLM raised {type(error).__name__}: {error}"))
        return 1
    finally:
        channel.close()
    return 0


def _say_error(channel: Channel, error: CompanionError, *, ends: bool = True) -> None:
    with contextlib.suppress(UpdateError):  # the trainer has gone, and nobody asks
        channel.send({"error": error.code, "text": str(error)[:MOST_SAID], "ends": ends})


def _serve(channel: Channel) -> None:
    hello, _ = channel.receive()
    executor = _executor(hello["device"], hello["key_id"], hello["flags"])
    (anew,) = executor.collective_rpc(_loads_anew)
    channel.send({"pid": os.getpid()})
    while (wanted := _next(channel)) is not None:
        executor.collective_rpc(_update, args=(channel, wanted["version"], wanted["base"], anew))


def _next(channel: Channel) -> dict[str, Any] | None:
    try:
        return channel.receive()[0]
    except UpdateError:  # the trainer has gone
        return None


def _model() -> tuple[LiveModel, nn.Module]:
    """What this process is there to write, and the model that is bound to it."""
    model = current().target()
    lives = [each for each in current().models() if each.attachment.held.key.role == "target"]
    if model is None or len(lives) != 1:
        raise UpdateError("The headless process has no model any more.")
    return lives[0], model


def _loads_anew(worker: Any) -> bool:
    """In the worker: whether each update is loaded into a second model, because vLLM's reload would lose some of it."""
    attachment = _model()[0].attachment
    reason = why_anew(worker.vllm_config, attachment)
    if reason:
        logger.warning(
            "vLLM's reload would not load %s right: %s. Each update is loaded into a second model instead, which takes "
            "%.2f GiB or more of the device meanwhile.",
            *(attachment.label, reason, attachment.size_bytes / 2**30),
        )
    return bool(reason)


def _update(worker: Any, channel: Channel, version: str, base: int, anew: bool) -> None:
    """In the worker: one update, from the question for it to its answer. `anew` is as of `write_generation`."""
    live, model = _model()
    weights = _Weights(channel, live.attachment.device)
    try:
        generation = write_generation(worker, live, model, version, base, iter(weights), anew=anew)
    except _NotWanted:
        channel.send({})
    except CompanionError as error:
        if weights.came:
            raise
        _say_error(channel, error, ends=False)
    else:
        channel.send({"generation": generation})


class _NotWanted(Exception):
    """The trainer stops before it has handed anything over."""


class _Weights:
    """The tensors of an update, as the trainer hands them over.

    Attributes:
        came: whether it has handed over anything.
    """

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel = channel
        self._taking = Taking(device)
        self.came = False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._channel.send({})  # this process is the entry's writer
        while True:
            message, fds = self._channel.receive()
            if "end" in message:
                fds.close()
                if not message["end"]:
                    raise _NotWanted
                self._taking.end()
                return
            self.came = True
            complete = self._taking.take(message, fds)
            self._channel.send({})
            while complete:  # vLLM alone keeps what it was given
                yield complete.pop(0)


def _executor(device: str, key_id: str, more_flags: Sequence[str]) -> Executor:
    """What runs a worker that is attached to the entry, and does nothing else.

    Raises:
        EntryNotFoundError: it is not held.
        NotShareableError: it is of one rank of several, a draft, or what these flags make is loaded differently.
    """
    status = CompanionClient(device).status()
    key = next((entry.key for entry in status.entries if entry.key.id == key_id), None)
    if key is None:
        raise EntryNotFoundError(f"The companion of {device} does not hold {key_id[:12]} any more.")
    if key.rank != "single" or key.role != "target":
        raise NotShareableError(
            f"{key.title} ({key.rank}) cannot be processed: a headless process has one rank, and no draft.",
            remedy='Write it with mode="direct", in its final form.',
        )
    os.environ.update(
        {name.removeprefix(_OF_VLLM): value for name, value in key.fields.items() if name.startswith(_OF_VLLM)}
    )
    load_general_plugins()
    current().write_only(key)
    args = flags.parse("update", [key.source or key.model, *_flags_of(key), *more_flags, *_SMALL])
    args = flags.through_companion(args, fallback=False, follow_updates=True, share="readonly")
    config = args.create_engine_config()
    return Executor.get_class(config)(config)


def _flags_of(key: EntryKey) -> list[str]:
    found = []
    for field, flag in _FLAGS.items():
        value = json.loads(key.fields.get(field, "null"))
        if isinstance(value, str):
            found += [flag, value.removeprefix("torch.")]
    source_format = key.fields.get("source_format", "auto")
    return found if source_format == "auto" else [*found, "--load-format", source_format]


if __name__ == "__main__":
    sys.exit(main())
