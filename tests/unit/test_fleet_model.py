"""Engines that fail at any step, in any way, against the rules of `fleet/course.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from vllm_companion_plugin.fleet.course import RESUME_TRIES, Answer, Course, Step, Weights

MOST_ROUNDS = 6 + RESUME_TRIES


@dataclass(frozen=True)
class Fault:
    """How an engine fails at a step.

    Attributes:
        answer: what its caller hears.
        is_done: whether it did what it was told nevertheless; for one that refuses to switch: whether a rank did.
        is_end: of one that seems to be gone: whether it is, and not merely out of reach.
    """

    answer: Answer
    is_done: bool
    is_end: bool


@dataclass
class Engine:
    """An engine as it is, and not as its caller knows it."""

    faults: dict[Step, list[Fault]]
    has_new: bool = False
    is_torn: bool = False
    is_prepared: bool = False
    is_paused: bool = False
    is_dead: bool = False
    was_out_of_reach: bool = False
    told: list[Step] = field(default_factory=list)

    def carry_out(self, step: Step) -> Answer:
        if self.is_dead:
            assert step is Step.RESUME, "nobody asks more of one that is gone"
            return Answer.GONE
        self.told.append(step)
        faults = self.faults.get(step)
        fault = faults.pop(0) if faults else None
        if fault is None or fault.is_done:
            self._do(step, torn=fault is not None and fault.answer is Answer.REFUSED)
        if fault is None:
            return Answer.DONE
        self.is_dead = fault.answer is Answer.GONE and fault.is_end
        self.was_out_of_reach |= fault.answer is Answer.GONE
        return fault.answer

    def _do(self, step: Step, *, torn: bool) -> None:
        match step:
            case Step.PREPARE:
                self.is_prepared = True
            case Step.PAUSE:
                self.is_paused = True
            case Step.SWITCH:
                assert self.is_paused
                assert self.is_prepared
                self.has_new, self.is_torn = not torn, torn
            case Step.BACK:
                self.has_new = self.is_torn = False
            case Step.RESUME:
                self.is_paused = False
            case Step.FORGET:
                self.is_prepared = False
            case Step.LABEL:
                assert self.is_paused
                assert self.has_new


faults = st.builds(Fault, st.sampled_from([Answer.REFUSED, Answer.GONE, Answer.SILENT]), st.booleans(), st.booleans())
engines = st.builds(
    Engine, st.dictionaries(st.sampled_from(Step), st.lists(faults, min_size=1, max_size=RESUME_TRIES), max_size=3)
)


@given(st.lists(engines, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_whatever_fails_the_rest_has_one_version_and_answers_requests(fleet: list[Engine]) -> None:
    course = Course(len(fleet))
    rounds = 0
    while (orders := course.orders()) is not None:
        step, numbers = orders
        if step is Step.SWITCH:
            reached = [fleet[number] for number in numbers]
            assert all(engine.is_paused for engine in reached), "nobody answers with both"
        course.told({number: fleet[number].carry_out(step) for number in numbers})
        rounds += 1
        assert rounds <= MOST_ROUNDS

    living = [(engine, member) for engine, member in zip(fleet, course.members, strict=True) if not engine.is_dead]
    assert all(member.is_gone for engine, member in zip(fleet, course.members, strict=True) if engine.is_dead)
    for engine, member in living:
        known = {Weights.OLD: (False, False), Weights.NEW: (True, False)}
        if member.weights is not Weights.UNKNOWN:
            assert (engine.has_new, engine.is_torn) == known[member.weights], "what is said of its weights is true"
        assert member.may_be_paused or not engine.is_paused, "nobody is left paused unknown to the caller"
        assert not member.may_be_paused or engine.told.count(Step.RESUME) == RESUME_TRIES
        assert member.is_gone or engine.told[-1] is Step.FORGET, "no memory is kept"
    reached = [(engine, member) for engine, member in living if not engine.was_out_of_reach]
    sure = {member.weights for _, member in reached} - {Weights.UNKNOWN}
    event(f"{[w.value for w in sorted(sure, key=str)]} after {rounds} rounds")
    if any(Step.BACK in engine.told for engine in fleet):
        never_back = [engine for engine, member in reached if member.weights is Weights.NEW]
        assert not never_back, "all that answered are back"
    assert len(sure) <= 1, "those that are known have one version"
    if not any(Step.SWITCH in engine.told for engine in fleet):
        assert not any(engine.has_new or engine.is_torn for engine in fleet)


writes = st.sampled_from([Answer.DONE, Answer.SILENT, Answer.REFUSED])


@given(st.lists(engines, min_size=1, max_size=4), writes)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_what_is_written_in_place_is_seen_by_engines_that_are_paused_and_by_no_others(
    fleet: list[Engine], write: Answer
) -> None:
    """The caller's step is one for all. Who is said to have old weights was not written to; nobody is left paused."""
    course = Course(len(fleet), writes=True)
    is_written = False
    while (orders := course.orders()) is not None:
        step, numbers = orders
        if step is not Step.WRITE:
            course.told({number: fleet[number].carry_out(step) for number in numbers})
            continue
        assert all(engine.is_paused for engine in fleet if not engine.is_dead), "nobody reads what is written"
        assert numbers == [number for number, engine in enumerate(fleet) if not engine.is_dead]
        is_written = write is not Answer.REFUSED
        course.told(dict.fromkeys(numbers, write))

    for engine, member in zip(fleet, course.members, strict=True):
        if engine.is_dead:
            continue
        if member.weights is Weights.NEW:
            assert (engine.has_new, engine.is_torn, write) == (True, False, Answer.DONE)
        assert (member.weights is Weights.OLD) == (not is_written)
        assert Step.BACK not in engine.told, "there is nothing to go back to"
        assert member.may_be_paused or not engine.is_paused, "nobody is left paused unknown to the caller"
        assert member.is_gone or engine.told[-1] is Step.FORGET, "no memory is kept"


