"""What is done next with a fleet that switches together, and what is known of its engines. No clock and no socket.

All engines take each step at the same time, and the next step begins when each has answered or its time is over:

    prepare -> pause -> switch -> label -> resume -> forget

With weights that the caller writes in place, he does so after the pause, and engines switch to the same generation, by
renewing what they keep of it. Nobody can go back then:

    prepare -> pause -> write -> switch -> label -> resume -> forget

- If one cannot be prepared nobody is paused: all forget.
- An engine that is gone leaves the fleet at any step, and the others go on; but then nothing is written in place. It
  may be one that merely could not be reached, so if it was told to pause it is told to resume with the others; if it
  answers then, it is there again.
- If one that lives cannot be paused nobody switches: all resume.
- If one that lives has not switched, as far as it says, all that live go back; what was written in place stays.
- Whoever may be paused is told to resume, and told again if it does not answer so.

After the last step an engine that answered has known weights. What one has that was silent, or gone for a while, is
unknown if it was told to switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

RESUME_TRIES = 3
"""How often an engine is told to resume that does not say that it has, also one that seems to be gone."""


class Step(Enum):
    """What an engine is told; WRITE is the caller's own step, whose end is the same for all."""

    PREPARE = "prepare"
    PAUSE = "pause"
    WRITE = "be written to"
    SWITCH = "switch"
    BACK = "go back"
    LABEL = "set its weight version"
    RESUME = "resume"
    FORGET = "forget what was prepared"


class Answer(Enum):
    """What an engine said to a step.

    DONE: it has done it. REFUSED: it lives, and has not. GONE: it does not exist any more, as far as anybody can see.
    SILENT: it said nothing in time, and may have done it, or do it later.
    """

    DONE = "done"
    REFUSED = "refused"
    GONE = "gone"
    SILENT = "silent"


class Weights(Enum):
    """Which weights an engine has: those it had, those that the fleet was to take, or nobody knows."""

    OLD = "old"
    NEW = "new"
    UNKNOWN = "unknown"


@dataclass
class Member:
    """What is known of one engine.

    Attributes:
        is_gone: whether it existed no more when it was last told something.
        may_be_paused: whether it was told to pause, and has not said that it resumed.
    """

    weights: Weights = Weights.OLD
    is_gone: bool = False
    may_be_paused: bool = False


class Course:
    """The steps of `count` engines, which are called by their numbers.

    Args:
        writes: whether the caller writes in place what they map.

    Attributes:
        members: what is known of each, by number.
    """

    def __init__(self, count: int, *, writes: bool = False) -> None:
        self._writes = writes
        self.members = [Member() for _ in range(count)]
        self._step: Step | None = Step.PREPARE
        self._tries = 0

    def orders(self) -> tuple[Step, list[int]] | None:
        """The next step, and the engines that take it now; None: there is nothing left to do."""
        while self._step is not None:
            if numbers := self._takers(self._step):
                return self._step, numbers
            self._step = self._after(self._step, {})
        return None

    def told(self, answers: Mapping[int, Answer]) -> None:
        """What the engines of `orders` answered: each of them, and nobody else."""
        assert self._step is not None
        assert answers.keys() == set(self._takers(self._step))
        for number, answer in answers.items():
            member = self.members[number]
            member.is_gone = answer is Answer.GONE
            _note(member, self._step, answer)
        self._step = self._after(self._step, answers)

    def _takers(self, step: Step) -> list[int]:
        if step is Step.RESUME:
            return [number for number, member in enumerate(self.members) if member.may_be_paused]
        return [number for number, member in enumerate(self.members) if not member.is_gone]

    def _after(self, step: Step, answers: Mapping[int, Answer]) -> Step | None:
        has_failed = any(answer in (Answer.REFUSED, Answer.SILENT) for answer in answers.values())
        match step:
            case Step.PREPARE:
                return Step.FORGET if has_failed or Answer.GONE in answers.values() else Step.PAUSE
            case Step.PAUSE:
                # One that seems gone may live and be out of reach. It would answer with what is half written.
                if has_failed or (self._writes and Answer.GONE in answers.values()):
                    return Step.RESUME
                return Step.WRITE if self._writes else Step.SWITCH
            case Step.WRITE:
                return Step.RESUME if has_failed else Step.SWITCH
            case Step.SWITCH:
                if has_failed:
                    return Step.RESUME if self._writes else Step.BACK
                return Step.LABEL
            case Step.BACK | Step.LABEL:
                return Step.RESUME
            case Step.RESUME:
                self._tries += 1
                again = any(answer is not Answer.DONE for answer in answers.values())
                return Step.RESUME if again and self._tries < RESUME_TRIES else Step.FORGET
            case Step.FORGET:
                return None


def _note(member: Member, step: Step, answer: Answer) -> None:
    done = answer is Answer.DONE
    match step:
        case Step.PAUSE:  # one that refuses may be paused all the same: its caches may not have been reset
            member.may_be_paused = True
        case Step.WRITE:  # until it has switched, what is private to it is of before
            member.weights = Weights.OLD if answer is Answer.REFUSED else Weights.UNKNOWN
        case Step.SWITCH:  # some ranks of one that refuses may have switched
            member.weights = Weights.NEW if done else Weights.UNKNOWN
        case Step.BACK:
            member.weights = Weights.OLD if done else Weights.UNKNOWN
        case Step.RESUME:
            member.may_be_paused = not done
