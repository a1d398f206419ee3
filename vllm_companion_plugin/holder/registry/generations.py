"""Which generation of a key was the latest, and which ones may be handed back. Bounded, oldest forgotten first."""

from __future__ import annotations

from vllm_companion_plugin.holder.registry import limits


class Generations:
    """Numbers of generations by key id. They outlive their entries, so that no number is given twice."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self._rolled_back: dict[str, int] = {}

    def latest(self, key_id: str) -> int:
        """The highest number that is known; 0: none."""
        return self._latest.get(key_id, 0)

    def note(self, key_id: str, generation: int) -> None:
        """This generation exists, or existed."""
        _raise(self._latest, key_id, generation)

    def drop(self, key_id: str, generation: int) -> None:
        """This generation, and what came before it, was dropped on purpose."""
        _raise(self._dropped, key_id, max(generation, self.latest(key_id)))

    def roll_back(self, key_id: str, generation: int) -> None:
        """This generation was current in the companion before, though it was not the latest one; 0: it is no more."""
        if generation:
            self._rolled_back[key_id] = generation
        else:
            self._rolled_back.pop(key_id, None)

    def rolled_back_to(self, key_id: str) -> int:
        """As `roll_back` said; 0: the latest one was current."""
        return self._rolled_back.get(key_id, 0)

    def may_return(self, key_id: str, generation: int) -> bool:
        """Whether a client may hand this generation back: it is the latest one, or was current, and was not dropped."""
        wanted = generation >= self.latest(key_id) or generation == self.rolled_back_to(key_id)
        return wanted and generation > self._dropped.get(key_id, 0)


def _raise(numbers: dict[str, int], key_id: str, number: int) -> None:
    numbers[key_id] = max(number, numbers.pop(key_id, 0))
    while len(numbers) > limits.MAX_REMEMBERED:
        del numbers[next(iter(numbers))]