def steps_of(
    count: int, failing: dict[tuple[int, Step], Answer], *, writing: bool = False
) -> tuple[list[Step], Course]:
    """The steps that engines take of which some fail, each time."""
    course, steps = Course(count, writes=writing), []
    while (orders := course.orders()) is not None:
        step, numbers = orders
        steps.append(step)
        course.told({number: failing.get((number, step), Answer.DONE) for number in numbers})
    return steps, course


class TestCourse:
    """What happens in the cases that people ask for."""

    def test_smooth(self) -> None:
        """Nothing fails."""
        steps, course = steps_of(2, {})
        assert steps == [Step.PREPARE, Step.PAUSE, Step.SWITCH, Step.LABEL, Step.RESUME, Step.FORGET]
        assert all(member.weights is Weights.NEW for member in course.members)

    def test_unprepared(self) -> None:
        """One cannot be prepared, and nobody is paused."""
        for answer in (Answer.REFUSED, Answer.SILENT, Answer.GONE):
            steps, course = steps_of(2, {(1, Step.PREPARE): answer})
            assert steps == [Step.PREPARE, Step.FORGET]
            assert all(member.weights is Weights.OLD for member in course.members)

    def test_killed(self) -> None:
        """One dies before the switch: the others have the new weights."""
        for step in (Step.PAUSE, Step.SWITCH):
            steps, course = steps_of(3, {(1, step): Answer.GONE, (1, Step.RESUME): Answer.GONE})
            assert Step.BACK not in steps
            assert [member.weights for member in course.members if not member.is_gone] == [Weights.NEW] * 2

    def test_torn(self) -> None:
        """One lives and cannot switch: all go back."""
        for answer in (Answer.REFUSED, Answer.SILENT):
            steps, course = steps_of(2, {(1, Step.SWITCH): answer})
            assert steps[2:] == [Step.SWITCH, Step.BACK, Step.RESUME, Step.FORGET]
            assert all(member.weights is Weights.OLD for member in course.members)

    def test_written(self) -> None:
        """In place: the write comes after the pause, and an engine that fails then sends nobody back."""
        steps, course = steps_of(2, {}, writing=True)
        assert steps[:4] == [Step.PREPARE, Step.PAUSE, Step.WRITE, Step.SWITCH]
        steps, course = steps_of(2, {(1, Step.SWITCH): Answer.REFUSED}, writing=True)
        assert steps[3:] == [Step.SWITCH, Step.RESUME, Step.FORGET]
        assert [member.weights for member in course.members] == [Weights.NEW, Weights.UNKNOWN]

    def test_all_gone(self) -> None:
        """There is nobody left to tell anything."""
        failing = {(0, step): Answer.GONE for step in (Step.PAUSE, Step.RESUME)}
        for writing in (False, True):
            steps, course = steps_of(1, failing, writing=writing)
            assert steps == [Step.PREPARE, Step.PAUSE, *[Step.RESUME] * RESUME_TRIES]
            assert course.members[0].is_gone

    def test_out_of_reach(self) -> None:
        """One that cannot be reached in the pause, and lives, is told to resume; what it has is said, if known."""
        for step, weights in ((Step.PAUSE, Weights.OLD), (Step.SWITCH, Weights.UNKNOWN), (Step.LABEL, Weights.NEW)):
            steps, course = steps_of(2, {(1, step): Answer.GONE})
            assert steps[-2:] == [Step.RESUME, Step.FORGET]
            assert [member.weights for member in course.members] == [Weights.NEW, weights]
            assert not any(member.is_gone or member.may_be_paused for member in course.members)
