"""Input that is wrong, and companions that are not ours to use: said clearly, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.place import Place, alive, answering, until
from tests.vllm.conftest import FLAGS, Engine, StartEngine, entries
from vllm_companion_plugin.host.election import LoaderElection
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

PROMPTS = [[1, 2, 3, 4]]


def group_members(pid: int) -> list[str]:
    """Command lines of what still runs in the process group of an engine."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and state != "Z":
                left.append((stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return left


def fails(engine: Engine) -> str:
    """What an engine said that must end with an error and leave no process."""
    assert engine.wait_failure() != 0
    until(lambda: not group_members(engine.process.pid), 5, "no process of the engine is left")
    return engine.output()


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint whose second half was never downloaded."""
    path = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return path


def test_a_model_that_does_not_exist_starts_no_companion(
    start_engine: StartEngine, place: Place, tmp_path: Path
) -> None:
    said = fails(start_engine(model=tmp_path / "nowhere", load_format="companion"))
    assert "nowhere" in said
    assert place.companion_pid() == 0


def test_a_truncated_checkpoint_fails_as_it_does_without_us_and_leaves_nothing_published(
    start_engine: StartEngine, place: Place, broken: Path, tiny_llama: Path
) -> None:
    said = fails(start_engine(model=broken, load_format="companion", skip_tokenizer_init=True))
    assert "SafetensorError" in said
    assert entries(place) == ()
    LoaderElection(place.paths).acquire(1).release()

    shutil.copy(tiny_llama / "model.safetensors", broken)
    mended = start_engine(model=broken, load_format="companion", skip_tokenizer_init=True, prompts=PROMPTS)
    mended.result()
    assert "Published weights of" in mended.output()


def test_an_unknown_key_of_the_extra_config_is_refused_with_the_known_ones(
    start_engine: StartEngine, place: Place, tiny_llama: Path
) -> None:
    said = fails(
        start_engine(
            model=tiny_llama,
            load_format="companion",
            skip_tokenizer_init=True,
            model_loader_extra_config={"shar": "copy"},
        )
    )
    assert "shar" in said
    for known in ("share", "source_format", "fallback", "wait_timeout_s"):
        assert known in said
    assert place.companion_pid() == 0


@pytest.fixture
def open_directory(place: Place) -> None:
    """A runtime directory into which anybody may plant a socket."""
    path = Path(place.settings.runtime_dir)
    path.mkdir()
    path.chmod(0o777)


@pytest.fixture
def of_another_version(place: Place) -> Iterator[None]:
    """Something listens on the companion's socket and speaks protocol 99."""

    with answering(place, 99):
        yield


@pytest.mark.parametrize(
    ("obstacle", "message"), [("open_directory", "mode 0777"), ("of_another_version", "protocol 99")]
)
def test_what_prevents_sharing_ends_the_engine_or_is_said_while_it_loads_alone(
    obstacle: str,
    message: str,
    request: pytest.FixtureRequest,
    start_engine: StartEngine,
    place: Place,
    tiny_llama: Path,
) -> None:
    request.getfixturevalue(obstacle)
    options = {"model": tiny_llama, "load_format": "companion", "skip_tokenizer_init": True}
    strict = start_engine(model_loader_extra_config={"fallback": False}, **options)
    lenient = start_engine(prompts=PROMPTS, **options)
    assert message in fails(strict)
    assert len(lenient.result()["tokens"][0]) == 24
    assert "are not shared" in lenient.output()
    assert message in lenient.output()
    assert not any(tensor["in_arena"] for tensor in lenient.result()["workers"][0]["tensors"].values())
    assert place.companion_pid() == 0


def test_serve_ends_with_an_error_and_its_companion_if_the_model_cannot_be_loaded(
    place: Place, broken: Path, engine_environment: dict[str, str]
) -> None:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "vllm_companion_plugin.cli.main", "serve", "--device", "cpu", str(broken)),
            *FLAGS,
        ],
        env=engine_environment | to_environment(place.settings),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 1
    assert f"{broken} was not loaded" in process.stderr
    assert "Ready" not in process.stdout
    assert not alive(place.companion_pid())
