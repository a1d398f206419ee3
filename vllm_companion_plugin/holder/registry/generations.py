"""Which generation of a key was the latest, and which ones may be handed back. Bounded, oldest forgotten first."""

from __future__ import annotations

from vllm_companion_plugin.holder.registry import limits


class Generations:
    """Numbers of generations by key id. They outlive their entries, so that no number is given twice."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}
        self._dropped: dict[str, int] = {}

    def latest(self, key_id: str) -> int:
        """The highest number that is known; 0: none."""
        return self._latest.get(key_id, 0)

    def note(self, key_id: str, generation: int) -> None:
        """This generation exists, or existed."""
        _raise(self._latest, key_id, generation)

    def drop(self, key_id: str, generation: int) -> None:
        """This generation, and what came before it, was dropped on purpose."""
        _raise(self._dropped, key_id, max(generation, self.latest(key_id)))

    def may_return(self, key_id: str, generation: int) -> bool:
        """Whether a client may hand this generation back: it is the latest one and was not dropped."""
        return generation >= self.latest(key_id) and generation > self._dropped.get(key_id, 0)


def _raise(numbers: dict[str, int], key_id: str, number: int) -> None:
    numbers[key_id] = max(number, numbers.pop(key_id, 0))
    while len(numbers) > limits.MAX_REMEMBERED:
        del numbers[next(iter(numbers))]
