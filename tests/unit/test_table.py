"""The tables of transitions: what they say, what they refuse, and that the package that has them is pure."""

from __future__ import annotations

import ast
import itertools
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import BY_CODE, BadRequestError
from vllm_companion_plugin.holder import registry
from vllm_companion_plugin.holder.registry import table
from vllm_companion_plugin.holder.registry.table import (
    GENERATION,
    LEASE,
    GenerationEvent,
    GenerationState,
    IllegalTransitionError,
    LeaseEvent,
    Table,
)

TABLES = [
    pytest.param(GENERATION, GenerationState, GenerationEvent, id="generation"),
    pytest.param(LEASE, LeaseState, LeaseEvent, id="lease"),
]
ALL = [
    *((GENERATION, state, event) for state, event in itertools.product([None, *GenerationState], GenerationEvent)),
    *((LEASE, state, event) for state, event in itertools.product([None, *LeaseState], LeaseEvent)),
]


class TestTable:
    """Both tables of transitions."""

    @pytest.mark.parametrize(
        ("which", "state", "event"), ALL, ids=lambda x: x.value if isinstance(x, Enum) else getattr(x, "name", "none")
    )
    def test_allows_what_it_contains(self, which: Table[Any, Any], state: Enum | None, event: Enum) -> None:
        """Anything else is a bad request, whose text begins with who moved."""
        if event in which.rows[state]:
            assert which.after(state, event, "It") is which.rows[state][event]
        else:
            with pytest.raises(IllegalTransitionError, match=f"It is {state.value if state else 'ended'}, not "):
                which.after(state, event, "It")

    @pytest.mark.parametrize(("which", "states", "events"), TABLES)
    def test_is_complete(self, which: Table[Any, Any], states: type[Enum], events: type[Enum]) -> None:
        """Every state can be reached and left for good, every event happens."""
        assert set(which.rows) == {None, *states}
        assert {event for row in which.rows.values() for event in row} == set(events)
        reached = {None}
        for _ in states:
            reached |= {after for state in reached for after in which.rows[state].values()}
        assert reached == {None, *states}
        assert [state for state in states if None not in which.rows[state].values()] == []

    def test_refuses_in_the_words_of_the_protocol(self) -> None:
        """A client is told the code of a bad request: no new code comes with the error's class."""
        assert IllegalTransitionError.code == "bad_request"
        assert BY_CODE["bad_request"] is BadRequestError

    def test_shows_each_arrow_once(self) -> None:
        """Events between the same two states share one."""
        lines = GENERATION.to_mermaid().splitlines()
        assert lines[:2] == ["```mermaid", "stateDiagram-v2"]
        assert "    ready --> retired: unload, expire, make room, lose" in lines
        pairs = [line.partition(":")[0] for line in lines if "-->" in line]
        assert len(pairs) == len(set(pairs))

    def test_dismisses_only_what_ends(self) -> None:
        """After these events no state follows in which somebody could hand back."""
        for event in table.DISMISSING:
            assert {row[event] for row in GENERATION.rows.values() if event in row} <= {None, GenerationState.RETIRED}


@pytest.mark.parametrize("path", sorted(Path(registry.__path__[0]).glob("*.py")), ids=lambda path: path.name)
def test_the_registry_has_no_clock_no_socket_and_no_thread(path: Path) -> None:
    """Its docstring says so. Of this project it imports values and errors."""
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    pure = {"__future__", "bisect", "collections", "contextlib", "dataclasses", "enum", "itertools", "math", "typing"}
    ours = tuple(f"vllm_companion_plugin.{part}." for part in ("core", "errors", "holder.registry"))
    assert [name for name in imported if name.split(".")[0] not in pure and not name.startswith(ours)] == []
