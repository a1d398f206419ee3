"""Which files a process reads, as who loads notes them and who attaches compares them."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import importlib.metadata
import importlib.util
import json
import linecache
import os
import pkgutil
import runpy
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.model_executor.model_loader import weight_utils

from vllm_companion_plugin.engine.identity import code, places
from vllm_companion_plugin.engine.identity.reading import ABSENT, LARGEST_BYTES, differences, observed_reading
from vllm_companion_plugin.engine.vllm.threads import Threads
from vllm_companion_plugin.errors import NotShareableError

pytestmark = pytest.mark.core


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "2_Dense").mkdir(parents=True)
    (path / "modules.json").write_text("[]")
    (path / "2_Dense" / "config.json").write_text("{}")
    return path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which Python imports modules, whose names begin with oot_."""
    (tmp_path / "path").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path"), *sys.path])
    importlib.invalidate_caches()
    yield tmp_path / "path"
    forget()


def forget() -> None:
    """As in another process."""
    for name in [name for name in sys.modules if name.startswith("oot_")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


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
        assert read(model, Path("/proc/self/stat"), Path("/sys/kernel/uevent_seqnum"), Path(json.__file__)) == {}

    @pytest.mark.parametrize("place", ["/dev/shm", "/var/tmp"])
    def test_folders_of_the_system_count_if_the_models_code_reads_there(self, model: Path, place: str) -> None:
        """An administrator mounts a file for it in /etc, say. What vLLM or a package reads there is no model's."""
        with tempfile.NamedTemporaryFile(dir=place) as file:
            assert [*read(model, Path(file.name))] == [file.name]
            with observed_reading(model) as reading:
                exec(compile(f"open({file.name!r})", weight_utils.__file__, "exec"))
            assert reading.files() == {}

    def test_code_of_a_text_is_not_vllms_wherever_the_process_is(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(places.vllm())
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            with observed_reading(model) as reading:
                exec(compile(f"open({file.name!r})", "<in vLLM's folder>", "exec"))
            assert [*reading.files()] == [file.name]

    def test_of_folders_of_the_system_what_a_thread_of_the_load_reads_counts(self, model: Path) -> None:
        """It may run nothing but functions of packages. Threads that the load has not begun are a package's own."""
        with (
            tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".npy") as file,
            ThreadPoolExecutor(1) as executor,
            observed_reading(model) as reading,
        ):
            np.save(file, np.ones(2))
            file.flush()
            executor.submit(np.load, file.name).result()
            assert reading.files() == {}
            with Threads().followed():
                executor.submit(np.load, file.name).result()
            assert [*reading.files()] == [file.name]

    def test_what_says_which_machine_it_is_does_not_count(self, model: Path) -> None:
        """It is another one in each pod. The like of it does."""
        files = [f"/etc/{name}" for name in ("hosts", "hostname", "resolv.conf", "os-release")]
        assert read(model, *(Path(name) for name in files if os.path.exists(name))) == {}
        assert not any(map(places.is_systems, [*files, "/run/secrets/token", "/etc/ssl/certs/ca.pem"]))
        assert all(map(places.is_systems, ["/etc/hosts.json", "/etc/model/hosts", "/run/secrets-of-a-model"]))

    def test_what_is_written_or_gone_is_not_read(self, model: Path) -> None:
        """Caches that the process makes itself, and temporary files."""
        with observed_reading(model) as reading:
            for name in ("cache", "gone"):
                (model / name).write_text("1")
                (model / name).read_text()
            (model / "gone").unlink()
            (model / "left").touch()
        assert reading.files() == {}

    def test_what_is_opened_to_write_and_only_read_counts(self, model: Path) -> None:
        """So does `numpy.memmap` by default. A file that was changed that way is a cache of the process."""
        for name in ("table", "cache"):
            np.arange(4).tofile(model / name)
        with observed_reading(model) as reading:
            assert np.memmap(model / "table", dtype=np.int64)[1] == 1
            with (model / "cache").open("r+b") as file:
                file.write(b"changed, and longer than it was before, by some bytes")
        assert [*reading.files()] == ["table"]

    def test_what_was_asked_for_and_was_not_there(self, model: Path, tmp_path: Path) -> None:
        """It would have been read. An engine that has it is another one; so is one that has lost it."""
        missing = [model / "scales.json", tmp_path / "factors.json"]
        with observed_reading(model) as reading:
            for path in missing:
                with pytest.raises(FileNotFoundError):
                    path.read_bytes()
        found = reading.files()
        assert found == {"scales.json": "absent", str(tmp_path / "factors.json"): "absent"}
        assert differences(found, model) == []
        missing[0].write_text("1")
        (told,) = differences(found, model)
        assert told.startswith("scales.json is absent there and has content ")

    @pytest.mark.parametrize(
        "how", ["in place", "replaced", "by a link", "made", "deleted", "moved", "between two looks"]
    )
    def test_what_changes_meanwhile_cannot_be_named(self, model: Path, how: str) -> None:
        """The model has the old content, and whoever attaches would compare the new one."""
        path = model / "2_Dense" / "config.json"
        other = model / "other.json"
        other.write_text("[]")  # before, and of the same size
        if how == "made":
            path.unlink()
        elif how == "by a link":
            path.unlink()
            path.symlink_to(model / "modules.json")
        with observed_reading(model) as reading:
            with contextlib.suppress(FileNotFoundError):
                path.read_bytes()
            # By another process, whose opening nobody here hears.
            script = {
                "in place": f"echo 1 > {path}",
                "replaced": f"mv {other} {path}",
                "by a link": f"ln -sf {other} {path}",
                "made": f"cp {other} {path}",
                "deleted": f"rm {path}",
                "moved": f"mv {path.parent} {model}/moved",
                "between two looks": f"cp {path} {model}/kept; echo 1 > {path}",
            }[how]
            subprocess.run(["sh", "-c", script], check=True)
            if how == "between two looks":
                path.read_bytes()
                subprocess.run(["cp", model / "kept", path], check=True)
        with pytest.raises(NotShareableError, match=r"2_Dense/config\.json changed while the model was loaded"):
            reading.files()

    def test_what_is_there_for_a_moment_alone_keeps_nobody_from_sharing(self, model: Path) -> None:
        """Such as what a program that the model calls leaves in the directory of temporary files."""
        with observed_reading(model) as reading, tempfile.TemporaryDirectory(dir="/tmp") as place:
            subprocess.run(["cp", model / "modules.json", f"{place}/made"], check=True)
            Path(place, "made").read_bytes()
            subprocess.run(["rm", f"{place}/made"], check=True)
        gone = {name: text for name, text in reading.files().items() if name.endswith("/made")}
        assert set(gone.values()) <= {ABSENT}

    def test_what_was_made_before_it_was_read_counts(self, model: Path) -> None:
        """Such as what a program that the model calls has made."""
        path = model / "made.json"
        with observed_reading(model) as reading:
            with contextlib.suppress(FileNotFoundError):
                path.read_bytes()
            subprocess.run(["cp", model / "modules.json", path], check=True)
            path.read_bytes()
        assert "made.json" in reading.files()

    def test_what_is_written_under_another_name_is_not_read(self, model: Path) -> None:
        """So that nobody ever sees a part of it."""
        (model / "there").write_text("1")
        with observed_reading(model) as reading:
            (model / "new").write_text("1")
            (model / "new").replace(model / "cache")
            (model / "cache").read_text()
            with pytest.raises(FileNotFoundError):
                (model / "new").rename(model / "there")
            (model / "there").read_text()
        assert [*reading.files()] == ["there"]

    def test_the_working_directory_may_be_another_one_later(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(model)
        with observed_reading(model) as reading:
            Path("modules.json").read_text()
            monkeypatch.chdir(tmp_path)
        assert [*reading.files()] == ["modules.json"]

    @pytest.mark.parametrize("kind", ["cwd", "home"])
    def test_a_file_that_a_process_finds_by_what_is_its_own(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """The file of the first engine is still there, and another engine finds another one."""
        monkeypatch.setenv("HOME", "/nowhere")

        def go(place: Path) -> None:
            monkeypatch.chdir(place) if kind == "cwd" else monkeypatch.setenv("HOME", str(place))

        for name in ("one", "two", "same"):
            write(tmp_path / name / "scales.json", "2" if name == "two" else "1")
        go(tmp_path / "one")
        found = read(model, tmp_path / "one" / "scales.json")
        assert [*found] == [f"{tmp_path}/one/scales.json", f"{kind}:scales.json"]
        for name, count in (("one", 0), ("same", 0), ("two", 1)):
            go(tmp_path / name)
            assert len(differences(found, model)) == count

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

    def test_a_database_and_a_library_count(self, model: Path) -> None:
        """C opens them; Python says that it asks for that."""
        with contextlib.closing(sqlite3.connect(model / "table.db")) as made:
            made.execute("create table scales (scale)")
        (model / "made.so").write_bytes(b"no library")
        with observed_reading(model) as reading:
            sqlite3.connect(model / "table.db").close()
            sqlite3.connect(f"file:{model / 'table.db'}?mode=ro", uri=True).close()
            sqlite3.connect(":memory:").close()
            ctypes.CDLL("libc.so.6")
            with pytest.raises(OSError, match="made"):
                ctypes.CDLL(str(model / "made.so"))
        assert [*reading.files()] == ["made.so", "table.db"]

    def test_a_tokenizer_is_seen_whole(self, model: Path) -> None:
        """Rust reads tokenizer.json without the interpreter."""
        for name in ("tokenizer_config.json", "tokenizer.json"):
            (model / name).write_text("{}")
        assert list(read(model, model / "tokenizer_config.json")) == ["tokenizer.json", "tokenizer_config.json"]

    def test_a_name_that_is_no_text_is_escaped(self, model: Path, tmp_path: Path) -> None:
        """A manifest is text, and a path is bytes."""
        path = os.fsencode(model / "scales") + b"\xff%"
        (model / "bytes:a").write_text("1")
        Path(os.fsdecode(path)).write_text("1")
        found = read(model, Path(os.fsdecode(path)), model / "bytes:a")
        assert [*found] == ["bytes:bytes:a", "bytes:scales%FF%25"]
        assert differences(found, model) == []
        Path(os.fsdecode(path)).write_text("2")
        assert [text.split(" has ")[0] for text in differences(found, model)] == ["bytes:scales%FF%25"]

    def test_a_checkpoint_behind_a_link(self, model: Path, tmp_path: Path) -> None:
        """Code may ask where the link leads, and another engine may start when it leads elsewhere."""
        other = Path(shutil.copytree(model, tmp_path / "other"))
        (tmp_path / "latest").symlink_to(model)
        found = read(tmp_path / "latest", model / "modules.json")
        assert [*found] == ["modules.json"]
        (other / "modules.json").write_text("[1]")
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to(other)
        assert len(differences(found, tmp_path / "latest")) == 1

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
        times_s = timeit.repeat(lambda: sys.audit("import", "x"), number=1000, repeat=20)
        assert min(times_s) / 1000 < 20e-6


DRIVER = """#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "oot_driver", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_oot_driver(void) { return PyModule_Create(&module); }
"""


class TestOpeners:
    """In folders of caches, and code: what counts is who reads it."""

    @pytest.fixture
    def hidden(self, tmp_path: Path) -> Path:
        path = tmp_path / ".mine" / "scales.json"
        path.parent.mkdir()
        path.write_text("{}")
        return path

    def test_what_the_models_code_reads_counts(self, model: Path, hidden: Path) -> None:
        assert list(read(model, hidden)) == [str(hidden)]

    @pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "TRITON_CACHE_DIR"])
    def test_a_folder_of_caches_need_not_be_hidden(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        monkeypatch.setenv(variable, str(tmp_path / "caches"))
        file = tmp_path / "caches" / "model.safetensors.index.json"
        file.parent.mkdir()
        file.write_text('{"weight_map": {}}')
        with observed_reading(model) as reading:
            weight_utils.filter_duplicate_safetensors_files([], str(file.parent), file.name)
        assert reading.files() == {}
        assert list(read(model, file)) == [str(file)]

    @pytest.mark.parametrize("how", [np.load, torch.load, lambda path: shutil.copyfile(path, f"{path}.copy")])
    def test_libraries_read_for_whoever_calls_them(
        self, model: Path, hidden: Path, how: Callable[[Path], object]
    ) -> None:
        if how is np.load:
            np.save(hidden.open("wb"), np.ones(2))
        else:
            torch.save({}, hidden)
        with observed_reading(model) as reading:
            how(hidden)
        assert list(reading.files()) == [str(hidden)]

    def test_in_a_thread_nobody_knows_who_called_a_library(self, model: Path, hidden: Path) -> None:
        np.save(hidden.open("wb"), np.ones(2))
        with observed_reading(model) as reading, ThreadPoolExecutor(1) as threads:
            threads.submit(np.load, hidden).result()
        assert list(reading.files()) == [str(hidden)]

    def test_a_key_to_the_hub_is_never_noted(self, model: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(hidden))
        places._no_models.cache_clear()
        assert read(model, hidden) == {}
        places._no_models.cache_clear()

    def test_what_vllm_reads_does_not_count(self, model: Path, hidden: Path) -> None:
        hidden.write_text('{"weight_map": {}}')
        with observed_reading(model) as reading:
            weight_utils.filter_duplicate_safetensors_files([], str(hidden.parent), hidden.name)
        assert reading.files() == {}

    def test_what_a_compiler_keeps_does_not_count(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other machines have compiled other things."""
        cache = pytest.importorskip("triton.runtime.cache")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / ".triton"))
        kept = cache.get_cache_manager("a" * 64)
        kept.put_group("kernel.json", {"kernel.json": kept.put("{}", "kernel.json")})
        with observed_reading(model) as reading:
            assert cache.get_cache_manager("a" * 64).get_group("kernel.json")
        assert reading.files() == {}

    def test_a_module_that_a_compiler_keeps_does_not_count(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As Triton's driver, which each process loads when it first runs a kernel."""
        build = pytest.importorskip("triton.runtime.build")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / ".triton"))
        made = f"from triton.runtime import build; build.compile_module_from_src({DRIVER!r}, 'oot_driver')"
        subprocess.run([sys.executable, "-c", made], check=True)
        with observed_reading(model) as reading:
            build.compile_module_from_src(DRIVER, "oot_driver")
        assert str(sys.modules["oot_driver"].__file__).startswith(str(tmp_path))
        assert reading.files() == {}
        forget()

    @pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "NUMBA_CACHE_DIR"])
    def test_compilers_may_keep_it_anywhere(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        monkeypatch.setenv(variable, str(tmp_path / "kept"))
        write(tmp_path / "kept" / "build.ninja", '{"weight_map": {}}')
        with observed_reading(model) as reading:
            weight_utils.filter_duplicate_safetensors_files([], str(tmp_path / "kept"), "build.ninja")
        assert reading.files() == {}

    def test_what_python_asks_of_a_project_in_development_does_not_count(self, model: Path, path: Path) -> None:
        """As Numba and Inductor do, which look for plugins of theirs."""
        write(path / "oot.egg-info" / "PKG-INFO", "Name: oot\n")
        write(path / "oot.egg-info" / "entry_points.txt", "[oot]\n")
        with observed_reading(model) as reading:
            importlib.metadata.entry_points()
        assert not [name for name in reading.files() if "egg-info" in name]
        assert list(read(model, path / "oot.egg-info" / "entry_points.txt"))

    def test_code_counts_where_it_is_read_and_not_imported(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("recipe.py", "shown.py"):
            (tmp_path / name).write_text("SCALE = 2\n")
        with observed_reading(model) as reading:
            runpy.run_path(str(tmp_path / "recipe.py"))
            assert linecache.getlines(str(tmp_path / "shown.py"))
        assert list(reading.files()) == [str(tmp_path / "recipe.py")]

    def test_what_packages_read_on_their_import_is_theirs(self, model: Path, hidden: Path, path: Path) -> None:
        place = path / "site-packages"
        write(place / "oot_installed.py", f"open({str(hidden)!r}).close()\n")
        sys.path.insert(0, str(place))
        with observed_reading(model) as reading:
            importlib.import_module("oot_installed")
        assert reading.files() == {}

    def test_a_model_may_be_installed(self, model: Path, hidden: Path, path: Path) -> None:
        """The key names the files of its package."""
        place = path / "site-packages"
        write(place / "oot_model.py", "class Model:\n    def load(self, path):\n        open(path).close()\n")
        sys.path.insert(0, str(place))
        made = importlib.import_module("oot_model").Model
        code.fields(made)
        with observed_reading(model) as reading, ThreadPoolExecutor(1) as threads:
            threads.submit(made().load, str(hidden)).result()
        assert list(reading.files()) == [str(hidden)]


class TestModules:
    """What code of the model imports while it loads, and no key has named."""

    def imported(self, model: Path, name: str) -> dict[str, str]:
        with observed_reading(model) as reading:
            importlib.import_module(name)
        return reading.files()

    def test_they_are_compared(self, model: Path, path: Path) -> None:
        write(path / "oot_late.py", "SCALE = 1\n")
        found = self.imported(model, "oot_late")
        assert list(found) == ["package:oot_late.py"]
        assert differences(found, model) == []
        write(path / "oot_late.py", "SCALE = 2\n")
        assert len(differences(found, model)) == 1

    def test_each_engine_may_have_them_elsewhere(self, model: Path, path: Path, tmp_path: Path) -> None:
        """Also their data; who compares imports nothing."""
        write(path / "oot_late" / "__init__.py", "")
        write(
            path / "oot_late" / "of.py",
            "from pathlib import Path\nPath(__file__, '../scales/of.json').resolve().read_text()\n",
        )
        write(path / "oot_late" / "scales" / "of.json", "1")
        found = self.imported(model, "oot_late.of")
        names = ["package:oot_late/__init__.py", "package:oot_late/of.py", "package:oot_late/scales/of.json"]
        assert list(found) == names
        forget()
        assert differences(found, model) == []
        path.rename(tmp_path / "other")
        assert len(differences(found, model)) == 3
        sys.path.insert(0, str(tmp_path / "other"))
        assert differences(found, model) == []
        assert not any(name.startswith("oot_") for name in sys.modules)
        write(tmp_path / "other" / "oot_late" / "scales" / "of.json", "2")
        assert len(differences(found, model)) == 1

    def test_by_a_path(self, model: Path, tmp_path: Path) -> None:
        """Under a name by which nobody else would find it."""
        file = tmp_path / "helpers" / "oot_helper.py"
        write(file, "SCALE = 1\n")
        spec = importlib.util.spec_from_file_location("oot_helper", file)
        assert spec is not None
        assert spec.loader is not None
        with observed_reading(model) as reading:
            sys.modules["oot_helper"] = made = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(made)
        found = reading.files()
        assert list(found) == [str(file)]
        forget()
        assert differences(found, model) == []

    def test_in_a_folder_without_init(self, model: Path, path: Path) -> None:
        write(path / "oot_space" / "late.py", "")
        found = self.imported(model, "oot_space.late")
        assert list(found) == ["package:oot_space/late.py"]
        forget()
        assert differences(found, model) == []

    def test_those_of_python_and_of_packages_with_versions_are_not(self, model: Path, path: Path) -> None:
        sys.modules.pop("this", None)
        write(path / "site-packages" / "oot_late.py", "import this\n")
        sys.path.insert(0, str(path / "site-packages"))
        assert self.imported(model, "oot_late") == {}

    def test_packages_may_be_installed_anywhere(self, model: Path, path: Path) -> None:
        """As by `pip install --target`."""
        write(path / "oot_late.py", "")
        assert self.imported(model, "oot_late") != {}
        forget()
        write(path / "oot_late-1.0.dist-info" / "RECORD", "oot_late.py,,\n")
        sys.path.append("")  # another process would look anew
        assert self.imported(model, "oot_late") == {}


LISTING: dict[str, Callable[[Path], object]] = {
    "listdir": os.listdir,
    "listdir of bytes": lambda path: os.listdir(os.fsencode(path)),
    "scandir": lambda path: [*os.scandir(path)],
    "glob": lambda path: glob.glob(f"{path}/*.safetensors"),
    "Path.glob": lambda path: [*path.glob("*.safetensors")],
    "iterdir": lambda path: [*path.iterdir()],
    "walk": lambda path: [*os.walk(path)],
    "chdir": lambda path: (os.chdir(path), os.listdir()),
}


class TestListing:
    """Files whose names come from a folder may be read by C++ or Rust, which nobody sees."""

    @pytest.fixture
    def extra(self, tmp_path: Path) -> Path:
        path = tmp_path / "extra"
        path.mkdir()
        save_file({"a": torch.ones(2)}, path / "a.safetensors")
        (path / "notes.txt").write_text("1")
        (path / ".hidden").touch()
        return path

    @pytest.mark.parametrize("how", LISTING)
    def test_a_folder_counts_with_its_weights(
        self, model: Path, extra: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        monkeypatch.chdir(model)
        with observed_reading(model) as reading:
            LISTING[how](extra)
            with safe_open(extra / "a.safetensors", "pt") as file:
                file.get_tensor("a")
        found = reading.files()
        assert list(found) == [f"{extra}/", f"{extra}/a.safetensors"]
        (extra / "notes.txt").write_text("2")
        (extra / ".hidden").unlink()
        assert differences(found, model) == []
        save_file({"a": torch.zeros(2)}, extra / "a.safetensors")
        assert [text.split(" has ")[0] for text in differences(found, model)] == [f"{extra}/a.safetensors"]
        (extra / "b.safetensors").touch()
        assert len(differences(found, model)) == 2
        shutil.rmtree(extra)
        assert [text.split(" and ")[1] for text in differences(found, model)] == ["is absent here"] * 2

    def test_what_is_nobodys_does_not_count(self, model: Path) -> None:
        with observed_reading(model) as reading:
            for folder in ("/proc", "/sys", os.path.dirname(torch.__file__)):
                os.listdir(folder)
        assert reading.files() == {}

    def test_folders_of_the_checkpoint_and_the_hub_count(
        self, model: Path, extra: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Code may take the newest of their files. `checkpoint` knows the weights there."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(extra))
        with observed_reading(model) as reading:
            for folder in (model, model / "2_Dense", extra):
                os.listdir(folder)
        found = reading.files()
        assert sorted(found) == ["./", "2_Dense/", "hub:./", "hub:a.safetensors"]
        assert differences(found, model) == []
        (model / "2_Dense" / "config-2.json").write_text("{}")
        (model / "scales-2.json").write_text("{}")
        assert [text.split(" has ")[0] for text in differences(found, model)] == ["./", "2_Dense/"]

    def test_a_folder_made_meanwhile_does_not_count(self, model: Path, extra: Path, tmp_path: Path) -> None:
        with observed_reading(model) as reading:
            extra.mkdir(exist_ok=True)  # it was there
            (tmp_path / "new").mkdir()
            os.listdir(extra)
            os.listdir(tmp_path / "new")
        assert [*reading.files()] == [f"{extra}/", f"{extra}/a.safetensors"]

    def test_a_folder_of_anybody_counts_with_its_weights_alone(
        self, model: Path, extra: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Others write other things there all the time."""
        monkeypatch.setattr("tempfile.tempdir", str(extra))
        with observed_reading(model) as reading:
            os.listdir(extra)
        assert [*reading.files()] == [f"{extra}/a.safetensors"]

    def test_what_importing_lists_does_not_count(
        self, model: Path, extra: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(extra)
        with observed_reading(model) as reading:
            for find in (
                lambda: importlib.import_module("oot_absent"),
                lambda: importlib.metadata.version("oot-absent"),
            ):
                with pytest.raises(ImportError):
                    find()
            assert any(True for _ in pkgutil.iter_modules())
        assert reading.files() == {}

    def test_a_folder_of_a_package_is_named_wherever_it_is(self, model: Path, path: Path) -> None:
        write(path / "oot_model" / "__init__.py", "")
        write(path / "oot_model" / "parts" / "a.bin", "1")
        importlib.import_module("oot_model")
        with observed_reading(model) as reading:
            os.listdir(path / "oot_model")
            os.listdir(path / "oot_model" / "parts")
        found = reading.files()
        assert list(found) == [f"package:oot_model/{name}" for name in ("", "parts/", "parts/a.bin")]
        assert differences(found, model) == []
        write(path / "oot_model" / "parts" / "b.bin", "1")
        assert [text.split(" has ")[0] for text in differences(found, model)] == ["package:oot_model/parts/"]


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

    def test_names_from_another_process_import_nothing(self, model: Path, path: Path) -> None:
        write(path / "oot_model" / "part" / "__init__.py", "")
        write(path / "oot_model" / "__init__.py", "")
        tops = ("", ".", "..", "oot_model.part", "oot_model.part.py", "\0", "oot_absent")
        names = [f"package:{top}{rest}" for top in tops for rest in ("", "/", "/\0", "/../oot_model/x")]
        differences(dict.fromkeys(names, "0" * 64), model)
        assert "oot_model" not in sys.modules
