"""`verify`: prove that a model is the same through the companion as without it.

Three engines, one after the other: one loads normally, one loads and publishes, one attaches. Each
describes its model (every tensor by digest, every Python value that can be reached) and answers the same prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_companion_plugin.cli import look
from vllm_companion_plugin.cli.table import GIB, columns
from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.errors import CompanionUnavailableError, SettingsError
from vllm_companion_plugin.settings import Settings, resolve, to_environment
from vllm_companion_plugin.supervise.children import Signals, Stopped, run_to_end

EQUAL, DIFFERENT, NOT_SHARED = 0, 1, 3
"""Exit status; 2 is a wrong command line."""

SHOWN = 20
"""Differences listed; one reason makes thousands of them."""

UNDECIDED: dict[str, Any] = {
    "what": "alone",
    "role": "target",
    "rank": "",
    "reason": "vLLM did not ask the companion: these flags make it take another load format",
    "size_bytes": 0,
    "seconds": 0.0,
    "ways": {},
}
"""The outcome where there is none."""

BYTES = frozenset(("", "dtype", "shape", "sha256"))
"""What a tensor holds, or "" for all of it. What else is said of a tensor, and Python values, are attributes."""

CLOSE = 0.02
"""How far values may be apart, of the largest, where the bytes are equal: other kernels make other last bits, and a
normal engine differs so much from itself: by who else asks, by atomic additions, by what a compiler chose when it ran
first and what it took from its cache the next time. The last bits of half precision are large."""
CLOSE_FLOAT32 = 1e-3
"""The same of float32: shared weights on CPU are multiplied by another kernel than vLLM's packed ones."""
HEADINGS = ("RANK", "GiB", "TENSORS", "LOADED", "ATTACHED", "IN", "WAYS", "BYTES", "ATTRIBUTES", "ANSWERS")


@dataclass
class Rank:
    """The verdict on one model of one worker: what it serves, or the draft."""

    rank: str
    size_bytes: int = 0
    tensors: int = 0
    loaded: str = ""
    attached: str = ""
    seconds: float = 0.0
    ways: dict[str, int] = field(default_factory=dict)
    byte_differences: list[str] = field(default_factory=list)
    attribute_differences: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """The verdict on a model with these flags."""

    model: str
    flags: list[str]
    versions: dict[str, str]
    ranks: list[Rank]
    answers: str
    same_answers: bool
    seconds: float

    @property
    def status(self) -> int:
        if not self.same_answers or any(rank.byte_differences or rank.attribute_differences for rank in self.ranks):
            return DIFFERENT
        return NOT_SHARED if any(rank.reasons for rank in self.ranks) else EQUAL

    def to_json(self) -> dict[str, Any]:
        verdict = {EQUAL: "equal", DIFFERENT: "different", NOT_SHARED: "not shared"}[self.status]
        return {"verdict": verdict, **vars(self), "ranks": [vars(rank) for rank in self.ranks]}


def main(parsed: argparse.Namespace, rest: list[str]) -> int:
    """Print the verdict; 0 if equal, 1 if different, 3 if the model is not shared.

    Raises:
        CompanionUnavailableError: an engine did not start, without the companion or with it.
    """
    if not rest or rest[0].startswith("-"):
        raise SettingsError("verify: which model? vllm-companion verify MODEL [flags of vLLM]")
    model, flags = rest[0], rest[1:]
    asked = ["--adapter", parsed.adapter] if parsed.adapter else []
    others = shlex.split(parsed.publisher)
    # A place of its own: what other engines hold must not be what is proved.
    directory = tempfile.mkdtemp(prefix="vcv-")
    settings = resolve({"runtime_dir": f"{directory}/r"})
    try:
        with Signals() as signals:
            verdict = verify(model, flags, Path(directory), settings, signals, asked, others)
    except Stopped:
        return 130
    finally:
        look.stop_all(settings)
        shutil.rmtree(directory, ignore_errors=True)
    if parsed.json:
        print(json.dumps(verdict.to_json(), indent=1))
    else:
        print("\n".join(map(printable, text(verdict).split("\n"))))
    return verdict.status


def verify(
    model: str,
    flags: list[str],
    directory: Path,
    settings: Settings,
    signals: Signals,
    asked: list[str],
    others: list[str],
) -> Verdict:
    """Run the three engines and compare them.

    Args:
        asked: flags of `engine.verify`, which say what the engines are asked besides.
        others: flags that the engine which publishes has besides, and the others have not.
    """
    started = time.monotonic()
    reports = []
    for number, (role, what) in enumerate(
        [("reference", "loads normally"), ("companion", "loads and publishes"), ("companion", "attaches")], 1
    ):
        print(f"Engine {number} of 3 {what} ...", file=sys.stderr, flush=True)
        out = directory / f"{number}.json"
        command = [
            sys.executable,
            "-m",
            "vllm_companion_plugin.engine.run.verify",
            role,
            str(out),
            *asked,
            model,
            *flags,
        ]
        command += others if number == 2 else []
        # Standard output is for the verdict alone.
        status = run_to_end(command, {**os.environ, **to_environment(settings)}, signals, stdout=sys.stderr.fileno())
        if status != 0 or not out.exists():
            raise CompanionUnavailableError(
                f"{model}: the engine that {what} ended with status {status}; see its lines above."
            )
        reports.append(json.loads(out.read_text()))
    return judge(model, flags, *reports, seconds=time.monotonic() - started, alike=not others)


