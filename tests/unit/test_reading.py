"""Which files a process reads, as who loads notes them and who attaches compares them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_companion_plugin.engine.identity.reading import LARGEST_BYTES, differences, observed_reading

pytestmark = pytest.mark.core


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "2_Dense").mkdir(parents=True)
    (path / "modules.json").write_text("[]")
    (path / "2_Dense" / "config.json").write_text("{}")
    return path


def read(model: Path, *paths: Path) -> dict[str, str]:
    with observed_reading(model) as reading:
        for path in paths:
            path.read_bytes()
    return reading.files()


class TestReading:
    def test_files_below_the_checkpoint_have_relative_names(self, model: Path) -> None:
        found = read(model, model / "modules.json", model / "2_Dense" / "config.json")
        assert list(found) == ["2_Dense/config.json", "modules.json"]

    @pytest.mark.parametrize("name", ["scales.json", "factor.pt", "factor.pth"])
    def test_files_elsewhere_have_full_names(self, model: Path, tmp_path: Path, name: str) -> None:
        """A flag or hf_overrides named one, or the model's code."""
        (tmp_path / name).write_text("1")
        assert list(read(model, tmp_path / name)) == [str(tmp_path / name)]

    def test_files_of_the_hub_are_named_wherever_the_cache_is(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each container may have it elsewhere."""
        first, second = tmp_path / "one" / "hub", tmp_path / "two" / "hub"
        (first / "models--o--m" / "snapshots" / "a").mkdir(parents=True)
        (first / "models--o--m" / "snapshots" / "a" / "x.json").write_text("1")
        shutil.copytree(first, second)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(first))
        found = read(model, first / "models--o--m" / "snapshots" / "a" / "x.json")
        assert list(found) == ["hub:models--o--m/snapshots/a/x.json"]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(second))
        shutil.rmtree(first)
        assert differences(found, model) == []

    def test_the_machines_and_pythons_are_not_the_models(self, model: Path) -> None:
        assert read(model, Path("/proc/self/stat"), Path("/etc/hostname"), Path(json.__file__)) == {}

    def test_what_is_written_or_gone_is_not_read(self, model: Path) -> None:
        """Caches that the process makes itself, and temporary files."""
        with observed_reading(model) as reading:
            for name in ("cache", "gone"):
                (model / name).write_text("1")
                (model / name).read_text()
            (model / "gone").unlink()
            (model / "left").touch()
        assert reading.files() == {}

    def test_large_weights_are_left_to_others(self, model: Path) -> None:
        with (model / "model.bin").open("wb") as file:
            file.truncate(LARGEST_BYTES + 1)
        with observed_reading(model) as reading, (model / "model.bin").open("rb"):
            pass
        assert reading.files() == {}

    @pytest.mark.parametrize("name", ["model/lookup.table", "projector.bin"])
    def test_other_large_files_are_compared(self, model: Path, tmp_path: Path, name: str) -> None:
        """Nobody else knows weights beside the checkpoint, or what has another suffix."""
        with (tmp_path / name).open("wb") as file:
            file.truncate(LARGEST_BYTES + 1)
        with observed_reading(model) as reading, (tmp_path / name).open("rb"):
            pass
        found = reading.files()
        assert differences(found, model) == []
        with (tmp_path / name).open("r+b") as file:
            file.write(b"1")
        assert len(found) == len(differences(found, model)) == 1

    def test_whoever_opens_is_seen(self, model: Path) -> None:
        """Other threads, NumPy, PyTorch and `os.open` go through the interpreter, too."""
        np.save(model / "a.npy", np.ones(2))
        torch.save({}, model / "b.bin")
        with observed_reading(model) as reading:
            np.load(model / "a.npy")
            torch.load(model / "b.bin", weights_only=True)
            os.close(os.open(os.fsencode(model / "modules.json"), os.O_RDONLY))
            other = threading.Thread(target=(model / "2_Dense" / "config.json").read_text)
            other.start()
            other.join()
        (model / "late").write_text("1")
        (model / "late").read_text()
        assert list(reading.files()) == ["2_Dense/config.json", "a.npy", "b.bin", "modules.json"]

    def test_a_tokenizer_is_seen_whole(self, model: Path) -> None:
        """Rust reads tokenizer.json without the interpreter."""
        for name in ("tokenizer_config.json", "tokenizer.json"):
            (model / name).write_text("{}")
        assert list(read(model, model / "tokenizer_config.json")) == ["tokenizer.json", "tokenizer_config.json"]

    def test_two_observe_at_once(self, model: Path) -> None:
        with observed_reading(model) as outer:
            inner = read(model, model / "modules.json")
        assert inner == outer.files()

    def test_a_process_that_observes_nothing_has_no_hook(self) -> None:
        """A hook is for ever, and is called at each import."""
        code = (
            "import sys; hooks = []; sys.addaudithook = hooks.append\n"
            "from vllm_companion_plugin.engine.identity import reading; assert not hooks\n"
            "from pathlib import Path\n"
            "for _ in range(2):\n"
            "    with reading.observed_reading(Path('/tmp')): pass\n"
            "assert len(hooks) == 1"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=100)

    def test_it_costs_nothing_while_nobody_observes(self, model: Path) -> None:
        with observed_reading(model):
            pass
        assert timeit.timeit(lambda: sys.audit("import", "x"), number=10_000) / 10_000 < 20e-6


class TestDifferences:
    def test_a_copy_has_none(self, model: Path, tmp_path: Path) -> None:
        found = read(model, model / "modules.json")
        assert differences(found, Path(shutil.copytree(model, tmp_path / "copy"))) == []

    def test_each_is_told_with_both_values(self, model: Path, tmp_path: Path) -> None:
        found = read(model, model / "modules.json", model / "2_Dense" / "config.json")
        other = Path(shutil.copytree(model, tmp_path / "copy"))
        (other / "modules.json").unlink()
        (other / "2_Dense" / "config.json").write_text("{} ")
        here = read(other, other / "2_Dense" / "config.json")["2_Dense/config.json"]
        dense, modules = found["2_Dense/config.json"], found["modules.json"]
        assert differences(found, other) == [
            f"2_Dense/config.json has content {dense[:16]} there and {here[:16]} here",
            f"modules.json has content {modules[:16]} there and is absent here",
        ]

    def test_a_single_file_is_beside_the_others(self, model: Path) -> None:
        """GGUF."""
        (model / "m.gguf").write_text("x")
        with observed_reading(model / "m.gguf") as reading:
            (model / "modules.json").read_text()
        assert list(reading.files()) == ["modules.json"]
        assert differences(reading.files(), model / "m.gguf") == []

    def test_names_from_another_process_hang_nobody(self, model: Path) -> None:
        os.mkfifo(model / "pipe")
        assert len(differences({"pipe": "0" * 64, "\0": "0" * 64, "/dev/zero": "0" * 64}, model)) == 3
