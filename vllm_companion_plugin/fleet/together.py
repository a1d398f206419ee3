"""Having a fleet take new weights together: the steps of `course.py`, told to all engines at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vllm_companion_plugin.core.plans import Plan
from vllm_companion_plugin.errors import FleetError, SettingsError
from vllm_companion_plugin.fleet.course import Answer, Course, Member, Step, Weights
from vllm_companion_plugin.fleet.engines import Engine, NotDone, engine_of
from vllm_companion_plugin.fleet.report import EngineReport, FleetReport

PREPARE_TIMEOUT_S = 120.0
TIMEOUT_S = 30.0
RETRY_S = 1.0
"""Before an engine is told again to resume."""
UNNAMED = "default"
"""vLLM's own name for the weights of a checkpoint (vllm/v1/engine/core.py)."""


def advance(
    engines: Sequence[Any],
    generations: Mapping[str, int] | None = None,
    *,
    clear_caches: bool = True,
    prepare_timeout_s: float = PREPARE_TIMEOUT_S,
    timeout_s: float = TIMEOUT_S,
) -> FleetReport:
    """Have all engines take the current generations of their weights, or others, at one point; or none of them.

    All prepare while they serve. Then all pause, switch, and resume; requests wait and are not lost. If one that lives
    cannot take a step all stay with what they had. One that dies leaves the others.

    Args:
        engines: base URLs of `vllm serve` with VLLM_SERVER_DEV_MODE=1, Ray actors of an `LLM` or `AsyncLLM`, or an
            `LLM` of this process, which nobody else may use meanwhile.
        generations: by the name of the model, or the last parts of it: older ones, too. 0, or a model that is left out:
            the current one.
        clear_caches: reset the prefix cache, the encoder's and those of connectors in the pause, so that nothing that
            was computed with the weights of before answers for the new ones. Requests that run are computed again from
            their tokens. Without, they go on with the old ones' keys and values.
        prepare_timeout_s: for an engine's answer that it has prepared.
        timeout_s: for its answer to each later step.

    Returns:
        What each engine has; all of them have the new weights.

    Raises:
        FleetError: they have not all switched. Its `report` says which engine has what.
        SettingsError: something in `engines` is no engine, or is there twice, or there are none.
    """
    return _advance(engines, None, generations, clear_caches, prepare_timeout_s, timeout_s)


async def advance_async(
    engines: Sequence[Any],
    generations: Mapping[str, int] | None = None,
    *,
    clear_caches: bool = True,
    prepare_timeout_s: float = PREPARE_TIMEOUT_S,
    timeout_s: float = TIMEOUT_S,
) -> FleetReport:
    """As `advance`, without blocking the event loop; an `AsyncLLM` of this loop is an engine, too."""
    loop = asyncio.get_running_loop()
    return await asyncio.to_thread(_advance, engines, loop, generations, clear_caches, prepare_timeout_s, timeout_s)


def _advance(
    engines: Sequence[Any],
    loop: asyncio.AbstractEventLoop | None,
    generations: Mapping[str, int] | None,
    clear_caches: bool,
    prepare_timeout_s: float,
    timeout_s: float,
) -> FleetReport:
    known = _known(engines, loop)
    round_ = _Round(known, generations or {}, clear_caches, prepare_timeout_s, timeout_s)
    round_.run()
    report = round_.report()
    report.check()
    return report


def check(engines: Sequence[Any]) -> None:
    """Raise `SettingsError` unless `advance` would take these. Nobody is told anything."""
    _known(engines, None)


def identity_of(engine: Any) -> Any:
    """What two ways to name one engine have in common."""
    return engine.rstrip("/") if isinstance(engine, str) else id(engine)


def _known(engines: Sequence[Any], loop: asyncio.AbstractEventLoop | None) -> list[Engine]:
    if isinstance(engines, str) or not engines:
        raise SettingsError(f"{engines!r} is no list of engines.", remedy="Give a list of URLs or objects.")
    known: dict[Any, Engine] = {}
    for engine in engines:
        identity = identity_of(engine)
        if identity in known:
            raise SettingsError(f"{known[identity].name} is given twice.", remedy="Give each engine once.")
        known[identity] = engine_of(engine, loop)
    return list(known.values())


