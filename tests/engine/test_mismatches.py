"""What makes a model another one is named: fields and files with both values, and places of a variant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkpoints.copies import WEIGHTS, flip
from tests.support.deciding import Engines
from tests.support.keys import key_of
from vllm_companion_plugin.engine import decide
from vllm_companion_plugin.engine.identity import key
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host import files

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Not by a handler: vLLM sets its loggers up anew when it makes the first configuration of a process."""
    lines: list[str] = []
    monkeypatch.setattr(decide.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_a_mismatch_names_the_fields_and_both_values(engines: Engines, first: Path, said: list[str]) -> None:
    engines.load(first)
    assert not engines.attaches(first, hf_overrides={"rms_norm_eps": 0.5})
    (line,) = [line for line in said if "loaded differently" in line]
    assert line.endswith("so it is loaded once more: hf.rms_norm_eps is '1e-05' there and '0.5' here.")


def test_a_mismatch_names_the_files_and_both_values(engines: Engines, first: Path, said: list[str]) -> None:
    """Not the digest of all of them."""
    engines.load(first)
    before = files.file_identity(first / WEIGHTS)
    flip(first / WEIGHTS, [-1])
    assert not engines.attaches(first)
    named = f"{WEIGHTS} is {before!r} there and {files.file_identity(first / WEIGHTS)!r} here."
    assert [line.partition("once more: ")[2] for line in said if "loaded differently" in line] == [named]


def test_a_variant_that_was_refused_at_the_same_place_is_the_last(tiny: Path) -> None:
    """What loading made there cannot be restored, and no further copy would change that."""
    first = key.variant(key_of(tiny), "model.table", "[1]; [2]")
    other = key.variant(first, "model.kind", "absent")
    assert other.variant == "model.table is [1], [2]; model.kind is absent"
    for where, here in (("model.table", "[1]; [2]"), ("model.kind", "absent")):
        with pytest.raises(NotShareableError, match=f"what loading makes of {where} cannot be restored"):
            key.variant(other, where, here)


def test_variants_that_differ_at_one_place(tiny: Path) -> None:
    """If each engine has another value there, then no copy of its own serves anybody else."""
    model = key_of(tiny)
    held = [model, *(key.variant(model, "model.created", f"{number}.5") for number in range(key.MAX_VARIANTS - 1))]
    other = key.variant(model, "model.created", "99.5")
    key.check_variants(other, "model.created", held)
    held.append(key.variant(model, "model.created", "77.5"))
    with pytest.raises(NotShareableError, match=r"4 variants of it are held that differ at model\.created alone"):
        key.check_variants(other, "model.created", held)
    key.check_variants(held[-1], "model.created", held)  # which is there
    key.check_variants(key.variant(model, "model.creat", "1"), "model.creat", held)
    key.check_variants(key.variant(held[1], "model.kind", "absent"), "model.kind", held)
    other_model = replace(model, fields=model.fields | {"model.dtype": "another"})
    key.check_variants(key.variant(other_model, "model.created", "99.5"), "model.created", held)


def test_variants_of_a_variant_that_differ_at_one_place(tiny: Path) -> None:
    first = key.variant(key_of(tiny), "model.kind", "absent")
    held = [key.variant(first, "model.created", str(number)) for number in range(key.MAX_VARIANTS)]
    with pytest.raises(NotShareableError, match=r"differ at model\.created alone"):
        key.check_variants(key.variant(first, "model.created", "99"), "model.created", held)
    key.check_variants(key.variant(key_of(tiny), "model.created", "99"), "model.created", held)
