"""Full fine-tuning on the bytes that engines serve: parameters in place, written while all engines are paused."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vllm_companion_plugin import fleet
from vllm_companion_plugin.client.api import CompanionClient
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.mirror import KNOWN_TIMEOUT_S
from vllm_companion_plugin.client.update import Owned, begin_training, check_version
from vllm_companion_plugin.errors import (
    BadRequestError,
    CompanionError,
    NotShareableError,
    SharedWeightsError,
    StaleError,
)
from vllm_companion_plugin.memory import Arena
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.settings import Given
from vllm_companion_plugin.training.base import attached
from vllm_companion_plugin.training.blueprint import Blueprint, bind, blueprint_of, refuse, views_of
from vllm_companion_plugin.training.sharing import Places

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("vllm.companion.training")

_SINGLE = "single"
_REMEDY = "Write its weights with `CompanionClient.update` instead, which has vLLM process them."


def trained(
    model: str,
    engines: Sequence[Any] = (),
    *,
    version: str,
    device: str | torch.device | None = None,
    key_id: str = "",
    auto_class: Any = None,
    name: str = "trainer",
    options: Mapping[str, Any] | None = None,
    **settings: Unpack[Given],
) -> Trained:
    """Own a new generation of the entry of `model`, which this process writes in place while `engines` map it.

    It begins as a copy of the current generation, is current from then on, and engines advance to it. That is all the
    memory that it takes, here and in engines.

    Args:
        model: as engines name it. If nobody has it, vLLM loads it, as of `from_companion`.
        engines: as of `fleet.advance`, but for an `AsyncLLM`; `join` takes more. Nobody else pauses for a step.
        version: your name for the weights. Outputs of engines are labelled `VERSION+N` after step N (vLLM 0.27).
        device, key_id, auto_class, name, options: as of `from_companion`.

    Raises:
        NotShareableError: parameters are no views of the entry, or are cast in engines: it names them and why. Or the
            entry is spread over ranks.
        BadRequestError: no version, or one that cannot be shown.
        SettingsError: as `fleet.advance`.
        EntryInUseError: another client writes the next generation.
        ArenaError: there is no memory for another generation, or it cannot be trained on this device.
        FleetError: an engine cannot take it, e.g. as its kernels use processed copies of weights. What was current is
            again.
        CompanionError: as `from_companion`.
    """
    check_version(version)
    if engines:
        fleet.check(engines)
    client = CompanionClient(device, **settings)
    attachment = attached(client, model, None, key_id, name)
    try:
        if attachment.rank != _SINGLE:
            raise NotShareableError(f"{attachment.label} is one rank of several, and no whole model.", remedy=_REMEDY)
        blueprint = blueprint_of(attachment, auto_class, options)
        _check(blueprint, attachment)
        owned = begin_training(attachment, version, client.settings)
        try:
            made = Trained(_model_on(owned, blueprint, attachment), owned, attachment, version)
            made.join(*engines)
        except BaseException:
            _give_back(client, attachment, owned)
            raise
    except BaseException:
        attachment.close()
        raise
    logger.info(
        "%s is trained in place: generation %d of %s (%.2f GiB), for %d engines.",
        *(type(made.model).__name__, owned.generation, attachment.label, attachment.size_bytes / 2**30, len(engines)),
    )
    return made


def _check(blueprint: Blueprint, attachment: Attachment) -> None:
    _, reasons = views_of(blueprint, attachment.views())
    refuse(blueprint.missing(reasons), blueprint, attachment.label, _REMEDY)


def _model_on(owned: Owned, blueprint: Blueprint, attachment: Attachment) -> Any:
    views, _ = views_of(blueprint, ArenaViews(owned.arena, attachment.size_bytes, attachment.device))
    state = {name: view for name, view in views.items() if name in blueprint.parameters}
    made = blueprint.make({**blueprint.buffers(views), **state}, attachment.device)
    _, problems = bind(made, views, (), lambda _, parameter: parameter)
    refuse(problems, blueprint, attachment.label, _REMEDY)
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


def _give_back(client: CompanionClient, attachment: Attachment, owned: Owned) -> None:
    """Make current again what was so before. What failed is told, not this."""
    key = attachment.held.key
    with contextlib.suppress(CompanionError):
        client.make_current(key.model, owned.before, key_id=key.id, base=owned.generation)


class Trained:
    """A model whose parameters are a generation that engines map: `trained` makes it. Ends with `close` or `with`.

    Outside of `step` a write to a parameter ends the process (host) or its CUDA context (device); an optimizer of
    PyTorch is stopped before it writes.

    Attributes:
        model: a `PreTrainedModel`. Its parameters require gradients; its buffers are its own.
        generation: the number of what is trained.
        version: the name of what is trained.
        steps: how many have been written whole.
        report: what each engine has since the last step; None: there was no engine.
    """

    def __init__(self, model: Any, owned: Owned, attachment: Attachment, version: str) -> None:
        self.model = model
        self.generation = owned.generation
        self.version = version
        self.steps = 0
        self.report: fleet.FleetReport | None = None
        self._arena = owned.arena
        self._attachment = attachment
        self._engines: list[Any] = []
        self._watch = _Watch(owned.arena, attachment.label)
        self._is_closed = False
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._places = Places(model, names, attachment.label)

    @property
    def label(self) -> str:
        """Which entry it is: model, rank and device."""
        return self._attachment.label

    def join(self, *engines: Any) -> None:
        """Have more engines take the generation; they pause for each step from then on. Raises `FleetError`."""
        self._check_idle()
        if engines:
            fleet.advance(engines, {self._attachment.held.key.id: self.generation})
            here = {fleet.identity_of(each) for each in self._engines}
            self._engines += [each for each in engines if fleet.identity_of(each) not in here]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """While open, all engines are paused, and the parameters may be written to; engines go on with them then.

        Requests stay, and compute what they had in caches again. Keep it short: gradients are computed outside.

        Raises:
            FleetError: an engine cannot prepare or pause: nothing was written, and all go on. Or the body of `with`
                failed: the weights may be partly new, and all that answer go on with them. Or an engine has failed
                since. Its `report` says what each engine has.
            StaleError: another generation is current by now. Nothing was written.
            NotSharedError: parameters have been replaced, so that engines would not get what is written.
            BadRequestError: closed, or in a step.
        """
        self._check_idle()
        self._check_current()
        self._places.check()
        self._watch.is_writing = True
        written = fleet.Written()
        try:
            with contextlib.ExitStack() as stack:
                if self._engines:
                    written = stack.enter_context(self._paused())
                with self._arena.writing():
                    yield
                self._places.check()
            self.steps += 1
        finally:
            self.report, self._watch.is_writing = written.report, False

    def _paused(self) -> contextlib.AbstractContextManager[fleet.Written]:
        key = self._attachment.held.key
        label = f"{self.version}+{self.steps + 1}"
        target = fleet.InPlace(key.id, f"{key.model} ({key.role})", self.generation, label)
        return fleet.writing(self._engines, target)

    def _check_idle(self) -> None:
        if self._is_closed:
            raise BadRequestError(f"The training of {self.label} has ended.")
        if self._watch.is_writing:
            raise BadRequestError(f"A step of {self.label} is open already.")

    def _check_current(self) -> None:
        self._attachment.wait_known(KNOWN_TIMEOUT_S)
        current = self._attachment.current_lease.generation(0, self._attachment.held.manifest)
        if not self._attachment.had(current):
            raise StaleError(
                f"Generation {self.generation} of {self.label} is not current any more: {current.generation} is.",
                remedy="Make it current again (`vllm-companion rollback MODEL --to NUMBER`), or train that one anew.",
            )

    def close(self) -> None:
        """Write no more; what engines map stays as it is, and current. The model can still be read. Idempotent.

        Raises:
            BadRequestError: in a step.
        """
        if self._is_closed:
            return
        self._check_idle()
        self._is_closed = True
        self._attachment.close()

    def __enter__(self) -> Trained:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Watch:
    """Stops optimizers of PyTorch before they write to an arena outside of a step, as long as anything views it.

    Attributes:
        is_writing: whether a step is open.
    """

    def __init__(self, arena: Arena, label: str) -> None:
        self.is_writing = False
        self._addresses = range(arena.address, arena.address + arena.info.size_bytes)
        self._label = label
        hook = register_optimizer_step_pre_hook(self._stop)
        weakref.finalize(arena, hook.remove).atexit = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, parameters have no addresses
    def _stop(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Raise `SharedWeightsError` if it is about to write. Whatever views the arena counts, in any model."""
        if self.is_writing:
            return
        if any(_address(each) in self._addresses for group in optimizer.param_groups for each in group["params"]):
            raise SharedWeightsError(
                f"{type(optimizer).__name__} would write to {self._label} while engines use it.",
                remedy="Call it inside of `with trained.step():`.",
            )


def _address(parameter: torch.Tensor) -> int | None:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # of a tensor that is spread over ranks
        return None
