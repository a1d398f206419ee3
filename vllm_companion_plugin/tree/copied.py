"""Of a model that vLLM processes when it loads it: the parts that it only copies.

Whoever has the checkpoint's tensors of such a part can put them where they belong, without vLLM.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vllm_companion_plugin.core.module_tree import Manifest, ModuleInfo, TensorInfo
from vllm_companion_plugin.core.placements import Source, is_dense, lies_whole
from vllm_companion_plugin.memory.tensors.views import dtype_of

Range = tuple[int, int]
"""First byte in an arena, and the one after the last."""


@dataclass(frozen=True)
class Copied:
    """What need not go through vLLM.

    Attributes:
        places: where each of these tensors of the checkpoint lies, whole and contiguous, by its name.
        modules: paths of the modules that have nothing from the checkpoint but these.
    """

    places: Mapping[str, Range] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()


NOTHING = Copied()


def copied(manifest: Manifest, sources: Mapping[str, Source]) -> Copied:
    """The modules of which loading only copied whole tensors, as the publisher observed, and these tensors.

    vLLM loads and processes a module as a whole, so all tensors of a module are among them, or none is. If nothing else
    is in the checkpoint, nothing is: then vLLM was asked for.

    Args:
        sources: of the manifest.
    """
    places = {name: _place(source) for name, source in sources.items() if lies_whole(source)}
    places = _apart(places)
    if all(source.copies for source in sources.values()):
        return NOTHING
    while True:
        covered = _joined(places.values())
        ours: list[ModuleInfo] = []
        others: list[ModuleInfo] = []
        for module in manifest.modules:
            (ours if _is_covered(module, manifest, covered) else others).append(module)
        inside, outside = _where(ours, manifest), _where(others, manifest)
        kept = {name: place for name, place in places.items() if _holds(inside, place) and not _meets(place, outside)}
        if len(kept) == len(places):
            return Copied(kept, frozenset(module.path for module in ours)) if kept else NOTHING
        places = kept


def _place(source: Source) -> Range:
    start = source.copies[0].offset_bytes
    return start, start + math.prod(source.shape) * dtype_of(source.dtype).itemsize


def _apart(places: dict[str, Range]) -> dict[str, Range]:
    """Those that share no byte with another one: of these, the one that was copied last would count."""
    inner = sorted((place, name) for name, place in places.items() if place[0] < place[1])
    shared: set[str] = set()
    furthest, whose = 0, ""
    for (start, stop), name in inner:
        if start < furthest:
            shared |= {name, whose}
        if stop > furthest:
            furthest, whose = stop, name
    return {name: place for name, place in places.items() if name not in shared}


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in order, each once, in as few ranges as there can be."""
    found: list[Range] = []
    for start, stop in sorted(each for each in ranges if each[0] < each[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def _is_covered(module: ModuleInfo, manifest: Manifest, covered: list[Range]) -> bool:
    """Whether all that loading left in a module lies in `covered`, and it has something there."""
    spans = [*_spans(module, manifest)]
    return bool(spans) and all(span is not None and _holds(covered, span) for span in spans)


def _holds(joined: list[Range], span: Range) -> bool:
    before = bisect.bisect_right(joined, span[0], key=lambda each: each[0])
    return before > 0 and span[1] <= joined[before - 1][1]


def _where(modules: Iterable[ModuleInfo], manifest: Manifest) -> list[Range]:
    return _joined(span for module in modules for span in _spans(module, manifest) if span is not None)


def _spans(module: ModuleInfo, manifest: Manifest) -> Iterator[Range | None]:
    """Where the tensors of a module are; None for one that is nowhere as a whole, or that engines have copies of."""
    for slot in module.slots:
        info = manifest.tensors[slot.tensor]
        if not (info.own or info.meta or slot.name in module.observed.untouched):
            yield _span(info, manifest)


def _span(info: TensorInfo, manifest: Manifest) -> Range | None:
    if info.storage < 0 or info.private or not is_dense(info.shape, info.stride):
        return None
    size = dtype_of(info.dtype).itemsize
    start = manifest.storages[info.storage].offset_bytes + info.storage_offset * size
    return start, start + math.prod(info.shape) * size


def _meets(place: Range, joined: list[Range]) -> bool:
    before = bisect.bisect_left(joined, place[1], key=lambda each: each[0])
    return before > 0 and place[0] < joined[before - 1][1]
