"""Which checkpoints are the same model, wherever they lie: real files, beside a real companion."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints.copies import WEIGHTS, copy_of, fine_tune_of, flip
from tests.support.deciding import Engines, kept
from vllm_companion_plugin.engine import session
from vllm_companion_plugin.engine.identity import digest
from vllm_companion_plugin.host.models import model_name

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_copy_is_the_same_model_and_is_read_once(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.load(first)
    copied = copy_of(first)
    assert engines.attaches(copied)
    assert kept(engines) == 2, "one digest of each file"
    monkeypatch.setattr(digest, "whole_digest_of", lambda path: pytest.fail(f"{path} is read again"))
    assert engines.attaches(copied)
    assert engines.attaches(first)


def test_a_hub_snapshot_and_a_copy_are_the_same_model(engines: Engines, first: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / ("a" * 40)
    shutil.copytree(first, blobs)
    (blobs / WEIGHTS).rename(blobs / ("b" * 64))
    shutil.copytree(first, snapshot, ignore=shutil.ignore_patterns(WEIGHTS))
    (snapshot / WEIGHTS).symlink_to(blobs / ("b" * 64))
    engines.load(snapshot)
    assert engines.attaches(first)


def test_a_blob_of_the_hub_that_was_written_to_is_another_model(engines: Engines, first: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("b" * 64)
    blob.parent.mkdir()
    (first / WEIGHTS).rename(blob)
    (first / WEIGHTS).symlink_to(blob)
    engines.load(first)
    flip(blob, [-1])
    assert not engines.attaches(first)


def test_two_fine_tunes_of_one_shape_are_told_apart_without_reading_them(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.load(first)
    size = (first / WEIGHTS).stat().st_size
    tuned = fine_tune_of(first, range(size // 2, size))
    monkeypatch.setattr(digest, "whole_digest_of", lambda path: pytest.fail(f"{path} is read"))
    assert not engines.attaches(tuned)


def test_one_byte_between_the_samples_is_enough(engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SAMPLE_BYTES", 16)
    engines.load(first)
    size = (first / WEIGHTS).stat().st_size
    tuned = fine_tune_of(first, [size * 9 // 16 + 16])
    assert not engines.attaches(tuned)
    assert kept(engines) == 2, "it took reading both"


def test_edited_in_place_it_is_another_model(engines: Engines, first: Path) -> None:
    engines.load(first)
    flip(first / WEIGHTS, [-1])
    assert not engines.attaches(first)


def test_a_new_time_alone_is_not_a_new_model_where_the_content_is_known(engines: Engines, first: Path) -> None:
    engines.load(first)
    assert engines.attaches(copy_of(first))  # now it is
    (first / WEIGHTS).touch()
    assert engines.attaches(first)


def test_what_was_removed_cannot_be_compared(engines: Engines, first: Path) -> None:
    copied = copy_of(first)
    engines.load(first)
    shutil.rmtree(first)
    assert not engines.attaches(copied)


def test_another_set_of_files_is_another_model(engines: Engines, first: Path) -> None:
    engines.load(first)
    more = copy_of(first, "more")
    (more / "model-2.safetensors").write_bytes(b"x")
    assert not engines.attaches(more)


ODD = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}模\u202e\n\x1b[2J\udcff\udcfe"
"""What a path may have: spaces of other kinds, marks, control characters, and bytes that are no UTF-8."""


def test_paths_with_any_characters(engines: Engines, first: Path, tmp_path: Path) -> None:
    """What has such a path is published and attached to, also from a copy, and is shown in a printable way."""
    odd = Path(shutil.move(first, tmp_path / ODD))
    (odd / f"{ODD}.safetensors").write_bytes(b"x")
    engines.load(odd)
    assert engines.attaches(odd)
    assert engines.attaches(copy_of(odd, f"{ODD}2"))
    (entry,) = session.current().connection("cpu", engines.settings).status().entries
    assert entry.key.source == str(odd)
    assert f"{ODD}.safetensors" in entry.key.files
    assert entry.key.model.isprintable()
    assert entry.key.model.endswith("\\xa0\\u3000模\\u202e\\n\\x1b[2J\\udcff\\udcfe")
    assert model_name(entry.key.model) == entry.key.model
