"""`verify` proves that a model is the same with and without the companion.

Three engines run one after the other: one loads normally, one loads and publishes, one attaches. Each engine
describes its model (every tensor by digest, every reachable Python value) and answers the same prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_companion_plugin.cli import look
from vllm_companion_plugin.cli.devices import devices_named
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.cli.parser import model_and_flags
from vllm_companion_plugin.cli.table import GIB, aligned
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.text import printable
from vllm_companion_plugin.errors import CompanionUnavailableError, RuntimeDirError, SettingsError
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.settings import BY_NAME, Settings, resolve, to_environment
from vllm_companion_plugin.supervise.children import Signals, Stopped, run_to_end

EQUAL, DIFFERENT, NOT_SHARED = Exit.DONE, Exit.FAILED, Exit.NOT_SHARED

SHOWN = 20
"""Number of differences that are listed; one cause makes thousands of them."""

UNDECIDED: dict[str, Any] = {
    "what": "alone",
    "role": "target",
    "rank": "",
    "reason": "vLLM did not ask the companion: these flags make it take another load format",
    "size_bytes": 0,
    "seconds": 0.0,
    "ways": {},
}
"""The outcome of a worker that reported none."""

BYTES = frozenset(("", "dtype", "shape", "sha256"))
"""Fields of a tensor that count as bytes; "" is the whole tensor. Other fields, and Python values, are attributes."""

CLOSE = 0.02
"""How far values may differ, relative to the largest, if the bytes are equal. Different kernels make different last
bits, and a normal engine differs this much from itself: by batching, by atomic additions, and by what a compiler chose
at its first run and took from its cache at the next. The last bits of half precision are large."""
CLOSE_FLOAT32 = 1e-3
"""The same limit for float32: on CPU one kernel multiplies shared weights, another one vLLM's packed weights."""
HEADINGS = ("RANK", "GiB", "TENSORS", "LOADED", "ATTACHED", "IN", "WAYS", "BYTES", "ATTRIBUTES", "ANSWERS")


@dataclass
class Rank:
    """The verdict on one model of one worker: the served model, or the draft."""

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
    def status(self) -> Exit:
        if not self.same_answers or any(rank.byte_differences or rank.attribute_differences for rank in self.ranks):
            return DIFFERENT
        return NOT_SHARED if any(rank.reasons for rank in self.ranks) else EQUAL

    def to_json(self) -> dict[str, Any]:
        verdict = {EQUAL: "equal", DIFFERENT: "different", NOT_SHARED: "not shared"}[self.status]
        return {"verdict": verdict, **vars(self), "ranks": [vars(rank) for rank in self.ranks]}


def main(parsed: argparse.Namespace, rest: list[str]) -> int:
    """Print the verdict; 0 if equal, 1 if different, 3 if the model is not shared.

    Raises:
        CompanionUnavailableError: an engine did not start, with or without the companion.
    """
    model, flags = model_and_flags("verify", rest, parsed.flags)
    if model is None:
        raise SettingsError("verify: which model?", remedy="Run: vllm-companion verify MODEL [flags of vLLM]")
    asked = ["--adapter", parsed.adapter] if parsed.adapter else []
    try:
        others = shlex.split(parsed.publisher)
    except ValueError as error:
        raise SettingsError(f"--publisher: {parsed.publisher!r} cannot be read as a shell would: {error}.") from error
    settings = _settings_of_its_own()
    directory = tempfile.mkdtemp(prefix="vcv-")
    try:
        with Signals() as signals:
            verdict = verify(model, flags, Path(directory), settings, signals, asked, others)
    except Stopped:
        return Exit.INTERRUPTED
    finally:
        look.stop_all(settings)
        for made in (directory, settings.runtime_dir):
            shutil.rmtree(made, ignore_errors=True)
    if parsed.json:
        print(json.dumps(verdict.to_json(), indent=1))
    else:
        print("\n".join(map(printable, text(verdict).split("\n"))))
    return verdict.status


