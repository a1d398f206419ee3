"""Ranks of one engine take other weights together, or none of them does: real groups, attachments and a companion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.place import Place
from tests.support.publishing import hold_zeros

MODEL = "test/model"


def run(place: Place, tmp_path: Path, wrong: str) -> list[dict[str, Any]]:
    """What two ranks have after `companion_update`, of which the second one may not be able to."""
    place.companion()
    client = hold_zeros(place)
    ranks = [
        place.run("-m", "tests.engine.update_child", str(rank), str(tmp_path / "store"), how)
        for rank, how in enumerate(("nothing", wrong))
    ]
    for rank in ranks:
        assert rank.stdout is not None
        while (line := rank.stdout.readline()) != "ready\n":
            assert line, rank.communicate()[1]
    with client.update(MODEL, version="ones") as new:
        new.load({"embed.weight": torch.ones(64, 16, dtype=torch.bfloat16)})
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    answers = []
    for rank in ranks:
        assert rank.stdout is not None
        answers.append(json.loads(rank.stdout.readline() or "{}"))
        assert answers[-1], rank.communicate()[1]
    return answers


class TestCompanionUpdate:
    """The method for `collective_rpc`, as each rank answers it."""

    @pytest.mark.slow  # test_transfer.py has two ranks that switch in `make test`
    def test_all(self, place: Place, tmp_path: Path) -> None:
        """Both switch."""
        for answer in run(place, tmp_path, "nothing"):
            assert answer == {"updated": {f"{MODEL} (target)": 2}, "generation": 2, "value": 1}

    @pytest.mark.parametrize(
        ("wrong", "code", "text", "step"),
        [
            pytest.param(*("private", "arena", "is private, so it cannot advance", "prepare"), marks=pytest.mark.slow),
            pytest.param(*("alone", "not_found", "has no model of a companion", "prepare"), marks=pytest.mark.slow),
            ("unmappable", "arena", "There is no memory", "map"),
        ],
    )
    def test_one_cannot(self, place: Place, tmp_path: Path, wrong: str, code: str, text: str, step: str) -> None:
        """None does: each goes on with what it had, says why, and keeps nothing of the other weights."""
        well, bad = run(place, tmp_path, wrong)
        assert (well["code"], bad["code"]) == ("update_refused", code)
        assert text in bad["text"]
        assert f"could not {step} the new weights" in well["text"]
        assert bad["text"] in well["text"]
        assert [(each["generation"], each["value"]) for each in (well, bad)] == [(1, 0), (1, 0)]
        assert well["more_fds"] <= 0