@dataclass(frozen=True)
class InPlace:
    """A generation that the caller writes while engines map it.

    Attributes:
        name: of its model, as `advance` takes it.
        title: the model and role by which engines call it, e.g. "org/model (target)".
        generation: its number.
        label: the `weight_version` of outputs from now on.
    """

    name: str
    title: str
    generation: int
    label: str


@dataclass
class Written:
    """What became of a fleet whose weights were written in place; `report` is there after the end."""

    report: FleetReport | None = None


@contextlib.contextmanager
def writing(
    engines: Sequence[Any],
    target: InPlace,
    *,
    prepare_timeout_s: float = PREPARE_TIMEOUT_S,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Written]:
    """While open, all engines are paused, and the caller writes what they map; they resume with it at the end.

    Their caches are reset in the pause, as of `advance`. There is no way back from what was written.

    Args:
        engines: as of `advance`, at least one; all of them map the generation of `target`.

    Raises:
        FleetError: one of them cannot be prepared or paused, or maps another generation: the body of `with` has not
            run, and they go on with what they have. Or an engine or the body failed later. All that answer run, and
            `report` says what each has.
        SettingsError: as `advance`.
    """
    known = _known(engines, None)
    round_ = _Round(known, {target.name: target.generation}, True, prepare_timeout_s, timeout_s, target)
    if not round_.run(until=Step.WRITE):
        report = round_.report()
        report.check()
        raise FleetError(f"No engine is there any more. {report}.", report=report)
    written = Written()
    try:
        yield written
    except BaseException as error:
        round_.end_write(Answer.SILENT)
        round_.run()
        written.report = round_.report()
        if isinstance(error, Exception):
            raise FleetError(
                f"A step ended in the middle ({type(error).__name__}: {error}), so its weights may be partly new. "
                f"{written.report}.",
                remedy="Write all of them in another step, or advance to a generation that was kept.",
                report=written.report,
            ) from error
        raise
    round_.end_write(Answer.DONE)
    round_.run()
    written.report = round_.report()
    written.report.check()


