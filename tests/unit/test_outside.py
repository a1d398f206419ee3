"""Code that no version identifies: whatever of it or beside it changes, the key has another field."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_companion_plugin.engine.identity import code, outside

pytestmark = pytest.mark.core


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which Python imports. What a test imports from it is gone afterwards."""
    before = set(sys.modules)
    (tmp_path / "path").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "path")
    forget_distributions()
    yield tmp_path / "path"
    for name in set(sys.modules) - before:
        if name.startswith(("oot_", "transformers_modules")):
            del sys.modules[name]
    forget_distributions()


def forget_distributions() -> None:
    """As in another process."""
    for cached in (outside._providers, outside._distribution, outside._versions):
        cached.cache_clear()
    importlib.invalidate_caches()


def fields(module: str = "oot_model") -> dict[str, str]:
    """The fields of a model of `module`, without those of vLLM."""
    model = importlib.import_module(module).Model
    return {name: text for name, text in code.fields(model).items() if name not in ("class", "code.vllm")}


def changed(path: Path, text: str, module: str = "oot_model") -> list[str]:
    """The names of the fields that are others when a file has another text, and not when it has it again."""
    before, kept = fields(module), path.read_text()
    write(path, text)
    after = fields(module)
    write(path, kept)
    assert fields(module) == before
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


MODEL = "class Model:\n    def load_weights(self, weights):\n        {}\n"


