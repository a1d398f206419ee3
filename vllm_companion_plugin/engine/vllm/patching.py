"""How the plugin changes what is not its own: one change is a `Patch`, which knows its target, and how it is undone.

Every process of vLLM imports this, so it imports neither vLLM nor PyTorch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any


class How(Enum):
    """In which way something is changed."""

    REPLACED = "replaced"
    """The attribute is another object, by `Patch.apply` or `Patch.on`."""
    SET = "set"
    """A value is changed, or an item of a table."""
    ADDED = "added"
    """The attribute is new there."""
    HOOKED = "hooked"
    """Its owner has an interface for this, which is used."""


class Lifetime(Enum):
    """When something is changed, and whether it is as it was before the process ends."""

    IMPORT = "from its import on", True
    LOAD = "from the first model that is loaded for others on", True
    EXECUTOR = "from the import of vLLM's executor of several processes on", True
    LOADERS = "from the import of vLLM's loaders on", True
    MAPPED = "from the first model on that this process maps or published", True
    ONCE = "when a model was attached, or could not be", True
    WAITING = "until the module that is waited for is imported", False
    CONFIGURING = "while vLLM makes its configuration", False
    DECIDING = "while vLLM decides by the name of the load format", False
    BUILDING = "while a model is built that will be attached", False
    LOADING = "while a model is loaded for others", False
    PROCESSING = "while a model is post-processed", False
    WORKING = "while a model is published or attached", False
    UPDATING = "while a headless process loads new weights for others", False
    REHEARSING = "while a headless process rehearses a load", False
    STARTING = "while the first engine of a process starts", False
    DECIDED = "from the first model on that this process decides about", True

    def __init__(self, text: str, is_permanent: bool) -> None:
        self.text = text
        self.is_permanent = is_permanent


@dataclass(frozen=True)
class Patch:
    """One change of something that is not ours.

    Attributes:
        where: "module:attribute" or "module:Class.attribute" that is changed.
        by: our module that changes it.
        reason: why.
        link: the file and function that make it necessary, from the root of the owner's sources.
        undo: how it is undone.
        each: it is changed on single objects of the class, not on the class.
        before: the first version of vLLM that does not need it; empty if all do.
        device_type: of the engines that have it; empty: all.
    """

    where: str
    by: str
    how: How
    lifetime: Lifetime
    reason: str
    link: str
    undo: str
    each: bool = False
    before: str = ""
    device_type: str = ""

    @property
    def target(self) -> str:
        """The dotted name of what is changed."""
        return self.where.replace(":", ".")

    @property
    def attribute(self) -> str:
        return self.where.replace(":", ".").rpartition(".")[2]

    def find_owner(self) -> Any:
        """The module or class that has the attribute. It has been imported: nothing is imported here.

        Raises:
            KeyError: it has not.
        """
        module, _, path = self.where.partition(":")
        class_name = path.rpartition(".")[0]
        return getattr(sys.modules[module], class_name) if class_name else sys.modules[module]

    def apply(self, wrap: Callable[[Any], Any]) -> Applied:
        """Replace the target by `wrap(target)` in this process. Where that was done already, nothing happens."""
        if self not in _applied:
            _applied[self] = Applied(self.find_owner(), self.attribute, wrap)
        return _applied[self]

    def add(self, value: Any) -> None:
        """Set an attribute that the owner did not have, in this process. Idempotent."""
        setattr(self.find_owner(), self.attribute, value)

    @contextmanager
    def on(self, owner: Any, wrap: Callable[[Any], Any]) -> Iterator[None]:
        """While open, the attribute of `owner` is `wrap(attribute)`. May be nested.

        Raises:
            TypeError: this is not the row of such an owner.
        """
        applied = self.on_for_good(owner, wrap)
        try:
            yield
        finally:
            applied.undo()

    def on_for_good(self, owner: Any, wrap: Callable[[Any], Any]) -> Applied:
        """From now on the attribute of `owner` is `wrap(attribute)`. Raises as `on`."""
        expected = self.find_owner()
        if not (isinstance(owner, expected) if self.each else owner is expected):
            raise TypeError(f"{owner!r} has another {self.attribute} than {self.target}.")
        return Applied(owner, self.attribute, wrap)


class Applied:
    """An attribute that was replaced, and what was there."""

    def __init__(self, owner: Any, attribute: str, wrap: Callable[[Any], Any]) -> None:
        self._owner, self._attribute = owner, attribute
        # As it is stored, not as it is bound; nothing if the owner inherits it.
        self._before = {name: value for name, value in vars(owner).items() if name == attribute}
        self._once = threading.Lock()
        self._put(wrap(getattr(owner, attribute)))

    def undo(self) -> None:
        """Put back what was there. Idempotent, also if several threads call it."""
        if not self._once.acquire(blocking=False):
            return
        if self._before:
            self._put(self._before[self._attribute])
        elif isinstance(self._owner, (type, ModuleType)):
            delattr(self._owner, self._attribute)
        else:
            object.__delattr__(self._owner, self._attribute)

    def _put(self, value: Any) -> None:
        if isinstance(self._owner, (type, ModuleType)):
            setattr(self._owner, self._attribute, value)
        else:  # whatever its class makes of an assignment
            object.__setattr__(self._owner, self._attribute, value)


_applied: dict[Patch, Applied] = {}
