"""Code is in the key: vLLM's, plugins' and checkpoints' files, and versions of packages."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.keys import key_of
from vllm_companion_plugin.engine.identity import code

pytestmark = pytest.mark.usefixtures("one_rank")


class TestCode:
    """Code decides bytes, too."""

    @pytest.fixture
    def plugin(self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A model of a package outside vLLM, its checkpoint in `first`."""
        package = tmp_path / "path" / "oot_model"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "model.py").write_text(
            "import oot_helper\nfrom vllm.model_executor.models.llama import LlamaForCausalLM\n\n\n"
            "class MyLlamaForCausalLM(LlamaForCausalLM):\n    pass\n"
        )
        (package / "factors.py").write_text("FACTOR = 1.0\n")
        (package.parent / "oot_helper.py").write_text("SIGN = 1\n")
        monkeypatch.syspath_prepend(package.parent)
        inherited = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{inherited}")  # vLLM inspects it in a child
        from vllm import ModelRegistry
        from vllm.model_executor.model_loader import utils
        from vllm.model_executor.models import registry

        registry._try_load_model_cls.cache_clear()
        ModelRegistry.register_model("MyLlamaForCausalLM", "oot_model.model:MyLlamaForCausalLM")
        made = json.loads((first / "config.json").read_text())
        (first / "config.json").write_text(json.dumps(made | {"architectures": ["MyLlamaForCausalLM"]}))
        yield package
        for name in ("oot_model", "oot_model.model", "oot_helper"):
            sys.modules.pop(name, None)
        utils._MODEL_ARCH_BY_HASH.clear()

    def test_a_changed_plugin_is_another_key(self, plugin: Path, first: Path) -> None:
        """Every file of its package counts, and what it uses beside it; the file is named."""
        plain = key_of(first)
        assert plain.fields["class"] == "oot_model.model.MyLlamaForCausalLM"
        (plugin / "factors.py").write_text("FACTOR = 3.0\n")
        assert [line.split(" is ")[0] for line in key_of(first).differences(plain)] == ["code.oot_model/factors.py"]
        (plugin.parent / "oot_helper.py").write_text("SIGN = -1\n")
        changed = [line.split(" is ")[0] for line in key_of(first).differences(plain)]
        assert changed == ["code.oot_helper.py", "code.oot_model/factors.py"]

    def test_variables_that_a_plugin_names_are_compared(
        self, plugin: Path, first: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its code may read them while it loads; who the process is and its secrets are no part of a model."""
        (plugin / "factors.py").write_text(
            "import os\nFACTOR = os.environ.get('FACTOR', os.environ.get('LOCAL_RANK'))\n"
        )
        for name in ("FACTOR", "LOCAL_RANK"):
            monkeypatch.setenv(name, "1")
        plain = key_of(first)
        assert plain.fields["env.FACTOR"] == "1"
        monkeypatch.setenv("LOCAL_RANK", "2")
        assert key_of(first) == plain
        monkeypatch.delenv("FACTOR")
        assert key_of(first).differences(plain) == ["env.FACTOR is '1' there and 'absent' here"]

    @pytest.mark.parametrize(
        ("name", "is_compared"),
        [
            *((name, True) for name in ("FACTOR", "down_scale", "MODEL_KEY_SCALE", "MAX_TOKENS_FACTOR", "KEYS")),
            *((name, False) for name in ("HF_TOKEN", "API_KEY", "MY_API_KEY_2", "AWS_SECRET_ACCESS_KEY")),
            *((name, True) for name in ("SVD_RANK", "CKPT_KEY", "SCORE_TOKEN", "scale.factor", "SCALE-FACTOR", "KEY")),
            *((name, False) for name in ("RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "GH_TOKEN")),
            *((name, True) for name in ("LORA_RANK", "SPECIAL_TOKEN", "CODEBOOK_KEY", "TP_WORLD_SIZE", "PP_RANK")),
            *((name, True) for name in ("IDENTITY_TOKEN", "GOOGLE_SUBWORD_TOKEN", "DP_WORLD_SIZE")),
            *(
                (name, False)
                for name in (
                    "GLOBAL_RANK",
                    "DP_RANK",
                    "OIDC_TOKEN",
                    "GOOGLE_API_KEY",
                    "GOOGLE_OAUTH_ACCESS_TOKEN",
                    "AWS_SESSION_TOKEN",
                    "VAULT_TOKEN",
                    "AZURE_STORAGE_KEY",
                )
            ),
            *((name, False) for name in ("DB_PASSWORD", "CREDENTIALS_FILE", "http_proxy", "LOCAL_RANK", "home")),
        ],
    )
    def test_whatever_a_variable_is_called(
        self, plugin: Path, first: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_compared: bool
    ) -> None:
        """But for secrets, which a key would show, and what says who a process is."""
        (plugin / "factors.py").write_text(f"import os\nFACTOR = float(os.environ.get('{name}', '1'))\n")
        plain = key_of(first)
        monkeypatch.setenv(name, "2")
        assert (key_of(first) != plain) == is_compared

    def test_what_may_be_a_secret_is_not_shown(
        self, plugin: Path, first: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (plugin / "factors.py").write_text("import os\nFACTOR = os.environ.get('SCORE_TOKEN')\n")
        monkeypatch.setenv("SCORE_TOKEN", "12345")
        assert "12345" not in key_of(first).fields["env.SCORE_TOKEN"]

    def test_vllm_as_released_is_said(self, tiny: Path) -> None:
        assert key_of(tiny).fields["code.vllm"] == "as released"

    def test_a_patched_vllm_of_the_same_version_is_another_key(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file that is not its wheel's is named, with a digest."""
        read = code._sha256_of
        monkeypatch.setattr(
            code, "_sha256_of", lambda path: "patched" if path.endswith("layers/linear.py") else read(path)
        )
        code._vllm_state.cache_clear()
        found = key_of(tiny).fields["code.vllm"]
        code._vllm_state.cache_clear()
        assert found == "vllm/model_executor/layers/linear.py patched"

    @pytest.mark.parametrize("how", ["size", "time"])
    def test_a_patched_file_of_whatever_part_is_named(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
    ) -> None:
        """A backend of attention has weights, too, and a worker loads them. These files are looked at, and not read."""
        name = "vllm/v1/worker/worker_base.py"
        real, read, released = os.stat, code._sha256_of, code._released
        patched = tmp_path / "worker_base.py"

        def looked(place: str) -> code._Release:
            found = released(place)
            size = found.sizes[name] + (how == "size")
            patched.write_bytes(b"x" * size)
            after_ns = found.installed_ns + (10**9 if how == "time" else -(10**9))
            os.utime(patched, ns=(after_ns, after_ns))
            return found

        monkeypatch.setattr(code, "_released", looked)
        monkeypatch.setattr(code, "_sha256_of", lambda path: "patched" if path.endswith(name) else read(path))
        monkeypatch.setattr(
            os, "stat", lambda path, **options: real(patched if str(path).endswith(name) else path, **options)
        )
        code._vllm_state.cache_clear()
        found = key_of(tiny).fields["code.vllm"]
        monkeypatch.undo()
        code._vllm_state.cache_clear()
        assert found == f"{name} patched"

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)], ids=["after", "before"])
    def test_the_list_of_what_is_installed_is_found_among_others(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        order: Callable[[Iterable[str]], list[str]],
        version: int,
    ) -> None:
        """Plugins are called like vLLM, one has a file in vLLM's folder, and an upgrade left the list of before."""
        monkeypatch.setattr(code, "_sha256_of", lambda path: Path(path).read_text())
        listed = "vllm/__init__.py,sha256=a{0},0\nvllm/_version.py,sha256=v{0},2\n"
        for name, text, seconds in (
            ("vllm/__init__.py", "", 2),
            ("vllm/_version.py", f"v{version}", 2),
            ("vllm-1.dist-info/RECORD", listed.format(1), 3),
            ("vllm-2.dist-info/RECORD", listed.format(2), 3),
            ("vllm_more-1.dist-info/RECORD", "vllm/more.py,sha256=cc,1\n", 1),
            ("vllm_plugin-1.dist-info/RECORD", "vllm_plugin.py,sha256=bb,1\n", 1),
        ):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            os.utime(path, (seconds, seconds))
        names = os.listdir
        monkeypatch.setattr(os, "listdir", lambda path: order(names(path)))
        found = code._released(str(tmp_path))
        assert found.digests == {"vllm/__init__.py": f"a{version}", "vllm/_version.py": f"v{version}"}
        assert not found.touched()

    def test_of_an_editable_vllm_each_folder_is_named(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has no list of what was released."""
        read, patched = code._sha256_of, ""
        monkeypatch.setattr(code, "_released", code._Release)
        monkeypatch.setattr(
            code, "_sha256_of", lambda path: patched if patched and path.endswith("layers/linear.py") else read(path)
        )
        code._vllm_state.cache_clear()
        plain = key_of(tiny)
        patched = "patched"
        code._vllm_state.cache_clear()
        other = key_of(tiny)
        code._vllm_state.cache_clear()
        changed = [line.split(" is ")[0] for line in other.differences(plain)]
        assert changed == ["code.vllm/model_executor/layers"]

    def test_a_function_put_into_a_class_counts(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a sitecustomize or a plugin does that replaces `load_weights`."""
        from vllm.model_executor.models.llama import LlamaForCausalLM

        plain = key_of(tiny)
        (tmp_path / "patches.py").write_text("def load_weights(self, weights):\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(LlamaForCausalLM, "load_weights", importlib.import_module("patches").load_weights)
        assert [line.split(" is ")[0] for line in key_of(tiny).differences(plain)] == ["code.patches.py"]

    def test_code_of_another_repository_counts(
        self, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a checkpoint whose `auto_map` names one; without --trust-remote-code nobody runs it."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "code").mkdir(parents=True)
        (tmp_path / "org" / "code" / "modeling.py").write_text("A = 1")
        made = json.loads((first / "config.json").read_text())
        (first / "config.json").write_text(json.dumps(made | {"auto_map": {"AutoModel": "org/code--modeling.A"}}))
        for trusted, changed in ((False, []), (True, ["code.org/code/modeling.py"])):
            plain = key_of(first, trust_remote_code=trusted)
            (tmp_path / "org" / "code" / "modeling.py").write_text(f"A = {trusted}")
            other = key_of(first, trust_remote_code=trusted)
            assert [line.split(" is ")[0] for line in other.differences(plain)] == changed

    def test_packages_that_lay_out_weights_are_named(self, tiny: Path) -> None:
        import transformers

        fields = key_of(tiny).fields
        assert fields["version.transformers"] == transformers.__version__
        assert "version.compressed-tensors" in fields