class _Round:
    """One fleet on its way to other weights."""

    def __init__(
        self,
        engines: list[Engine],
        generations: Mapping[str, int],
        clear_caches: bool,
        prepare_timeout_s: float,
        timeout_s: float,
        in_place: InPlace | None = None,
    ) -> None:
        self._engines = engines
        self._in_place = in_place
        self._generations = generations
        self._clear_caches = clear_caches
        self._prepare_timeout_s = prepare_timeout_s
        self._timeout_s = timeout_s
        self._course = Course(len(engines), writes=in_place is not None)
        self._plans: dict[int, list[dict[str, Plan]]] = {}
        self._failures: list[list[str]] = [[] for _ in engines]
        self._paused_at: dict[int, float] = {}
        self._paused_s = [0.0] * len(engines)
        self._prepare_s = 0.0

    def run(self, until: Step | None = None) -> bool:
        """Take all steps, or those before `until`; whether that is the next one.

        Whoever interrupts this is heard when no engine is paused any more.
        """
        interruption: BaseException | None = None
        began = time.monotonic()
        before: Step | None = None
        with ThreadPoolExecutor(len(self._engines), "companion-fleet") as threads:
            while (orders := self._course.orders()) is not None:
                step, numbers = orders
                if step is until:
                    if interruption is None:
                        return True
                    self.end_write(Answer.REFUSED)
                    continue
                answers = dict.fromkeys(numbers, Answer.SILENT)
                try:
                    if step is before:
                        time.sleep(RETRY_S)
                    self._take(step, numbers, answers, threads)
                except BaseException as error:
                    interruption = error
                self._course.told(answers)
                if step is Step.PREPARE:
                    self._prepare_s = time.monotonic() - began
                before = step
        if interruption is not None:
            raise interruption
        return False

    def end_write(self, answer: Answer) -> None:
        """The caller has written in place (DONE), has begun to (SILENT), or will not (REFUSED)."""
        orders = self._course.orders()
        assert orders is not None
        self._course.told(dict.fromkeys(orders[1], answer))

    def _take(self, step: Step, numbers: list[int], answers: dict[int, Answer], threads: ThreadPoolExecutor) -> None:
        """Have these engines take a step; `answers` has what they said, also if somebody interrupts this."""
        if step is Step.PAUSE:
            self._paused_at = dict.fromkeys(numbers, time.monotonic())
        remote = [number for number in numbers if not self._engines[number].is_local]
        waiting: dict[int, Future[Answer]] = {number: threads.submit(self._tell, step, number) for number in remote}
        for number in numbers:
            if number not in waiting:
                answers[number] = self._tell(step, number)
        for number, answer in waiting.items():
            answers[number] = answer.result()
        if step is Step.PREPARE:
            self._compare(answers)

    def _tell(self, step: Step, number: int) -> Answer:
        engine = self._engines[number]
        try:
            match step:
                case Step.PREPARE:
                    self._plans[number] = engine.prepare(self._generations, self._prepare_timeout_s)
                case Step.PAUSE:
                    engine.pause(self._timeout_s, clear_caches=self._clear_caches)
                case Step.LABEL:
                    label = self._in_place.label if self._in_place else _version(self._plans[number]) or UNNAMED
                    engine.label(label, self._timeout_s)
                case Step.RESUME:
                    engine.resume(self._timeout_s)
                    self._paused_s[number] = time.monotonic() - self._paused_at[number]
                case Step.SWITCH | Step.BACK | Step.FORGET:
                    engine.tell(step, self._timeout_s)
        except NotDone as failure:
            failures = self._failures[number]
            if not (failures and failures[-1].endswith(str(failure))):  # one reason is said once
                failures.append(f"it could not {step.value}: {failure}")
            return failure.answer
        return Answer.DONE

    def _compare(self, answers: dict[int, Answer]) -> None:
        """Refuse in the name of an engine whose weights would be others than those of the first one.

        A trainer may have written the next ones between the answers of two engines.
        """
        if self._in_place is not None:
            self._check_mapped(self._in_place, answers)
        ready = [number for number, answer in answers.items() if answer is Answer.DONE]
        for number in ready:
            for plans in self._plans[number]:
                for title, plan in plans.items():
                    first = self._plans[ready[0]][0].get(title, plan)
                    if plan.version != first.version and answers[number] is Answer.DONE:
                        answers[number] = Answer.REFUSED
                        self._failures[number].append(
                            f"it would have {plan.version or 'the checkpoint'} of {title}, and "
                            f"{self._engines[ready[0]].name} {first.version or 'the checkpoint'}"
                        )

    def _check_mapped(self, target: InPlace, answers: dict[int, Answer]) -> None:
        """Refuse in the name of an engine that does not map what is about to be written."""
        for number in [number for number, answer in answers.items() if answer is Answer.DONE]:
            mapped = {plans[target.title].before for plans in self._plans[number] if target.title in plans}
            if mapped != {target.generation}:
                shown = f"generation {', '.join(map(str, sorted(mapped)))}" if mapped else "nothing"
                answers[number] = Answer.REFUSED
                self._failures[number].append(
                    f"it maps {shown} of {target.title}, and not {target.generation}, which is written; advance it"
                )

    def report(self) -> FleetReport:
        """What each engine has."""
        reports = tuple(map(self._report_of, range(len(self._engines)), self._course.members))
        version = _version(self._plans[min(self._plans)]) if self._plans else None
        return FleetReport(reports, version, self._prepare_s)

    def _report_of(self, number: int, member: Member) -> EngineReport:
        name, failures = self._engines[number].name, tuple(self._failures[number])
        if member.is_gone:
            return EngineReport(name, "gone", failures=failures, may_be_paused=member.may_be_paused)
        plans = self._plans.get(number)
        generations: dict[str, int] = {}
        version = None
        if plans is not None and member.weights is not Weights.UNKNOWN:
            is_new = member.weights is Weights.NEW
            generations = {title: plan.generation if is_new else plan.before for title, plan in plans[0].items()}
            version = _version(plans) if is_new else _version_before(plans)
        paused_s = self._paused_s[number]
        return EngineReport(name, member.weights.value, generations, version, failures, member.may_be_paused, paused_s)


def _target(plans: list[dict[str, Plan]]) -> Plan:
    """Of the first rank. A draft has a version of its own; outputs are the target's."""
    return min(plans[0].items(), key=lambda each: not each[0].endswith("(target)"))[1]


def _version(plans: list[dict[str, Plan]]) -> str:
    return _target(plans).version


def _version_before(plans: list[dict[str, Plan]]) -> str:
    return _target(plans).version_before
