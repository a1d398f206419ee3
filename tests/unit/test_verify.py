"""`verify`'s verdict on reports of three engines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from vllm_companion_plugin.cli import verify

REPORT: dict[str, Any] = {
    "versions": {"vllm": "0.0"},
    "answers": {"tokens": [[1, 2]], "values": [[-0.5, -1.5]]},
    "workers": [
        {
            "replica": 0,
            "rank": 0,
            "outcomes": [],
            "modules": {"a": {"class": "Linear", "aliases": [], "attributes": {"mode": "'x'"}, "floats": {"f": 0.5}}},
            "tensors": {"a.weight": {"sha256": "12", "bytes": 4, "tied_to": "a.weight", "attributes": {}}},
        }
    ],
}


def outcome(what: str, reason: str = "") -> dict[str, Any]:
    shared = {"rank": "single", "size_bytes": 4, "seconds": 0.1, "ways": {"hide": 1}}
    return {"what": what, "role": "target", "reason": reason, **shared}


def judged(change: Callable[[dict[str, Any]], object] = lambda report: None, what: str = "attached") -> verify.Verdict:
    """The verdict if `change` is what the third engine has differently."""
    reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
    published["workers"][0]["outcomes"] = [outcome("published")]
    attached["workers"][0]["outcomes"] = [outcome(what, "because" if what == "alone" else "")]
    change(attached)
    return verify.judge("m", [], reference, published, attached, seconds=1.0)


def test_equal_reports_are_equal() -> None:
    verdict = judged()
    assert verdict.status == verify.EQUAL
    assert "m is equal through the companion." in verify.text(verdict)
    assert verdict.to_json()["verdict"] == "equal"


def test_an_engine_that_loaded_alone_is_not_shared_with_its_reason() -> None:
    verdict = judged(what="alone")
    assert verdict.status == verify.NOT_SHARED
    assert "single: not shared: because" in verify.text(verdict)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["workers"][0]["tensors"]["a.weight"].update(sha256="13"), "a.weight sha256: 12 normally, 13 here"),
        (lambda r: r["workers"][0]["tensors"]["a.weight"].update(tied_to="b"), "tied_to"),
        (lambda r: r["workers"][0]["tensors"].clear(), "a.weight"),
        (lambda r: r["workers"][0]["modules"]["a"]["attributes"].update(mode="'y'"), "mode: 'x' normally, 'y' here"),
        (lambda r: r["workers"][0]["modules"]["a"]["floats"].update(f=0.25), "f: 0.5 normally, 0.25 here"),
        (lambda r: r["workers"][0]["modules"].update(b={}), "b: absent normally"),
        (lambda r: r["answers"].update(tokens=[[1, 3]]), "other tokens"),
        (lambda r: r["answers"].update(values=[[-0.5, -1.6]]), "values within 0.1"),
        (lambda r: r.update(answers=None, no_answers="it crashed"), "it crashed"),
    ],
)
def test_any_difference_is_found_and_named(change: Callable[[dict[str, Any]], object], named: str) -> None:
    verdict = judged(change)
    assert verdict.status == verify.DIFFERENT
    assert named in verify.text(verdict)
    assert "IS DIFFERENT" in verify.text(verdict)


def test_what_a_module_notes_while_running_may_be_either() -> None:
    reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
    for report in (published, attached):
        report["workers"][0]["outcomes"] = [outcome("attached")]
        report["workers"][0]["modules"]["a"]["attributes"]["isa"] = "'vec'"
        report["workers"][0]["tensors"]["a.cache"] = {"sha256": "56"}
    reference["workers"][0]["running"] = {"a": {"attributes": {"mode": "'packed'", "isa": "'vec'"}}}
    reference["workers"][0]["running_tensors"] = {"a.cache": {"sha256": "56"}, "a.packed": {"sha256": "78"}}
    assert verify.judge("m", [], reference, published, attached, seconds=1.0).status == verify.EQUAL
    reference["workers"][0]["running_tensors"]["a.cache"] = {"sha256": "57"}
    assert verify.judge("m", [], reference, published, attached, seconds=1.0).status == verify.DIFFERENT
    reference["workers"][0]["running_tensors"]["a.cache"] = {"sha256": "56"}
    attached["workers"][0]["modules"]["a"]["attributes"]["isa"] = "'other'"
    assert verify.judge("m", [], reference, published, attached, seconds=1.0).status == verify.DIFFERENT


def test_a_picture_that_was_asked_or_left_out_is_named() -> None:
    def ask(*media: str, left_out: str = "") -> verify.Verdict:
        reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
        for report in (published, attached):
            report["workers"][0]["outcomes"] = [outcome("attached")]
        for number, (report, kinds) in enumerate(zip((reference, published, attached), media, strict=True)):
            report["answers"] |= {"media": kinds.split(), "left_out": left_out and f"{left_out} {number}"}
        return verify.judge("m", [], reference, published, attached, seconds=1.0)

    assert ask("image", "image", "image").answers == "equal (with image)"
    without = ask("", "", "", left_out="no processor")
    assert (without.status, without.answers) == (verify.EQUAL, "equal (text only: no processor 0)")
    assert ask("image", "image", "").status == verify.DIFFERENT


def test_an_engine_that_did_not_ask_the_companion_did_not_share() -> None:
    verdict = judged(lambda report: report["workers"][0]["outcomes"].clear())
    assert verdict.status == verify.NOT_SHARED
    assert "vLLM did not ask the companion" in verify.text(verdict)


def test_a_draft_has_a_verdict_of_its_own() -> None:
    def judge(what: str, sha256: str) -> verify.Verdict:
        reports = [copy.deepcopy(REPORT) for _ in range(3)]
        for report in reports:
            worker = report["workers"][0]
            worker["draft"] = {name: copy.deepcopy(worker[name]) for name in ("modules", "tensors")}
            worker["outcomes"] = [outcome("attached"), outcome(what, "why") | {"role": "draft"}]
        reports[2]["workers"][0]["draft"]["tensors"]["a.weight"]["sha256"] = sha256
        return verify.judge("m", [], reports[0], reports[1], reports[2], seconds=1.0)

    assert [rank.rank for rank in judge("attached", "12").ranks] == ["single", "single draft"]
    assert judge("attached", "12").status == verify.EQUAL
    assert judge("attached", "13").status == verify.DIFFERENT
    alone = judge("alone", "12")
    assert alone.status == verify.NOT_SHARED
    assert "single draft: not shared: why" in verify.text(alone)
