"""The states of a generation and of a lease, and every step between them, as data.

Theory of operation
-------------------
A *generation* is one set of published or coming bytes of an entry. One client loads it, many map it, and one day it is
dropped. While all its clients sleep it may be parked in host memory, or be dropped until one of them wakes; whoever
wakes first brings it back, or loads it again. A *lease* is one client's open Attach stream: its claim on one entry,
from its first moment to its last. A client that wakes while the entry is on the device goes on with its lease; else it
attaches by a new one, and ends the one that slept.

Each of the two tables maps a state and an event to the next state. What a table does not contain cannot happen:
`Table.after` raises `IllegalTransitionError`, and `steps.py` asks the table before it changes anything. None stands for
"does not exist": before the first event, and after the last one.

The tables say what may follow what. Who is elected, what expires and who owns the companion is decided elsewhere
(`state.py`, `room.py`, `lifetime.py`); the outcome of every decision is an event here. Observers are told each step
(`moves.py`), so counting and logging need no place of their own in the rules.

An entry has one current generation, whose state is the entry's. While that is ready an entry may have others, which are
ready, too: a client wrote the next one, or went back to one of before. The table knows neither keys nor leases nor
arenas.

`python -m vllm_companion_plugin.holder.registry.table` prints the diagrams of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import BadRequestError

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class IllegalTransitionError(BadRequestError):
    """An event came in a state that has no such event. Nothing has changed."""


class GenerationState(Enum):
    """Life of a generation. Clients are shown an expected one as loading."""

    EXPECTED = "expected"
    LOADING = "loading"
    READY = "ready"
    PARKED = "parked"
    DROPPED = "dropped"
    RETIRED = "retired"


class GenerationEvent(Enum):
    """What happens to a generation."""

    EXPECT = "expect"
    """A companion that has died held it, and processes still map it."""
    ASK = "ask"
    """A client that may load, or bring back, asks for an entry that is not on the device."""
    REMEMBER = "remember"
    """A client sleeps on it that a companion which has died knew."""
    PUBLISH = "publish"
    BRING_BACK = "bring back"
    """A client has copied it from host memory to the device."""
    HAND_BACK = "hand back"
    """A client that maps it publishes it again, under its old number."""
    GIVE_UP = "give up"
    """Nobody has handed it back in time."""
    ABANDON = "abandon"
    """The loader's lease has ended, and no other client may load."""
    DECLINE = "decline"
    """The loader keeps its model to itself."""
    COMMIT = "commit"
    """A client has written it, as the next one of its entry."""
    FORGET = "forget"
    """Another one is current, and nobody maps this one and no rule keeps it, or its memory is lost."""
    PARK = "park"
    """Its last client has fallen asleep, or nobody brings it back: it stays in host memory alone."""
    DROP = "drop"
    """Its last client has fallen asleep, or nobody loads it again: nothing of it stays but its name."""
    UNLOAD = "unload"
    EXPIRE = "expire"
    """Nobody has used it for the linger time."""
    MAKE_ROOM = "make room"
    """Nobody uses it, and a client needs its memory."""
    LOSE = "lose"
    """The process that its memory depends on has ended."""
    LEAVE = "leave"
    """Its last user's lease has ended."""
    CLOSE = "close"
    """The companion ends."""
    REPLACE = "replace"
    """The companion ends, and another one takes over."""


DISMISSING = frozenset(
    {
        GenerationEvent.UNLOAD,
        GenerationEvent.EXPIRE,
        GenerationEvent.MAKE_ROOM,
        GenerationEvent.CLOSE,
    }
)
"""After these events no client may hand the generation back: somebody or some rule has dropped it on purpose."""


class LeaseEvent(Enum):
    """What happens to a lease."""

    ATTACH = "attach"
    ELECT = "elect"
    """The client may load, or hand back what it maps."""
    YIELD = "yield"
    """A client that maps the entry already goes first."""
    ANNOUNCE = "announce"
    """The client says how many descriptors it will deposit."""
    DEPOSIT = "deposit"
    PROGRESS = "progress"
    COMMIT = "commit"
    MAP = "map"
    """The entry is ready: another client has published it."""
    COPY = "copy"
    """The client will fall asleep as the last one, and copies the entry to host memory before."""
    STAY_AWAKE = "stay awake"
    """The client could not leave a copy."""
    STAGE = "stage"
    """The client writes the next generation, and maps the one of before."""
    COMMIT_STAGED = "commit staged"
    ABORT = "abort"
    SLEEP = "sleep"
    """The client maps nothing until it wakes."""
    WAKE = "wake"
    """The entry is on the device, and the client maps it again."""
    RETIRE = "retire"
    """The entry was dropped; the client keeps mapping it."""
    DECLINE = "decline"
    END = "end"
    """The client has gone, or is done."""
    OVERDUE = "overdue"
    """The client was elected to hand back, and has not done so in time."""
    FAIL = "fail"
    """The client is told an error."""
    RELEASE = "release"
    """The entry has gone, and the client does not use it."""


