"""The companion for programs that are not vLLM: trainers, converters, tools.

with CompanionClient("cpu").attach("my/model") as weights:
    print(weights.tensors["model.embed_tokens.weight"].shape)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from vllm_companion_plugin import fleet
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client import adapters, peft
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import CompanionConnection, Ready, Wanted, connect
from vllm_companion_plugin.client.filling import is_placed
from vllm_companion_plugin.client.headless import Headless
from vllm_companion_plugin.client.processed import ProcessedUpdate, processing
from vllm_companion_plugin.client.update import Update, check_version, updating
from vllm_companion_plugin.core.adapters import check_name
from vllm_companion_plugin.core.status import CompanionStatus, EntryStatus
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionUnavailableError,
    OvertakenError,
    RuntimeDirError,
    SettingsError,
    WaitTimeoutError,
)
from vllm_companion_plugin.host.runtime_dir import check_device, device_paths
from vllm_companion_plugin.host.spawn import is_listening
from vllm_companion_plugin.memory.tensors import checksum
from vllm_companion_plugin.settings import Given, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing itself from Python 3.11 on

__all__ = ["Attachment", "CompanionClient", "CompanionStatus", "EntryStatus"]

logger = logging.getLogger("vllm.companion.api")

POLL_S = 0.1
Mode = Literal["auto", "direct", "processed"]
MODES = get_args(Mode)


class CompanionClient:
    """Finds the companion of a device by the device's name.

    It holds nothing open, but for the headless processes of processed updates: until `close`, or its own end.

    Args:
        device: as torch names it ("cuda", "cuda:1", "cpu", a `torch.device`), or a GPU or MIG UUID. None: torch's
            current CUDA device, or "cpu" without CUDA.
        settings: by name, as in docs/settings.md, e.g. `runtime_dir="/run/weights"`.

    Attributes:
        device: the name of the companion's device: a UUID, or "cpu".

    Raises:
        SettingsError: an unknown setting, a bad value, or a device that this process does not see.
    """

    def __init__(self, device: str | torch.device | None = None, **settings: Unpack[Given]) -> None:
        self.settings = resolve(settings, origin="CompanionClient")
        self.device = device_name(device)
        self._headless: dict[str, tuple[tuple[str, ...], Headless]] = {}  # by the key's id; with its flags
        self._adapters = adapters.AdapterHolds(self.device, self.settings)

    def _connect(self) -> CompanionConnection:
        if not is_listening(device_paths(self.device, self.settings)):
            raise CompanionUnavailableError(
                f"No companion of {self.device} runs in {self.settings.runtime_dir}.",
                remedy="An engine with --load-format companion starts one, and so does `vllm-companion serve`.",
            )
        return connect(self.device, self.settings, spawn=False)

    def status(self) -> CompanionStatus:
        """What the companion holds. Raises `CompanionUnavailableError` if there is none."""
        with self._connect() as connection:
            return connection.status()

    def watch(self, timeout_s: float | None = None) -> Iterator[CompanionStatus]:
        """The status now and after every change, until the companion ends or you stop iterating.

        Raises:
            CompanionUnavailableError: there is none, or it ended.
            WaitTimeoutError: `timeout_s` is over.
        """
        with self._connect() as connection:
            yield from connection.watch(timeout_s)

    async def watch_async(self, timeout_s: float | None = None) -> AsyncGenerator[CompanionStatus, None]:
        """As `watch`, without blocking the event loop. It ends when the caller stops iterating or is cancelled."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[CompanionStatus | BaseException | None]()

        def tell(item: CompanionStatus | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(news.put_nowait, item)

        def follow(connection: CompanionConnection) -> None:
            try:
                for status in connection.watch(timeout_s):
                    tell(status)
                tell(None)
            except BaseException as error:
                tell(error)

        connection = await asyncio.to_thread(self._connect)
        with connection:  # closing it ends the thread
            threading.Thread(target=follow, args=(connection,), name="companion-watch", daemon=True).start()
            while (item := await news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    def wait_ready(
        self, model: str, rank: str | None = None, timeout_s: float = 600.0, *, role: str = "target"
    ) -> EntryStatus:
        """The READY entry of `model`, as soon as there is one; waits for a companion, too.

        Args:
            role: "target", or "draft" of speculative decoding.

        Raises:
            BadRequestError: no model is named.
            WaitTimeoutError: there was none for `timeout_s`.
        """
        _check_named(model)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._connect() as connection:
                    left_s = max(0.01, deadline - time.monotonic())
                    return connection.wait_ready(model, rank=rank, role=role, timeout_s=left_s)
            except CompanionUnavailableError as error:
                if time.monotonic() > deadline:
                    raise self._nobody_came(model, timeout_s, error) from error
            time.sleep(POLL_S)

    async def wait_ready_async(
        self, model: str, rank: str | None = None, timeout_s: float = 600.0, *, role: str = "target"
    ) -> EntryStatus:
        """As `wait_ready`, without blocking the event loop."""
        _check_named(model)
        deadline = time.monotonic() + timeout_s
        wanted = Wanted(model, rank, role)
        while True:
            try:
                left_s = max(0.01, deadline - time.monotonic())
                async with contextlib.aclosing(self.watch_async(left_s)) as statuses:
                    async for status in statuses:
                        if (entry := wanted.in_status(status)) is not None:
                            return entry
            except CompanionUnavailableError as error:
                if time.monotonic() > deadline:
                    raise self._nobody_came(model, timeout_s, error) from error
            except WaitTimeoutError:
                raise wanted.missed(self.device, timeout_s) from None
            await asyncio.sleep(POLL_S)

    def _nobody_came(self, model: str, timeout_s: float, error: CompanionUnavailableError) -> WaitTimeoutError:
        return WaitTimeoutError(f"Waited {timeout_s:g} s for {model}: {error.what}", remedy=error.remedy)

    def attach(
        self,
        model: str,
        rank: str | None = None,
        *,
        role: str = "target",
        key_id: str = "",
        name: str = "CompanionClient",
    ) -> Attachment:
        """Map the weights of `model`, waiting while somebody loads them. Never loads.

        Args:
            rank: needed if several are published, e.g. "tp0/2".
            role: "target", or "draft" of speculative decoding; with MTP both have the same name.
            key_id: of one of several loads of the model, from `status`.
            name: who we are, for `status` and other clients' messages.

        Raises:
            CompanionUnavailableError: no companion.
            EntryNotFoundError: nobody has published it nor is loading it.
            BadRequestError: several match, or no model is named.
            WaitTimeoutError: its loader made no progress for `wait_timeout_s`.
            ArenaError: it cannot be mapped.
            IntegrityError: its bytes are not those that were published.
        """
        _check_named(model, key_id)
        device = torch_device_of(self.device)
        if self.settings.verify != "off":
            checksum.prepare(device)
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(self._connect())
            lease = connection.attach(
                model=model, rank=rank or "", role=role, key_id=key_id, may_load=False, client_name=name
            )
            made = None
            while made is None:
                outcome = lease.wait(self.settings.wait_timeout_s)
                if isinstance(outcome, Ready):
                    made = Attachment.open(self.device, device, lease, outcome)
                elif outcome.parked is not None:
                    verify = self.settings.verify
                    with contextlib.suppress(OvertakenError):  # then it is ready soon
                        made = Attachment.bring_back(self.device, device, lease, outcome, connection, verify=verify)
                else:
                    raise BadRequestError(f"The companion of {self.device} asked a reader to load {model}.")
            try:
                made.verify(self.settings.verify)
                made.close_with_it(undo.pop_all())
                made.mirror(self.settings, name)
            except BaseException:
                made.close()
                raise
        return made

    @contextlib.contextmanager
    def update(
        self,
        model: str,
        version: str,
        rank: str | None = None,
        *,
        role: str = "target",
        key_id: str = "",
        base: int = 0,
        check_finite: bool = False,
        name: str = "CompanionClient",
        mode: Mode = "auto",
        flags: Sequence[str] = (),
    ) -> Iterator[Update | ProcessedUpdate]:
        """Write the next generation of the weights of `model`, which is current after `with` unless that raises.

        Engines go on with what they map, and advance when they are told. Other arguments as of `attach`.

        Args:
            version: your name for these weights, e.g. "step-7".
            mode: "direct": this process copies tensors to their places. "processed": vLLM loads them in a headless
                process, which is kept for the next update. "auto": direct if vLLM only copied when it loaded the
                entry.
            base: the generation that must be current, at the beginning and at the end, so that you overwrite no other
                writer's weights; 0: whichever is.
            check_finite: refuse tensors with NaN or infinity. It takes a reading of each.
            flags: of vLLM, as `vllm-companion serve MODEL` takes them. A headless process needs those that decide how
                the model is loaded and that its key does not tell; an error says which.

        Raises:
            BadRequestError: no version, or one that cannot be shown; from `load`, what does not fit, or is missing.
            StaleError: another generation than `base` is current.
            EntryInUseError: another client writes the next generation.
            ArenaError: there is no memory for another generation.
            NotShareableError: a headless process would load the model differently.
            UpdateError: vLLM could not process the weights, or its process ended.
            CommitUnknownError: the answer to the commit was lost, so these weights may be current. The message says how
                to find out; writing them again with the same `base` is safe.
            CompanionError: as `attach`.
        """
        check_version(version)
        if mode not in MODES:
            raise SettingsError(f"update: mode is {mode!r}; it is one of {', '.join(MODES)}.")
        with self.attach(model, rank, role=role, key_id=key_id, name=name) as attachment:
            if mode == "direct" or (mode == "auto" and is_placed(attachment.manifest)):
                with updating(attachment, version, self.settings, base=base, check_finite=check_finite) as update:
                    yield update
                return
            start = functools.partial(self._headless_of, attachment, tuple(flags))
            with processing(
                attachment, start, version, self.settings, base=base, check_finite=check_finite
            ) as processed:
                yield processed

    def _headless_of(self, attachment: Attachment, flags: tuple[str, ...]) -> Headless:
        """The headless process of an entry; started unless one with these flags runs."""
        key_id = attachment.held.key.id
        known, headless = self._headless.pop(key_id, (flags, None))
        if headless is not None and (known != flags or headless.ended):
            headless.close()
            headless = None
        if headless is None:
            headless = Headless(
                *(self.device, attachment.device, key_id, attachment.label, flags), settings=self.settings
            )
        self._headless[key_id] = flags, headless
        return headless

    def publish_adapter(
        self,
        name: str,
        weights: nn.Module | Mapping[str, torch.Tensor],
        config: Any = None,
        *,
        version: str = "",
        check_finite: bool = True,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Publish a LoRA adapter, or its next generation, which the next request of it is computed with.

        This client holds it until `remove_adapter` or `close`; then it stays as long as a model that nobody uses.
        Nothing of `weights` is written to, and it may be changed as soon as this returns.

        Args:
            name: by which engines are asked for it: `companion:NAME` as the path of a `LoRARequest`, or NAME as
                `model` over HTTP.
            weights: a `PeftModel`, whose active adapter is taken; or its tensors, by PEFT's names.
            config: PEFT's `LoraConfig`, or its fields; of a `PeftModel`, None.
            version: your name for these weights; empty: what they are is named.
            check_finite: refuse NaN and infinity, also if `dtype` or the scaling makes them. vLLM computes requests of
                several adapters together, and NaN of one can reach others.
            dtype: of what is published; None: of a `PeftModel` on weights that engines serve (`from_companion`), their
                dtype, which engines cast adapters to unless `--lora-dtype` says otherwise; of others, as the tensors
                are. It halves what is copied of what PEFT trains in float32 beside a base in bfloat16.

        Returns:
            The number of its generation.

        Raises:
            BadRequestError: vLLM's LoRA cannot compute it: all that it cannot is named. Values that are not finite. A
                configuration from which no scaling follows. Or a name or version that cannot be shown, or the name of a
                model that the companion holds.
            CompanionUnavailableError: no companion.
            EntryInUseError: another client writes its next generation.
            ArenaError: there is no memory for it.
        """
        adapter = peft.canonical(weights, config, label=f"Adapter {check_name(name)}")
        return self._adapters.publish(name, adapter, version, self._connect, dtype=dtype, check_finite=check_finite)

    def register_adapter(self, name: str, path: str, *, version: str = "") -> int:
        """As `publish_adapter`, of one that PEFT has saved in the directory `path`."""
        tensors, config = adapters.read_directory(path)
        return self.publish_adapter(name, tensors, config, version=version)

    def list_adapters(self) -> tuple[EntryStatus, ...]:
        """The adapters that the companion has. Raises `CompanionUnavailableError` if there is none."""
        return adapters.listed(self.status().entries)

    def remove_adapter(self, name: str) -> None:
        """Have engines refuse further requests of an adapter. Those that have begun end with it.

        Raises:
            EntryNotFoundError: the companion has no such adapter.
            CompanionUnavailableError: no companion.
        """
        try:
            with self._connect() as connection:
                adapters.remove(connection, name)
        finally:
            self._adapters.let_go(name)

    def close(self) -> None:
        """End the headless processes, which another update would start again, and hold no adapters. Idempotent."""
        self._adapters.close()
        while self._headless:
            _, (_, headless) = self._headless.popitem()
            headless.close()

    def advance(
        self, model: str, engines: Sequence[Any], generation: int = 0, *, clear_caches: bool = True
    ) -> fleet.FleetReport:
        """Have running engines take the current weights of `model` at one point, or others; or none of them.

        Args:
            engines: as of `fleet.advance`, which has limits of time, too.
            generation: its number; 0: the current one. An older one is the way back; `make_current` gives it to clients
                that come.
            clear_caches: as of `fleet.advance`.

        Raises:
            FleetError: not all have switched. Its `report` says what each engine has.
            SettingsError: as `fleet.advance`.
        """
        return fleet.advance(engines, {model: generation}, clear_caches=clear_caches)

    async def advance_async(
        self, model: str, engines: Sequence[Any], generation: int = 0, *, clear_caches: bool = True
    ) -> fleet.FleetReport:
        """As `advance`, without blocking the event loop; an `AsyncLLM` of this loop is an engine, too."""
        return await fleet.advance_async(engines, {model: generation}, clear_caches=clear_caches)

    def make_current(
        self, model: str, generation: int, *, rank: str = "", role: str = "", key_id: str = "", base: int = 0
    ) -> tuple[EntryStatus, ...]:
        """Make another generation of `model` the one that clients get: the way back. Nobody is moved.

        Args:
            key_id: of one of several loads of the model, from `status`.
            base: the generation that must be current now; 0: whichever.

        Raises:
            BadRequestError: no model is named.
            EntryNotFoundError: it is not held.
            StaleError: another generation than `base` is current.
        """
        _check_named(model, key_id)
        with self._connect() as connection:
            return connection.make_current(generation, model=model, rank=rank, role=role, key_id=key_id, base=base)


def _check_named(model: str, key_id: str = "") -> None:
    """Raise `BadRequestError` unless it is said which entry: an empty text would match any."""
    if not (model or key_id):
        raise BadRequestError("No model is named.", remedy="Name one as `vllm-companion status` shows it.")


def device_name(device: str | torch.device | None) -> str:
    """Return the name of a companion's device: a GPU or MIG UUID, or "cpu".

    Raises:
        SettingsError: the text is no device name, or torch sees no such device in this process.
    """
    if device is None:
        return current_device()
    if isinstance(device, str) and not device.startswith("cuda"):
        try:
            return check_device(device)
        except RuntimeDirError as error:
            remedy = "Name 'cpu', 'cuda:0' or a UUID, as `nvidia-smi -L` shows it."
            raise SettingsError(error.what, remedy=remedy) from error
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"{device!r} is no device name.", remedy="Name 'cpu', 'cuda' or 'cuda:INDEX'.") from error
    if named.type == "cpu":
        return "cpu"
    count = torch.cuda.device_count() if named.type == "cuda" else 0
    index = torch.cuda.current_device() if named.index is None and count else named.index or 0
    if index >= count:
        raise SettingsError(
            f"{named} is no device of a companion here: torch sees {count} CUDA devices in this process.",
            remedy="Name one of these, or 'cpu'; CUDA_VISIBLE_DEVICES may hide others.",
        )
    return arenas.cuda_device(index)


def current_device() -> str:
    """UUID of torch's current CUDA device, or "cpu"."""
    return arenas.cuda_device(torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"


def torch_device_of(device: str) -> torch.device:
    """torch's name of `device`. Raises `SettingsError` if this process does not see it."""
    if device == "cpu":
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if arenas.cuda_device(index) == device:
            return torch.device("cuda", index)
    raise SettingsError(f"torch does not see {device} in this process; look at CUDA_VISIBLE_DEVICES.")