def judge(
    model: str,
    flags: list[str],
    reference: dict[str, Any],
    published: dict[str, Any],
    attached: dict[str, Any],
    *,
    seconds: float,
    alike: bool = True,
) -> Verdict:
    """Compare three reports of `engine.verify`. Pure.

    Args:
        alike: the one that published has the flags of the others; otherwise what it became is not compared.
    """
    ranks = []
    replicas = len({worker["replica"] for worker in reference["workers"]})
    for normal, first, second in zip(reference["workers"], published["workers"], attached["workers"], strict=True):
        loaded, bound = (_outcome(worker, "target") for worker in (first, second))
        name = bound["rank"] or str(normal["rank"])
        if replicas > 1:
            name = f"replica {normal['replica']}: {name}"
        ranks.append(_judge_model(name, loaded, bound, normal, first if alike else second, second))
        if "draft" in normal:
            drafts = _outcome(first, "draft"), _outcome(second, "draft")
            described = (worker["draft"] for worker in (normal, first if alike else second, second))
            ranks.append(_judge_model(f"{name} draft", *drafts, *described))
    answers, same = _compare_answers(reference, published if alike else attached, attached)
    return Verdict(model, flags, reference["versions"], ranks, answers, same, seconds)


def _outcome(worker: dict[str, Any], role: str) -> dict[str, Any]:
    return next((outcome for outcome in worker["outcomes"] if outcome["role"] == role), UNDECIDED)


def _judge_model(
    name: str,
    loaded: dict[str, Any],
    bound: dict[str, Any],
    normal: dict[str, Any],
    first: dict[str, Any],
    second: dict[str, Any],
) -> Rank:
    rank = Rank(name, bound["size_bytes"], len(normal["tensors"]))
    rank.loaded, rank.attached = loaded["what"], bound["what"]
    rank.seconds, rank.ways = bound["seconds"], bound["ways"]
    rank.reasons = sorted({o["reason"] for o in (loaded, bound) if o["what"] == "alone"})
    if bound["what"] == "published":
        rank.reasons.append(bound["reason"] or "the second engine loaded and published, too")
    for what, model in (("published", first), ("attached", second)):
        for difference in differences(_expected(normal, model), model):
            found = rank.byte_differences if difference.of_bytes else rank.attribute_differences
            found.append(f"{what}: {difference}")
    return rank


@dataclass(frozen=True)
class Difference:
    """One thing that two models do not have in common. `field` is what is said of a tensor, "" the whole of it."""

    path: str
    part: str
    field: str
    here: str
    there: str

    @property
    def of_bytes(self) -> bool:
        """Whether the tensors hold something else; otherwise an attribute differs."""
        return self.part == "tensors" and self.field in BYTES

    def __str__(self) -> str:
        name = f"{self.path or 'the model'} {self.field}".rstrip()
        return f"{name}: {self.here} normally, {self.there} here"


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[Difference]:
    """Where the descriptions of two models differ. Pure."""
    found = []
    for part in ("tensors", "values"):
        for path in sorted(here[part].keys() | there[part].keys()):
            one, other = here[part].get(path), there[part].get(path)
            if part == "tensors" and one and other:
                names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
                found += [Difference(path, part, n, *(str(t.get(n, "absent")) for t in (one, other))) for n in names]
            elif one != other:
                found.append(Difference(path, part, "", *(_shown(value) for value in (one, other))))
    return found


def _shown(value: dict[str, Any] | str | None) -> str:
    if isinstance(value, dict):
        return f"{value['class']} {value['dtype']} {value['shape']}"
    return value or "absent"