@dataclass(frozen=True)
class Table(Generic[S, E]):
    """One table of transitions. `rows` maps a state, and None, to the next state for each event that it allows."""

    name: str
    rows: Mapping[S | None, Mapping[E, S | None]]

    def after(self, before: S | None, event: E, what: object) -> S | None:
        """The state that follows.

        Args:
            what: the object that moves; its text begins the error's.

        Raises:
            IllegalTransitionError: `before` has no such event.
        """
        row = self.rows[before]
        if event not in row:
            legal = " or ".join(state.value if state else "new" for state, row in self.rows.items() if event in row)
            raise IllegalTransitionError(f"{what} is {before.value if before else 'ended'}, not {legal}.")
        return row[event]

    def to_mermaid(self) -> str:
        """A state diagram. Events between the same two states share an arrow; arrows in the order of the rows."""
        arrows: dict[tuple[S | None, S | None], list[str]] = {}
        for before, row in self.rows.items():
            for event, after in row.items():
                arrows.setdefault((before, after), []).append(event.value)
        lines = [
            f"    {_node(before)} --> {_node(after)}: {', '.join(events)}" for (before, after), events in arrows.items()
        ]
        return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"]) + "\n"


def _node(state: Enum | None) -> str:
    return state.value if state else "[*]"


def _generation() -> Table[GenerationState, GenerationEvent]:
    s, e = GenerationState, GenerationEvent
    ends: dict[GenerationEvent, GenerationState | None] = {e.CLOSE: None, e.REPLACE: None}
    publications: dict[GenerationEvent, GenerationState | None] = {e.PUBLISH: s.READY, e.HAND_BACK: s.READY}
    return Table(
        "generation",
        {
            None: {e.EXPECT: s.EXPECTED, e.ASK: s.LOADING, e.REMEMBER: s.DROPPED, e.COMMIT: s.READY},
            s.EXPECTED: {**publications, e.GIVE_UP: s.LOADING, e.DECLINE: None, e.UNLOAD: None, **ends},
            s.LOADING: {
                **publications,
                e.BRING_BACK: s.READY,
                e.PARK: s.PARKED,
                e.DROP: s.DROPPED,
                e.ABANDON: None,
                e.DECLINE: None,
                e.UNLOAD: None,
                **ends,
            },
            s.READY: {
                e.FORGET: None,
                e.PARK: s.PARKED,
                e.DROP: s.DROPPED,
                e.UNLOAD: s.RETIRED,
                e.EXPIRE: s.RETIRED,
                e.MAKE_ROOM: s.RETIRED,
                e.LOSE: s.RETIRED,
                **ends,
            },
            s.PARKED: {e.ASK: s.LOADING, e.UNLOAD: s.RETIRED, e.EXPIRE: s.RETIRED, **ends},
            s.DROPPED: {e.ASK: s.LOADING, e.UNLOAD: None, e.LEAVE: None, **ends},
            s.RETIRED: {e.FORGET: None, e.LEAVE: None, **ends},
        },
    )


def _lease() -> Table[LeaseState, LeaseEvent]:
    s, e = LeaseState, LeaseEvent
    ends: dict[LeaseEvent, LeaseState | None] = {e.END: None, e.FAIL: None}
    stays: dict[LeaseEvent, LeaseState | None] = dict.fromkeys((e.ANNOUNCE, e.DEPOSIT, e.PROGRESS), s.LOADING)
    return Table(
        "lease",
        {
            None: {e.ATTACH: s.WAITING},
            s.WAITING: {e.ELECT: s.LOADING, e.MAP: s.ATTACHED, e.SLEEP: s.ASLEEP, **ends},
            s.LOADING: {
                **stays,
                e.YIELD: s.WAITING,
                e.COMMIT: s.ATTACHED,
                e.DECLINE: None,
                e.OVERDUE: None,
                **ends,
            },
            s.ATTACHED: {
                e.COPY: s.PARKING,
                e.STAGE: s.WRITING,
                e.SLEEP: s.ASLEEP,
                e.RETIRE: s.ATTACHED,
                e.RELEASE: None,
                **ends,
            },
            s.PARKING: {
                e.ANNOUNCE: s.PARKING,
                e.DEPOSIT: s.PARKING,
                e.STAY_AWAKE: s.ATTACHED,
                e.SLEEP: s.ASLEEP,
                e.RETIRE: s.ATTACHED,
                **ends,
            },
            s.WRITING: {
                e.ANNOUNCE: s.WRITING,
                e.DEPOSIT: s.WRITING,
                e.COMMIT_STAGED: s.ATTACHED,
                e.ABORT: s.ATTACHED,
                e.RETIRE: s.ATTACHED,
                **ends,
            },
            s.ASLEEP: {e.WAKE: s.ATTACHED, e.RETIRE: s.ASLEEP, **ends},
        },
    )


GENERATION = _generation()
LEASE = _lease()


def to_markdown() -> str:
    """Both diagrams, as docs/architecture.md contains them."""
    return f"A generation of an entry:\n\n{GENERATION.to_mermaid()}\nA lease:\n\n{LEASE.to_mermaid()}"


if __name__ == "__main__":
    print(to_markdown(), end="")
