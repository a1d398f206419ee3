"""How long a look at a file or a digest of it is believed: real mounts, beside a real companion."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checkpoints.copies import WEIGHTS, copy_of, fine_tune_of, flip
from tests.support.deciding import Engines, kept
from vllm_companion_plugin.engine import decisions
from vllm_companion_plugin.engine.identity import checkpoint, digest
from vllm_companion_plugin.errors import NotShareableError
from vllm_companion_plugin.host import files
from vllm_companion_plugin.host.runtime_dir import digests_directory

pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_digest_of_a_file_that_was_just_written_is_not_kept(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written again within the same tick of the clock."""
    monkeypatch.setattr(digest, "_SETTLED_S", 2.0)
    engines.load(first)
    assert engines.attaches(copy_of(first))
    assert kept(engines) == 0


def test_a_damaged_digest_is_not_believed(engines: Engines, first: Path) -> None:
    tuned = fine_tune_of(first, [-1])
    engines.load(first)
    directory = Path(digests_directory(engines.settings))
    for file in (*first.iterdir(), *tuned.iterdir()):
        name = hashlib.sha256(checkpoint.file_identity(file).encode()).hexdigest()
        (directory / name).write_bytes(bytes(64))  # as a crash leaves it
    assert not engines.attaches(tuned)


def test_a_pipe_where_another_client_says_that_its_checkpoint_is_does_not_hang_an_engine(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert digest._sample(tmp_path / "pipe") == (-1, b"")
    began = time.monotonic()
    digest.whole_digest_of(tmp_path / "pipe")
    assert time.monotonic() - began < 60


class TestLooks:
    """Times of files are believed where a kernel sets them."""

    def test_a_file_on_a_disk_is_known_by_a_look(self, first: Path) -> None:
        assert checkpoint.identity(first)[WEIGHTS].startswith("stat ")

    @pytest.mark.skipif(shutil.which("mksquashfs") is None or os.geteuid() != 0, reason="needs mksquashfs and root")
    def test_another_image_at_the_same_place_is_another_model(
        self, engines: Engines, first: Path, tmp_path: Path
    ) -> None:
        """Device, inode, size and times are equal; so is an image that is mounted again."""
        tuned = fine_tune_of(first, [-1])
        images = [tmp_path / f"{name}.img" for name in ("first", "tuned")]
        for model, image in zip((first, tuned), images, strict=True):
            options = ("-mkfs-time", "0", "-all-time", "0", "-quiet", "-no-progress")
            subprocess.run(["mksquashfs", model, image, *options], check=True, stdout=subprocess.DEVNULL)
        place = tmp_path / "mounted"
        place.mkdir()
        with mounted(images[0], place):
            before = os.stat(place / WEIGHTS)
            engines.load(place)
            assert engines.attaches(place)
        with mounted(images[1], place):
            after = os.stat(place / WEIGHTS)
            same = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
            assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]
            assert not engines.attaches(place)
            assert not engines.attaches(tuned), "nobody has published it"
        with mounted(images[0], place):
            assert engines.attaches(place)
        assert engines.attaches(first), "what it was made of has the same content"

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_what_is_read_is_read_once_a_mount(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Later engines in one container attach as fast as on a disk."""
        monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
        (tmp_path / "digests").mkdir()
        with overlay(first, tmp_path) as place:
            read = checkpoint.identity(place, digest.Digests(str(tmp_path / "digests"), 1))
            assert read[WEIGHTS].startswith("blake3 ")
            monkeypatch.setattr(digest, "whole_digest_of", lambda path: pytest.fail(f"{path} is read again"))
            assert checkpoint.identity(place, digest.Digests(str(tmp_path / "digests"), 1)) == read

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_containers_of_one_image_share(self, engines: Engines, first: Path, tmp_path: Path) -> None:
        """Each has an overlay of its own over one lower directory, that no other one sees."""
        with overlay(first, tmp_path) as place:
            seen = os.stat(place / WEIGHTS).st_dev
            engines.load(place)
        with overlay(fine_tune_of(first, [-1]), tmp_path) as place:
            assert not engines.attaches(place)
        with overlay(first, tmp_path, "busy"), overlay(first, tmp_path) as place:
            assert os.stat(place / WEIGHTS).st_dev != seen
            assert engines.attaches(place)

    def test_times_that_nobody_had_prove_nothing(self, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image that was made with one time for all may be of any file system."""
        seen = os.stat

        def fixed(path: Any, **options: Any) -> Any:
            status = seen(path, **options)
            times = {"st_mtime_ns": 1_700_000_000 * 10**9, "st_ctime_ns": 1_700_000_000 * 10**9}
            return SimpleNamespace(**{n: getattr(status, n) for n in dir(status) if n.startswith("st_")} | times)

        monkeypatch.setattr(files.os, "stat", fixed)
        assert files.look(first / WEIGHTS).lasts is files.Lasts.NOT

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_where_mounts_have_no_numbers_a_look_lasts_for_a_load(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Linux before 6.8: each engine reads its files once, and not again when it has loaded them."""
        monkeypatch.setattr(files, "_mount", lambda path: None)
        monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
        (tmp_path / "digests").mkdir()
        nobody: Any = None
        with overlay(first, tmp_path) as place:
            mine = digest.Digests(str(tmp_path / "digests"), 1)
            content = checkpoint.identity(place, mine)
            assert os.listdir(tmp_path / "digests") in ([], ["lock"])
            monkeypatch.setattr(files, "_engine", lambda: "1-2")
            assert files.look(place / WEIGHTS).lasts is files.Lasts.ENGINE, "its other ranks need not read, too"
            monkeypatch.setattr(files, "_engine", lambda: None)
            load = decisions.Load(nobody, nobody, nobody, nobody, nobody, decisions.Found(place, content, (), mine))
            reads = []
            read = digest.whole_digest_of
            monkeypatch.setattr(digest, "whole_digest_of", lambda path: reads.append(path.name) or read(path))
            load.check_unchanged()
            assert reads == []
            flip(place / WEIGHTS, [-1])
            with pytest.raises(NotShareableError, match=rf"{WEIGHTS} .* changed while it was loaded"):
                load.check_unchanged()
            assert reads == [WEIGHTS]

    def test_digests_do_not_grow_without_bound(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest go."""
        monkeypatch.setattr(digest, "_MOST_KEPT", 4)
        monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
        kept = tmp_path / "digests"
        kept.mkdir()
        digests = digest.Digests(str(kept), 1)
        for number in range(20):
            (tmp_path / f"{number}").write_text(str(number))
            path = tmp_path / f"{number}"
            digests.of(digest.File(path, files.file_identity(path)))
            assert len(os.listdir(kept)) <= 4
        again = digest.Digests(str(kept), 1)
        assert again.known(files.file_identity(tmp_path / "19"))
        assert not again.known(files.file_identity(tmp_path / "0"))


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop,ro", image, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def overlay(lower: Path, beside: Path, name: str = "root") -> Iterator[Path]:
    """The directory `lower` as a container has it."""
    upper, work, place = (beside / f"{name}-{part}" for part in ("upper", "work", "place"))
    for path in (upper, work, place):
        path.mkdir(exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