def _expected(normal: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What a reference has, after loading or, where `other` has the same, while running."""
    running = normal.get("running", normal)
    expected = {}
    for part in ("tensors", "values"):
        chosen = {
            path: (other if other[part].get(path) == running[part].get(path) else normal)[part].get(path)
            for path in normal[part].keys() | running[part].keys() | other[part].keys()
        }
        expected[part] = {path: value for path, value in chosen.items() if value is not None}
    return expected


def _compare_answers(*reports: dict[str, Any]) -> tuple[str, bool]:
    """In words, and whether no difference was seen beyond that of another kernel on CPU."""
    if reports[0]["answers"] is None:
        return f"not asked: {reports[0]['no_answers']}", True
    if missing := [report["no_answers"] for report in reports if report["answers"] is None]:
        return f"failed: {missing[0]}", False
    # Why a picture was left out may be worded differently by each engine.
    answers = [{key: value for key, value in r["answers"].items() if key != "left_out"} for r in reports]
    words, same = _compare_values(answers, CLOSE_FLOAT32 if reports[0].get("dtype") == "torch.float32" else CLOSE)
    if media := answers[0].get("media"):
        words += f" (with {', '.join(media)})"
    if left_out := reports[0]["answers"].get("left_out"):
        words += f" (text only: {left_out})"
    return words, same


def _compare_values(answers: list[dict[str, Any]], close: float) -> tuple[str, bool]:
    if answers[0] == answers[1] == answers[2]:
        return "equal", True
    normal, *others = answers
    if any(other.get("media") != normal.get("media") for other in others):
        return f"to other media: {[answer.get('media') for answer in answers]}", False
    compared = [_one_after_the_other(normal, other, close) for other in others]
    if not all(same_tokens for _, _, same_tokens in compared):
        return "other tokens", False
    largest = max((apart for apart, _, _ in compared), default=0.0)
    words = "equal" if not largest else f"{'equal tokens, ' if 'tokens' in normal else ''}values within {largest:.1g}"
    at_once = [_at_once(normal["at_once"], other["at_once"]) for other in others]
    apart = max((apart for apart, _ in at_once), default=0.0)
    if apart:
        words += f", at once within {apart:.1g}"
    return words, all(is_close for _, is_close, _ in compared) and all(is_close for _, is_close in at_once)


def _one_after_the_other(here: dict[str, Any], there: dict[str, Any], close: float) -> tuple[float, bool, bool]:
    """How far the values of two engines are apart, whether that is close enough, and whether their tokens are equal.

    Two tokens that are equally likely, as far as that can be told, are equal. What follows another token is not
    compared.
    """
    apart, is_close = 0.0, True
    for number, (one, other) in enumerate(zip(here["values"], there["values"], strict=True)):
        allowed = close * max(1.0, *map(abs, one))
        compared = len(one)
        if "tokens" in here:
            pairs = enumerate(zip(here["tokens"][number], there["tokens"][number], strict=True))
            step = next((step for step, (a, b) in pairs if a != b), None)
            if step is not None:
                size = len(one) // len(here["tokens"][number])
                compared = (step + 1) * size
                best = [values[step * size : step * size + 2] for values in (one, other)]
                if size < 2 or min(first - second for first, second in best) > allowed:
                    return apart, False, False
        farthest = _farthest(one[:compared], other[:compared])
        apart, is_close = max(apart, farthest), is_close and farthest <= allowed
    return apart, is_close, True


def _at_once(here: list[list[list[float]]], there: list[list[list[float]]]) -> tuple[float, bool]:
    """How far the values of two engines are apart where they come closest, and whether that is close enough.

    Args:
        here: for each prompt, for each time it was asked, values.
    """
    apart = allowed = 0.0
    for one, other in zip(here, there, strict=True):
        apart = max(apart, min(_farthest(a, b) for a in one for b in other))
        own = max((_farthest(*two) for times in (one, other) for two in itertools.combinations(times, 2)), default=0.0)
        allowed = max(allowed, own, CLOSE * max((abs(value) for times in one for value in times), default=0.0))
    return apart, apart <= allowed


def _farthest(here: list[float], there: list[float]) -> float:
    return max((abs(a - b) for a, b in zip(here, there, strict=True)), default=0.0)


def text(verdict: Verdict) -> str:
    """The verdict for people."""
    rows = [HEADINGS]
    for rank in verdict.ranks:
        ways = ", ".join(f"{count} {way}" for way, count in rank.ways.items())
        rows.append(
            (
                *(rank.rank, f"{rank.size_bytes / GIB:.2f}", str(rank.tensors), rank.loaded, rank.attached),
                *(f"{rank.seconds:.3f} s", ways or "-"),
                *(_count(rank.byte_differences), _count(rank.attribute_differences), verdict.answers),
            )
        )
    lines = [columns(rows)]
    for rank in verdict.ranks:
        found = rank.byte_differences + rank.attribute_differences
        lines += [f"{rank.rank}: {line}" for line in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"{rank.rank}: and {len(found) - SHOWN} more")
        lines += [f"{rank.rank}: not shared: {reason}" for reason in rank.reasons]
    words = {EQUAL: "is equal", DIFFERENT: "IS DIFFERENT", NOT_SHARED: "is not shared, and loads normally,"}
    lines.append(f"{verdict.model} {words[verdict.status]} through the companion.")
    return "\n".join(lines)


def _count(found: list[str]) -> str:
    return f"{len(found)} differ" if found else "equal"
