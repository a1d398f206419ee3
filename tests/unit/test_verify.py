"""`verify`'s verdict on reports of three engines."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_companion_plugin.cli import verify
from vllm_companion_plugin.cli.main import main
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.settings import resolve

CACHE = {"class": "Tensor", "dtype": "int8", "shape": [1], "sha256": "56"}
REPORT: dict[str, Any] = {
    "versions": {"vllm": "0.0"},
    "answers": {"tokens": [[1, 2]], "values": [[-0.5, -1.5, -0.25, -1.75]], "at_once": [[[-0.5]]]},
    "workers": [
        {
            "replica": 0,
            "rank": 0,
            "outcomes": [],
            "values": {"": "Model", "a": "Linear", "a.mode": "'x'", "a.f": "0.5"},
            "tensors": {
                "a.weight": {"class": "Parameter", "dtype": "int8", "shape": [4], "stride": [1], "sha256": "12"}
            },
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


def in_worker(part: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda report: report["workers"][0][part].update({name.replace("__", "."): v for name, v in values.items()})


def of_weight(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda report: report["workers"][0]["tensors"]["a.weight"].update(fields)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (of_weight(sha256="13"), "a.weight sha256: 12 normally, 13 here"),
        (of_weight(memory="b"), "a.weight memory: absent normally, b here"),
        (lambda r: r["workers"][0]["tensors"].clear(), "a.weight: Parameter int8 [4] normally, absent here"),
        (in_worker("values", a__mode="'y'"), "a.mode: 'x' normally, 'y' here"),
        (in_worker("values", b="Linear"), "b: absent normally"),
        (lambda r: r["workers"][0]["values"].pop(""), "the model: Model normally, absent here"),
        (lambda r: r["answers"].update(tokens=[[1, 3]]), "other tokens"),
        (lambda r: r["answers"].update(values=[[-0.5, -1.6, -0.25, -1.75]]), "values within 0.1"),
        (lambda r: r["answers"].update(at_once=[[[-0.6]]]), "equal, at once within 0.1"),
        (lambda r: r.update(answers=None, no_answers="it crashed"), "it crashed"),
    ],
)
def test_any_difference_is_found_and_named(change: Callable[[dict[str, Any]], object], named: str) -> None:
    verdict = judged(change)
    assert verdict.status == verify.DIFFERENT
    assert named in verify.text(verdict)
    assert "IS DIFFERENT" in verify.text(verdict)


def test_bytes_and_attributes_are_told_apart() -> None:
    """The table counts what tensors hold in one column, and everything else in the other."""

    def counts(change: Callable[[dict[str, Any]], object]) -> tuple[int, int]:
        (rank,) = judged(change).ranks
        return len(rank.byte_differences), len(rank.attribute_differences)

    assert counts(of_weight(sha256="13")) == counts(of_weight(dtype="uint8")) == (1, 0)
    assert counts(of_weight(stride=[2])) == counts(in_worker("values", a__f="0.25")) == (0, 1)
    assert counts(in_worker("tensors", b=CACHE)) == (1, 0)
    table = verify.text(judged(of_weight(requires_grad=True)))
    assert table.splitlines()[0].split()[-3:] == ["BYTES", "ATTRIBUTES", "ANSWERS"]
    assert table.splitlines()[1].split()[-4:] == ["equal", "1", "differ", "equal"]


def test_who_publishes_with_other_flags_is_not_compared() -> None:
    """Only whoever attached must be equal to a normal engine."""
    reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
    for what, report in (("published", published), ("attached", attached)):
        report["workers"][0]["outcomes"] = [outcome(what)]
    published["workers"][0]["values"]["a.mode"] = "'y'"
    published["answers"]["tokens"] = [[1, 3]]
    assert verify.judge("m", [], reference, published, attached, seconds=1.0).status == verify.DIFFERENT
    verdict = verify.judge("m", [], reference, published, attached, seconds=1.0, alike=False)
    assert (verdict.status, verdict.ranks[0].loaded) == (verify.EQUAL, "published")


def test_an_engine_that_published_a_variant_shares_nothing() -> None:
    """It equals a normal load, because it is one."""
    reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
    published["workers"][0]["outcomes"] = [outcome("published")]
    attached["workers"][0]["outcomes"] = [outcome("published") | {"reason": "a variant: a.mode"}]
    verdict = verify.judge("m", [], reference, published, attached, seconds=1.0)
    assert (verdict.status, verdict.ranks[0].reasons) == (verify.NOT_SHARED, ["a variant: a.mode"])


def test_tokens_may_differ_where_two_are_equally_likely() -> None:
    """In the last bits of half precision one of them is the larger, and what follows it is something else."""

    def answers(dtype: str, *values: float) -> int:
        reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
        for report, tokens in ((reference, [1, 2]), (published, [1, 2]), (attached, [3, 4])):
            report["dtype"] = dtype
            report["answers"] |= {"tokens": [tokens], "values": [[-1.0, -1.002, *(-float(t) for t in tokens)]]}
            report["workers"][0]["outcomes"] = [outcome("attached")]
        attached["answers"]["values"] = [list(values)]
        return verify.judge("m", [], reference, published, attached, seconds=1.0).status

    assert answers("torch.bfloat16", -1.0, -1.002, -3.0, -4.0) == verify.EQUAL
    assert answers("torch.float32", -1.0, -1.002, -3.0, -4.0) == verify.DIFFERENT
    assert answers("torch.bfloat16", -1.1, -1.102, -3.0, -4.0) == verify.DIFFERENT


def test_answers_asked_together_may_differ_in_their_last_bits() -> None:
    verdict = judged(lambda report: report["answers"].update(at_once=[[[-0.501]]]))
    assert (verdict.status, verdict.answers) == (verify.EQUAL, "equal, at once within 0.001")


def test_answers_asked_together_may_differ_as_much_as_an_engine_differs_from_itself() -> None:
    """Who is batched with whom is another each time."""

    def answers(*times: float) -> tuple[int, str]:
        verdict = judged(lambda report: report["answers"].update(at_once=[[[one] for one in times]]))
        return verdict.status, verdict.answers

    assert answers(-0.6, -0.62) == (verify.DIFFERENT, "equal, at once within 0.1")
    assert answers(-0.6, -0.75) == (verify.EQUAL, "equal, at once within 0.1")
    assert answers(-0.6, -0.5) == (verify.EQUAL, "equal")


def test_what_a_module_notes_while_running_may_be_either() -> None:
    def status(**changed: str) -> int:
        reference, published, attached = (copy.deepcopy(REPORT) for _ in range(3))
        for report in (published, attached):
            report["workers"][0]["outcomes"] = [outcome("attached")]
            report["workers"][0]["values"]["a.isa"] = "'vec'"
            report["workers"][0]["tensors"]["a.cache"] = CACHE
        attached["workers"][0]["values"]["a.isa"] = changed.get("isa", "'vec'")
        reference["workers"][0]["running"] = {
            "values": {"": "Model", "a": "Linear", "a.mode": "'packed'", "a.f": "0.5", "a.isa": "'vec'"},
            "tensors": {"a.cache": CACHE | {"sha256": changed.get("cache", "56")}, "a.packed": CACHE},
        }
        return verify.judge("m", [], reference, published, attached, seconds=1.0).status

    assert status() == verify.EQUAL
    assert status(cache="57") == verify.DIFFERENT
    assert status(isa="'other'") == verify.DIFFERENT


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
            worker["draft"] = {name: copy.deepcopy(worker[name]) for name in ("values", "tensors")}
            worker["outcomes"] = [outcome("attached"), outcome(what, "why") | {"role": "draft"}]
        reports[2]["workers"][0]["draft"]["tensors"]["a.weight"]["sha256"] = sha256
        return verify.judge("m", [], reports[0], reports[1], reports[2], seconds=1.0)

    assert [rank.rank for rank in judge("attached", "12").ranks] == ["single", "single draft"]
    assert judge("attached", "12").status == verify.EQUAL
    assert judge("attached", "13").status == verify.DIFFERENT
    alone = judge("alone", "12")
    assert alone.status == verify.NOT_SHARED
    assert "single draft: not shared: why" in verify.text(alone)


class TestStarting:
    """What the command gives its engines, without engines."""

    @pytest.fixture
    def given(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, str]]]:
        """The environments of engines, the first of which ends at once."""
        seen: list[dict[str, str]] = []

        def run_to_end(command: list[str], environment: dict[str, str], *_: object, **__: object) -> int:
            seen.append(environment)
            return 1

        monkeypatch.setattr(verify, "run_to_end", run_to_end)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
            monkeypatch.setenv("COMPANION_RUNTIME_DIR", f"{short}/r")
            yield seen
            assert os.listdir(short) == [], "the command leaves nothing behind"

    def _settings(self, given: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Any:
        assert main(["verify", "m"]) == 1
        for name, value in given[0].items():
            monkeypatch.setenv(name, value)
        return resolve()

    def test_the_third_engine_finds_what_the_second_published(
        self, given: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Starting a large engine takes minutes, in which nobody uses the entry."""
        monkeypatch.setenv("COMPANION_LINGER_S", "0")
        assert self._settings(given, monkeypatch).linger_s >= 600

    @pytest.mark.parametrize("fault", ["long", "writable"])
    def test_temporary_files_where_no_companion_can_be(
        self, given: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
    ) -> None:
        """A directory of jobs on a cluster may have a long path, or be writable for a group."""
        place = tmp_path / ("d" * 90 if fault == "long" else "d")
        place.mkdir()
        place.chmod(0o700 if fault == "long" else 0o777)
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        others = os.environ["COMPANION_RUNTIME_DIR"]
        settings = self._settings(given, monkeypatch)
        assert settings.runtime_dir != others
        Path(settings.runtime_dir).mkdir(mode=0o700)
        assert device_paths("cpu", settings).directory.startswith(settings.runtime_dir)
        for path in (f"{settings.runtime_dir}/cpu", settings.runtime_dir):
            os.rmdir(path)

    def test_a_quote_that_does_not_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "--publisher", "--dtype 'half", "m"]) == 2
        assert "--publisher" in capsys.readouterr().err

    def test_without_standard_error(
        self, given: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The parent process closed it. What is for people must not go between the JSON."""
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["verify", "--json", "m"]) == 1
        assert len(given) == 1
        assert capsys.readouterr().out == ""


def test_an_engine_keeps_to_the_place_of_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of its flags would lead to other engines' entries, or let its own go before the next engine starts."""
    from vllm_companion_plugin.engine.run import verify as run

    seen: list[Any] = []

    class Stop(Exception):
        pass

    def engine(args: Any) -> None:
        seen.append(args)
        raise Stop

    monkeypatch.setattr(run, "_Engine", engine)
    monkeypatch.setenv("COMPANION_RUNTIME_DIR", "/tmp/of-the-proof")
    monkeypatch.setenv("COMPANION_LINGER_S", "700")
    extra = '{"runtime_dir": "/tmp/of-others", "linger_s": 0, "share": "copy"}'
    with pytest.raises(Stop):
        run.main(["companion", "out", "m", "--load-format", "companion", "--model-loader-extra-config", extra])
    wanted = {"runtime_dir": "/tmp/of-the-proof", "linger_s": 700.0, "share": "copy"}
    assert seen[0].model_loader_extra_config == wanted
