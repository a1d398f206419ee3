"""What reads the checkpoint for a companion: its flags, its options, its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_companion_plugin.cli.parser import TAKES_FLAGS_OF_VLLM, make_parser
from vllm_companion_plugin.engine.register import register
from vllm_companion_plugin.engine.vllm import flags, sources
from vllm_companion_plugin.errors import SettingsError
from vllm_companion_plugin.settings import resolve, resolve_extra_config

pytestmark = pytest.mark.core

LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 64},
}


@pytest.fixture
def registered() -> None:
    """As in every process of an engine."""
    register()


@pytest.fixture
def claims_ties(tmp_path: Path) -> Path:
    """A checkpoint whose config says that its output layer is its embedding, beside an output layer of its own."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    save_file({"lm_head.weight": torch.zeros(32, 64)}, tmp_path / "model.safetensors")
    return tmp_path


MODEL = str(Path(__file__).parent)
"""Any directory: it is not read."""


class TestFlags:
    """The command line of `vllm serve`, for a process that only loads."""

    def test_of_the_server(self, capsys: pytest.CaptureFixture[str]) -> None:
        """They are ignored, also with their default value, and named in a line without their values."""
        flags_of_server = ["--port", "8000", "--api-key", "secret", "--enable-auto-tool-choice"]
        args = flags.parse("serve", [MODEL, "--dtype", "float32", *flags_of_server])
        assert (args.model, args.dtype) == (MODEL, "float32")
        (line,) = capsys.readouterr().out.splitlines()
        assert line.endswith("flags: --api-key, --enable-auto-tool-choice, --port")

    @pytest.mark.parametrize("joined", [True, False])
    def test_config_file(self, joined: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is read as `vllm serve` reads it: flags win, what is the server's is ignored, so is its model."""
        file = tmp_path / "serve.yaml"
        file.write_text("model: other\nport: 1\nmax-model-len: 64\nenforce-eager: true\ndtype: float16\n")
        config = [f"--config={file}"] if joined else ["--config", str(file)]
        args = flags.parse("serve", [MODEL, *config, "--dtype", "float32"])
        assert (args.model, args.dtype, args.max_model_len, args.enforce_eager) == (MODEL, "float32", 64, True)
        assert "--port" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (
                ["--gpu-mem-utilization", "0.5", "--foo"],
                "--gpu-mem-utilization (did you mean --gpu-memory-utilization?), --foo",
            ),
            (["--dtype", "float99"], "invalid choice: 'float99'"),
            (["--config", "/none.yaml"], "--config: "),
            (["--a", "--b", "--c", "--d"], "and 1 more"),
        ],
    )
    def test_unknown(self, line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, with what was probably meant, instead of vLLM's whole usage."""
        with pytest.raises(SystemExit, match="2"):
            flags.parse("serve", [MODEL, *line])
        error = capsys.readouterr().err
        assert said in error
        assert len([each for each in error.splitlines() if each.startswith("vllm-companion serve: error:")]) == 1
        assert "usage" not in error

    def test_unknown_to_both(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What was meant may be a flag of the command, all of which are known."""
        with pytest.raises(SystemExit, match="2"):
            flags.parse("verify", [MODEL, "--jsn"])
        assert "no flag --jsn (did you mean --json?)" in capsys.readouterr().err
        for command in TAKES_FLAGS_OF_VLLM:
            assert {"-h", "--help", *flags.OF_COMMAND[command]} == set(make_parser().commands[command].flags())

    def test_options_of_the_source(self) -> None:
        """Of a load format other than ours they are the loader's, but for those that only a companion knows."""
        extra = {"concurrency": 4, "share": "copy"}
        args = EngineArgs(model=MODEL, load_format="runai_streamer", model_loader_extra_config=extra)
        wanted = {"share": "copy", "source_format": "runai_streamer", "source_extra_config": {"concurrency": 4}}
        assert flags.through_companion(args).model_loader_extra_config == wanted
        reference = flags.without_companion(args)
        assert (reference.load_format, reference.model_loader_extra_config) == ("runai_streamer", {"concurrency": 4})


class TestSourceOptions:
    """`source_extra_config` reaches vLLM's own loader, which judges it."""

    @staticmethod
    def source(source_format: str, extra: dict[str, Any]) -> Any:
        ours = {"source_format": source_format, "source_extra_config": extra}
        load_config = LoadConfig(load_format="companion", model_loader_extra_config=ours)
        return sources.source_loader(load_config, source_format)

    def test_taken(self) -> None:
        options = {"enable_multithread_load": True, "num_threads": 3}
        assert self.source("auto", options).load_config.model_loader_extra_config == options
        assert self.source("sharded_state", {"pattern": "x-{rank}-{part}"}).pattern == "x-{rank}-{part}"

    @pytest.mark.parametrize("source_format", ["auto", "runai_streamer", "sharded_state", "dummy"])
    def test_unknown(self, source_format: str) -> None:
        with pytest.raises(SettingsError, match=f"'{source_format}' with source_extra_config .'nonsense': 1") as caught:
            self.source(source_format, {"nonsense": 1})
        assert "extra config" in str(caught.value).partition(": ")[2]

    def test_what_decides_content_is_in_the_key(self) -> None:
        """How many threads read does not decide it, what they read does."""
        texts = [
            sources.source_text(resolve({"source_format": "sharded_state", "source_extra_config": extra}))
            for extra in ({}, {"num_threads": 2}, {"pattern": "a"}, {"pattern": "b"})
        ]
        assert texts[:3] == ["sharded_state", "sharded_state", 'sharded_state {"pattern": "a"}']
        assert texts[2] != texts[3]


@pytest.mark.usefixtures("registered")
class TestNameOfTheLoadFormat:
    """Where vLLM looks at it, it sees the format that reads the checkpoint."""

    @staticmethod
    def config(model: Path, source_format: str, load_format: str = "companion") -> Any:
        extra = {"source_format": source_format} if load_format == "companion" else {}
        args = EngineArgs(
            **{"model": str(model), "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True},
            **{"load_format": load_format, "model_loader_extra_config": extra},
        )
        return args.create_engine_config()

    @pytest.mark.parametrize("source_format", ["auto", "safetensors", "dummy", "sharded_state"])
    @pytest.mark.skipif(not hasattr(ModelConfig, "maybe_untie_word_embeddings"), reason="vLLM before 0.29 believes it")
    def test_ties(self, source_format: str, claims_ties: Path) -> None:
        """A checkpoint with an output layer that its config denies is believed by the same formats as without us."""
        ours, theirs = (self.config(claims_ties, source_format, each) for each in ("companion", source_format))
        for of in (ours, theirs):
            assert of.model_config.hf_config.tie_word_embeddings is (source_format in ("dummy", "sharded_state"))
        assert ours.load_config.load_format == "companion"
        # A draft's config is made of the engine's, in the worker.
        again = dataclasses.replace(ours)
        assert again.model_config.hf_config.tie_word_embeddings is theirs.model_config.hf_config.tie_word_embeddings

    @pytest.mark.parametrize(("source_format", "used"), [("auto", "runai_streamer"), ("dummy", None)])
    def test_object_store(self, source_format: str, used: str | None, claims_ties: Path) -> None:
        """As vLLM has it: `auto` becomes the format that can read it, another one is refused."""
        args = EngineArgs(model=str(claims_ties), dtype="float32", skip_tokenizer_init=True)
        model_config = args.create_model_config()
        model_config.model_weights = "s3://bucket/model"
        extra = {"source_format": source_format, "share": "copy"}
        load_config = LoadConfig(load_format="companion", model_loader_extra_config=extra)
        if used is None:
            with pytest.raises(ValueError, match="but got 'dummy'"):
                VllmConfig(model_config=model_config, load_config=load_config)
            return
        VllmConfig(model_config=model_config, load_config=load_config)
        assert load_config.load_format == "companion"
        settings = resolve_extra_config(load_config.model_loader_extra_config)
        assert (settings.source_format, settings.share) == (used, "copy")
        assert "s3://bucket/model, an object store" in str(sources.elsewhere_reason(model_config, settings))

    def test_tensorizer(self) -> None:
        """vLLM completes its options by the name of the model."""
        options = {"num_readers": 2}
        extra = {"source_format": "tensorizer", "source_extra_config": options, "share": "copy"}
        config = EngineArgs(model=MODEL, load_format="companion", model_loader_extra_config=extra).create_load_config()
        assert config.load_format == "companion"
        assert config.model_loader_extra_config["share"] == "copy"
        completed = config.model_loader_extra_config["source_extra_config"]
        assert completed["tensorizer_config"] == {"tensorizer_dir": MODEL, "num_readers": 2}
        assert options == {"num_readers": 2}