class TestImports:
    """Modules that a model imports while it loads are no less its code."""

    @pytest.mark.parametrize(
        "statement",
        [
            "import oot_helper",
            "import json, oot_helper as helper",
            "from oot_helper import SIGN",
            "import importlib; importlib.import_module('oot_helper')",
            "from importlib import import_module; import_module(name='oot_helper')",
            "__import__('oot_helper')",
        ],
    )
    def test_a_module_that_a_function_imports(self, path: Path, statement: str) -> None:
        write(path / "oot_model.py", MODEL.format(statement))
        write(path / "oot_helper.py", "SIGN = 1\n")
        assert changed(path / "oot_helper.py", "SIGN = -1\n") == ["code.oot_helper.py"]
        assert "oot_helper" not in sys.modules, "the key imports nothing"

    def test_what_it_imports_in_turn(self, path: Path) -> None:
        write(path / "oot_model.py", MODEL.format("import oot_helper"))
        write(path / "oot_helper.py", "def sign():\n    from oot_deep.er import SIGN\n")
        write(path / "oot_deep" / "__init__.py", "")
        write(path / "oot_deep" / "er.py", "SIGN = 1\n")
        assert changed(path / "oot_deep" / "er.py", "SIGN = -1\n") == ["code.oot_deep/er.py"]

    def test_a_package_of_which_a_text_has_the_name(self, path: Path) -> None:
        write(path / "oot_model.py", MODEL.format("import importlib; importlib.import_module(f'oot_parts.{weights}')"))
        write(path / "oot_parts" / "__init__.py", "")
        write(path / "oot_parts" / "one.py", "SIGN = 1\n")
        assert changed(path / "oot_parts" / "one.py", "SIGN = -1\n") == ["code.oot_parts/one.py"]

    @pytest.mark.parametrize(
        "statement",
        [
            "from .helper import SIGN",
            "from . import helper",
            "from oot_space import helper",
            "import oot_space.helper",
            "from .helper.part import SIGN",
        ],
    )
    def test_a_sibling_in_a_folder_without_init(self, path: Path, statement: str) -> None:
        """Only what is imported counts there, because the folder may be anything."""
        write(path / "oot_space" / "model.py", MODEL.format(statement))
        write(path / "oot_space" / "other.py", "")
        helper = path / "oot_space" / ("helper/__init__.py" if "part" in statement else "helper.py")
        write(helper, "SIGN = 1\n")
        name = f"code.oot_space/{helper.relative_to(path / 'oot_space')}"
        assert changed(helper, "SIGN = -1\n", "oot_space.model") == [name]
        assert changed(path / "oot_space" / "other.py", "SIGN = -1\n", "oot_space.model") == []

    @pytest.mark.parametrize("how", [("-m", "oot_app.serve"), ("oot_app/serve.py",)])
    def test_a_program_that_has_its_own_model(self, path: Path, how: tuple[str, ...]) -> None:
        """What runs by `python -m` can import its siblings by relative names."""
        write(path / "oot_app" / "__init__.py", "")
        write(path / "oot_app" / "helper.py", "")
        ask = "from vllm_companion_plugin.engine.identity import code, outside\nprint(*outside.fields(['__main__']))\n"
        write(path / "oot_app" / "serve.py", MODEL.format("from . import helper") + ask)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, *how], cwd=path, env=environment, capture_output=True, text=True, timeout=100, check=True
        )
        whole = [f"code.oot_app/{name}.py" for name in ("__init__", "helper", "serve")]
        assert done.stdout.split() == (whole if "-m" in how else ["code.serve.py"])

    def test_code_in_an_archive(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It counts as one file."""
        archive = path / "code.zip"
        for sign in (1, -1):
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("oot_model/__init__.py", MODEL.format(f"return {sign}"))
            if sign == 1:
                monkeypatch.syspath_prepend(archive)
                before = fields()
        assert [*before] == ["code.oot_model"]
        assert fields() != before

    @pytest.mark.parametrize(
        "text",
        [
            "class Unbound:\n    def __getattribute__(self, name): raise RuntimeError(name)\nUNBOUND = Unbound()\n",
            "import sys\nclass Small: __slots__ = ()\nsys.modules['oot_model.small'] = Small()\n",
            "from importlib import util as tools\n"
            "spec = tools.spec_from_file_location('oot_lazy', __path__[0] + '/lazy.py')\n"
            "spec.loader = tools.LazyLoader(spec.loader)\nLAZY = tools.module_from_spec(spec)\n"
            "spec.loader.exec_module(LAZY)\n",
        ],
        ids=["proxy", "no module", "lazy module"],
    )
    def test_what_a_module_has_that_cannot_be_asked(self, path: Path, text: str) -> None:
        write(path / "oot_model" / "__init__.py", text + MODEL.format("pass"))
        write(path / "oot_model" / "lazy.py", "raise ImportError('nobody has asked for it')\n")
        assert [*fields()] == ["code.oot_model/__init__.py", "code.oot_model/lazy.py"]

    def test_what_cannot_be_imported_is_nobodys(self, path: Path) -> None:
        write(path / "oot_model.py", MODEL.format("import oot_absent, oot_broken, os.absent; from ... import x"))
        write(path / "oot_broken.py", "def")
        assert [*fields()] == ["code.oot_broken.py", "code.oot_model.py"]


class TestInstalled:
    """The version of an installed package identifies it."""

    @pytest.fixture
    def installed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A package `oot_scaler` of the distribution "oot-scales", which a model imports while it loads."""
        write(path / "oot_model.py", MODEL.format("from oot_scaler.of import scale"))
        place = path.parent / "lib" / "site-packages"
        write(place / "oot_scaler" / "__init__.py", "")
        write(place / "oot_scaler" / "of.py", "def scale(): ...\n")
        self.of_version(place, "1.0")
        monkeypatch.syspath_prepend(place)
        return place

    def of_version(self, place: Path, version: str) -> None:
        info = place / "oot_scales.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: oot-scales\nVersion: {version}\n")
        write(info / "RECORD", "oot_scaler/__init__.py,,\noot_scaler/of.py,,\n")
        write(info / "top_level.txt", "oot_scaler\n")
        forget_distributions()

    def test_another_version_is_another_key(self, installed: Path) -> None:
        assert fields()["version.oot-scales"] == "1.0"
        assert "code.oot_scaler/of.py" not in fields()
        self.of_version(installed, "1.1")
        assert fields()["version.oot-scales"] == "1.1"

    def test_into_any_folder(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As by `pip install --target`."""
        write(path / "oot_model.py", MODEL.format("from oot_scaler.of import scale"))
        write(path / "oot_scaler" / "__init__.py", "")
        self.of_version(path, "1.0")
        assert sorted(fields()) == ["code.oot_model.py", "version.oot-scales"]

    @pytest.mark.parametrize("how", ["editable", "egg-info"])
    def test_sources_have_a_version_that_says_nothing(self, path: Path, installed: Path, how: str) -> None:
        """Somebody works on them."""
        (installed / "oot_scaler").rename(path / "oot_scaler")
        if how == "egg-info":
            (installed / "oot_scales.dist-info").rename(path / "oot_scales.egg-info")
            (path / "oot_scales.egg-info" / "METADATA").rename(path / "oot_scales.egg-info" / "PKG-INFO")
            (path / "oot_scales.egg-info" / "RECORD").unlink()
            forget_distributions()
        assert changed(path / "oot_scaler" / "of.py", "def scale(): return 2\n") == ["code.oot_scaler/of.py"]

    def test_without_a_version_its_files_count(self, installed: Path) -> None:
        for file in (installed / "oot_scales.dist-info").iterdir():
            file.unlink()
        (installed / "oot_scales.dist-info").rmdir()
        forget_distributions()
        assert changed(installed / "oot_scaler" / "of.py", "def scale(): return 2\n") == ["code.oot_scaler/of.py"]

    def test_a_plugin_may_be_made_anew_under_its_old_version(self, installed: Path) -> None:
        write(installed / "oot_scaler" / "of.py", MODEL.format("import oot_scaler"))
        assert changed(installed / "oot_scaler" / "__init__.py", "SIGN = -1\n", "oot_scaler.of") == [
            "code.oot_scaler/__init__.py"
        ]

    def test_numpy_counts_if_code_outside_vllm_uses_it(self, path: Path) -> None:
        import numpy

        write(path / "oot_model.py", MODEL.format("import numpy as np"))
        assert fields()["version.numpy"] == numpy.__version__

    def test_packages_that_vllms_own_model_imports(self) -> None:
        """Terratorch builds the modules of its models."""
        from importlib import metadata

        from vllm.model_executor.models import qwen2_5_vl

        assert code.fields(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration)["version.einops"] == metadata.version(
            "einops"
        )


class TestData:
    """What code reads beside it, when it is imported or later."""

    @pytest.mark.parametrize("name", ["scales.json", "tables/one.npy", "names.txt", "_C.so", "tables/deep/er/x"])
    def test_files_in_a_package(self, path: Path, name: str) -> None:
        write(path / "oot_model" / "__init__.py", MODEL.format("pass"))
        write(path / "oot_model" / name, "1")
        assert changed(path / "oot_model" / name, "2") == [f"data.oot_model/{name}"]

    @pytest.mark.parametrize("name", ["__pycache__/model.cpython-311.pyc", ".git/index", ".cache", "sub/.hidden/x"])
    def test_what_tools_keep_in_a_package_is_no_data(self, path: Path, name: str) -> None:
        write(path / "oot_model" / "__init__.py", MODEL.format("pass"))
        write(path / "oot_model" / name, "1")
        assert changed(path / "oot_model" / name, "2") == []

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("'scales.json'", "scales.json"),
            ("'tables', 'scales.json'", "tables/scales.json"),
            ("'../beside/scales.json'", "../beside/scales.json"),
            ("'*.json'", "scales.json"),
            ("'tables/**/*.npy'", "tables/a/b.npy"),
            ("f'scales_{weights}.json'", "scales_0.json"),
            ("__file__.replace('.py', '.json')", "oot_model.json"),
            ("'tables'", "tables/any"),
        ],
    )
    def test_files_that_a_module_names(self, path: Path, text: str, name: str) -> None:
        """A module that is one file may lie anywhere, so other files there do not count."""
        write(path / "oot_model.py", MODEL.format(f"open({text})"))
        write(path / name, "1")
        write(path / "other.json5", "1")
        assert changed(path / name, "2") == [f"data.{name}"]
        assert changed(path / "other.json5", "2") == []

    def test_beside_a_module_in_a_folder_without_init(self, path: Path) -> None:
        write(path / "oot_space" / "model.py", MODEL.format("open('scales.json')"))
        write(path / "oot_space" / "scales.json", "1")
        assert changed(path / "oot_space" / "scales.json", "2", "oot_space.model") == ["data.oot_space/scales.json"]

    @pytest.mark.parametrize(
        "text", ["'.', '..', '/', '*', './', '**', '~', ''", "'oot_model.py', '\\0', 'a\\nb', '[', '//'"]
    )
    def test_texts_that_name_no_data(self, path: Path, text: str) -> None:
        write(path / "oot_model.py", MODEL.format(f"print({text})"))
        write(path / "other.json", "1")
        assert [*fields()] == ["code.oot_model.py"]

    @pytest.mark.parametrize("kind", ["file", "folder", "home"])
    def test_files_that_any_code_names_in_full(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        place = tmp_path / ".mine" / "scales.json"
        text = {"file": f"'{place}'", "folder": f"'{place.parent}', 'scales.json'", "home": "'~/.mine/scales.json'"}
        write(path / "oot_model" / "__init__.py", MODEL.format(f"open({text[kind]})"))
        write(place, "1")
        assert changed(place, "2") == [f"data.{place}"]

    @pytest.mark.parametrize("kind", ["file", "folder", "home", "list"])
    def test_files_that_a_variable_names_in_full(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """Rust or C++ may read them, which nothing sees."""
        monkeypatch.setenv("HOME", str(tmp_path))
        place = tmp_path / "a-name-that-is-too-long-to-be-shown" / "scales.safetensors"
        text = {"file": place, "folder": place.parent, "home": f"~/{place.parent.name}", "list": f"/none:{place}"}
        code = "import os; safe_open(os.path.join(os.environ['OOT_SCALES'], 'scales.safetensors'))"
        write(path / "oot_model.py", MODEL.format(code))
        write(place, "1")
        monkeypatch.setenv("OOT_SCALES", str(text[kind]))
        assert changed(place, "2") == [f"data.{place}"]

    @pytest.mark.parametrize("folder", ["/", "~", "{temporary}"])
    def test_a_pattern_in_a_folder_of_anybody_names_no_data(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
    ) -> None:
        """Other processes write there: each engine would have another key."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        depth = "*/" * (len(tmp_path.parts) - 1) if folder == "/" else ""
        folder = folder.format(temporary=tmp_path)
        write(path / "oot_model.py", MODEL.format(f"open({folder!r}), open('{depth}*.oot'), open('named.txt')"))
        write(tmp_path / "some.oot", "1")
        assert [*fields()] == ["code.oot_model.py"]
        if folder != "/":  # a name is no pattern
            write(tmp_path / "named.txt", "1")
            assert [*fields()] == ["code.oot_model.py", f"data.{tmp_path}/named.txt"]

    def test_values_side_by_side_are_no_folders(self, path: Path) -> None:
        write(path / "oot_model.py", MODEL.format("open(f'{weights}{self}/scales.json')"))
        write(path / "a" / "scales.json", "1")
        write(path / "a" / "b" / "scales.json", "1")
        assert [*fields()] == ["code.oot_model.py", "data.a/scales.json"]

    def test_links_that_make_a_folder_endless(self, path: Path) -> None:
        write(path / "oot_model.py", MODEL.format("open('tables/**/one.json'), open('tables/**')"))
        write(path / "tables" / "a" / "one.json", "1")
        for name in ("left", "right"):
            (path / "tables" / name).symlink_to(".")
        assert [*fields()] == ["code.oot_model.py", "data.tables/a/one.json"]

    def test_files_that_come_and_go(self, path: Path) -> None:
        write(path / "oot_model" / "__init__.py", MODEL.format("pass"))
        write(path / "oot_model" / "scales.json", "1")
        expected, ended = fields(), threading.Event()

        def come_and_go() -> None:
            while not ended.is_set():
                write(path / "oot_model" / "lock", "")
                (path / "oot_model" / "lock").unlink()

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(300):
                found = fields()
                assert {name: found[name] for name in expected} == expected
        finally:
            ended.set()
            thread.join()

    @pytest.mark.parametrize("value", [b"\xff", b"host=db;user=me;pass=it"], ids=["no text", "secret"])
    def test_a_variable_that_cannot_be_shown(self, path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes) -> None:
        """Keys are in logs. Such a value counts all the same."""
        write(path / "oot_model.py", MODEL.format("import os; os.environ['OOT_DATABASE']"))
        monkeypatch.setenv("OOT_DATABASE", os.fsdecode(value))
        first = fields()["env.OOT_DATABASE"]
        assert len(first) == 16
        assert first.isalnum()
        monkeypatch.setenv("OOT_DATABASE", os.fsdecode(value + b"."))
        assert fields()["env.OOT_DATABASE"] != first

    def test_a_variable_is_shown_as_it_is(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(path / "oot_model.py", MODEL.format("import os; os.environ['OOT_KERNEL']"))
        monkeypatch.setenv("OOT_KERNEL", "flash_attention,v3")
        assert fields()["env.OOT_KERNEL"] == "flash_attention,v3"

    @pytest.mark.parametrize(
        ("code", "is_compared"),
        [
            ("{k: v for k, v in os.environ.items() if k.startswith('OOT_')}", True),
            ("class Settings(BaseSettings, env_prefix='oot_'): pass", True),
            ("os.getenv('OOT_' + weights)", True),
            ("os.environ[f'OOT_{weights}']", True),
            ("os.environ[f'{weights}_SCALE']", True),
            ("os.environ[f'{weights}_{weights}'], os.environ['_']", False),
            ("weights.startswith('oot_')", False),
        ],
    )
    def test_variables_of_which_code_has_a_part(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, code: str, is_compared: bool
    ) -> None:
        """Settings of a plugin have one beginning; code asks for all, or puts names together."""
        write(path / "oot_model.py", MODEL.format(f"import os; {code}" if "class" not in code else f"\n        {code}"))
        monkeypatch.setenv("OOT_SCALE", "2")
        monkeypatch.setenv("OOT_API_KEY", "secret")
        assert {name: text for name, text in fields().items() if name.startswith("env.OOT")} == (
            {"env.OOT_SCALE": "2"} if is_compared else {}
        )

    def test_what_code_writes_for_itself_is_no_data(self, path: Path) -> None:
        """Else the next engine would have another key."""
        write(path / "oot_model.py", MODEL.format("open('server.log'), open('logs')"))
        write(path / "logs" / "names.json", "{}")
        before = fields()
        for name in ("server.log", "logs/1.log", "logs/build.lock"):
            write(path / name, "a line")
        assert fields() == before
        assert "data.logs/names.json" in before

    def test_files_of_the_machine_are_no_data(self, path: Path) -> None:
        write(
            path / "oot_model.py", MODEL.format("open('/proc/meminfo'), open('/etc/hostname'), open('/etc', 'passwd')")
        )
        assert [*fields()] == ["code.oot_model.py"]

    def test_much_data_is_not_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(path / "oot_model" / "__init__.py", MODEL.format("pass"))
        write(path / "oot_model" / "table", "1" * 100)
        monkeypatch.setattr(outside, "_MOST_READ_BYTES", 99)
        before = fields()
        assert not outside.has_read(str(path / "oot_model" / "table"))
        write(path / "oot_model" / "table", "2" * 100)
        assert [name for name, text in fields().items() if before[name] != text] == ["data.oot_model/table"]

    @pytest.mark.parametrize(
        ("folders", "field", "text"),
        [(1, "data.oot_model/0", "41 files "), (41, "data.oot_model", "1681 files ")],
    )
    def test_many_files_are_few_fields(self, path: Path, folders: int, field: str, text: str) -> None:
        write(path / "oot_model" / "__init__.py", MODEL.format("pass"))
        for number in range(41 * folders):
            write(path / "oot_model" / str(number // 41) / f"{number % 41}.json", "1")
        assert fields()[field].startswith(text)
        assert changed(path / "oot_model" / "0" / "7.json", "2") == [field]

    def test_names_that_cannot_be_printed(self, path: Path) -> None:
        write(path / "oot_model" / "__init__.py", MODEL.format("pass"))
        write(path / "oot_model" / "a\nb", "1")
        assert all(map(str.isprintable, fields()))
        assert len(changed(path / "oot_model" / "a\nb", "2")) == 1


def test_a_model_of_vllm_has_no_such_fields() -> None:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    providers = outside._providers.cache_info().misses
    assert {name.partition("/")[0] for name in code.fields(LlamaForCausalLM)} <= {"class", "code.vllm"}
    assert outside._providers.cache_info().misses == providers, "to find distributions by their files takes long"


def test_two_files_of_one_name_both_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of two checkpoints, of the model and of its configuration, each in its own folder."""
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    parts = [path / "transformers_modules" / name / "part.py" for name in ("oot_one", "oot_two")]
    for part in parts:
        write(part, "A = 1\n")
        write(part.parent / "model.py", MODEL.format("from .part import A"))
    modules = [importlib.import_module(f"transformers_modules.{part.parent.name}.model") for part in parts]
    found = [code.fields(*(module.Model for module in modules))]
    for part in parts:
        write(part, "A = 2\n")
        found.append(code.fields(*(module.Model for module in modules)))
    assert len({fields["code.transformers_modules/part.py"] for fields in found}) == 3