def _settings_of_its_own() -> Settings:
    """Make a runtime directory that keeps entries of other engines out of the proof; what is published there stays.

    It is in the directory of temporary files, or beside the one of other engines, if companions cannot be there: its
    path may be too long for sockets, or others may write there.

    Raises:
        SettingsError: companions can be in neither of them.
    """
    others = resolve()
    reason = ""
    for above in (tempfile.gettempdir(), os.path.dirname(others.runtime_dir)):
        try:
            made = tempfile.mkdtemp(prefix="vcv-", dir=above)
        except OSError as error:
            reason = reason or str(error)
            continue
        settings = replace(others, runtime_dir=made, linger_s=max(others.linger_s, BY_NAME["linger_s"].default))
        try:
            for device in devices_named(None):
                device_paths(device, settings)
        except RuntimeDirError as error:
            shutil.rmtree(made, ignore_errors=True)
            reason = reason or error.what
            continue
        return settings
    raise SettingsError(
        f"verify has no place for its own runtime directory: {reason}",
        remedy="Set TMPDIR to a directory with a short path that others cannot write, or that is sticky.",
    )


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
        asked: flags of `engine.run.verify` for further questions to the engines.
        others: flags that only the publishing engine gets.
    """
    started = time.monotonic()
    reports = []
    for number, (role, what) in enumerate(
        [("reference", "loads normally"), ("companion", "loads and publishes"), ("companion", "attaches")], 1
    ):
        say(f"Engine {number} of 3 {what} ...", error=True)
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
        # Only the verdict goes to standard output.
        environment = {**os.environ, **to_environment(settings)}
        status = run_to_end(command, environment, signals, stdout=_fd_of_errors())
        if status == Exit.USAGE:
            raise SettingsError(f"{model}: vLLM refuses these flags; see its line above.")
        if status != 0 or not out.exists():
            raise CompanionUnavailableError(
                f"{model}: the engine that {what} ended with status {status}; see its lines above."
            )
        reports.append(json.loads(out.read_text()))
    return judge(model, flags, *reports, seconds=time.monotonic() - started, alike=not others)


def _fd_of_errors() -> int:
    """Return the descriptor of standard error, or of nowhere if the parent process closed it."""
    return sys.stderr.fileno() if sys.stderr is not None else subprocess.DEVNULL


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
    """Compare three reports of `engine.run.verify`. Pure.

    Args:
        alike: the publishing engine has the flags of the others. Otherwise its model is not compared.
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
    if bound["what"] not in ("attached", "copied") and not rank.reasons:
        rank.reasons.append(bound["reason"] or f"the second engine did not attach: {bound['what']}")
    for what, model in (("published", first), ("attached", second)):
        for difference in differences(_expected(normal, model), model):
            found = rank.byte_differences if difference.of_bytes else rank.attribute_differences
            found.append(f"{what}: {difference}")
    return rank


@dataclass(frozen=True)
class Difference:
    """One difference between two models. `field` is a field of a tensor, or "" for the whole tensor."""

    path: str
    part: str
    field: str
    here: str
    there: str

    @property
    def of_bytes(self) -> bool:
        """Whether the bytes of the tensors differ; otherwise an attribute differs."""
        return self.part == "tensors" and self.field in BYTES

    def __str__(self) -> str:
        name = f"{self.path or 'the model'} {self.field}".rstrip()
        return f"{name}: {self.here} normally, {self.there} here"


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[Difference]:
    """List where the descriptions of two models differ. Pure."""
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
    """Return a reference's values: by path the one after loading, or the one while running if `other` has the same."""
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
    """Compare answers: the result in words, and whether it shows no difference beyond that of another kernel on CPU."""
    if reports[0]["answers"] is None:
        return f"not asked: {reports[0]['no_answers']}", True
    if missing := [report["no_answers"] for report in reports if report["answers"] is None]:
        return f"failed: {missing[0]}", False
    # Each engine may word differently why a picture was left out.
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
    """Return how far the values of two engines differ, whether that is close enough, and whether the tokens are equal.

    Two tokens count as equal if they are equally likely within the limit. What follows a different token is not
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
    """Return how far the values of two engines differ where they come closest, and whether that is close enough.

    Args:
        here: for each prompt and each time it was asked, the values.
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
    """Write the verdict for people."""
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
    lines = [aligned(rows)]
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
