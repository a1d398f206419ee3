"""What is the same model and what is not: vLLM's real configuration, a real companion, real files."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import models
from tests.process import publishing
from tests.process.conftest import Place
from vllm_companion_plugin.engine import compat, digest, key, session
from vllm_companion_plugin.errors import CompanionError, NotShareableError
from vllm_companion_plugin.launch.runtime_dir import digests_directory
from vllm_companion_plugin.launch.spawn import is_listening
from vllm_companion_plugin.settings import Settings
from vllm_companion_plugin.types import EntryKey, model_name

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The parallel groups of a single worker."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        address = f"file://{tmp_path_factory.mktemp('group')}/store"
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama", path, tiny=True)
    return path


@pytest.fixture
def first(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "first"))


def config(model: Path | str, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    flags = {"skip_tokenizer_init": True, "max_model_len": 64, "dtype": "float32", "load_format": "companion"}
    return EngineArgs(model=str(model), **(flags | options)).create_engine_config()


def key_of(model: Path, **options: Any) -> EntryKey:
    made = config(model, **options)
    files = session.checkpoint.identity(model)
    return key.compute(made, made.model_config, compat.engine_device(made), "auto", model, files)


# ---- what is part of the key


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("model.dtype", {"dtype": "bfloat16"}),
        ("lora", {"enable_lora": True}),
        ("hf.rms_norm_eps", {"hf_overrides": {"rms_norm_eps": 0.5}}),
        ("kernel.linear_backend", {"linear_backend": "triton"}),
        ("kernel.moe_backend", {"moe_backend": "triton"}),
        ("model.quantization", {"quantization": "fp8_per_tensor", "dtype": "bfloat16"}),
        ("cache.cache_dtype", {"kv_cache_dtype": "fp8"}),
        ("model.model_impl", {"model_impl": "vllm"}),
    ],
)
def test_what_changes_the_processed_weights_changes_the_key(tiny: Path, field: str, options: dict[str, Any]) -> None:
    plain, other = key_of(tiny), key_of(tiny, **options)
    assert plain.id != other.id
    assert field in {line.split(" is ")[0] for line in other.differences(plain)}


@pytest.mark.parametrize(
    ("flag", "value", "default"),
    [("max_lora_rank", 8, 16), ("fully_sharded_loras", True, False), ("enable_tower_connector_lora", True, False)],
)
def test_each_lora_flag_changes_the_key(tiny: Path, flag: str, value: Any, default: Any) -> None:
    """0.33 notes the second in mixtures of experts; multimodal models build other towers for the third."""
    changed = key_of(tiny, enable_lora=True, **{flag: value}).differences(key_of(tiny, enable_lora=True))
    assert changed == [f"lora.{flag} is {json.dumps(default)!r} there and {json.dumps(value)!r} here"]


def test_kernel_switches_and_versions_are_in_the_key(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = key_of(tiny)
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    switched = key_of(tiny)
    assert switched.differences(plain) == ["env.VLLM_MARLIN_INPUT_DTYPE is 'absent' there and 'int8' here"]
    versions = compat.versions() | {"vllm": "0.0.1"}
    monkeypatch.setattr(compat, "versions", lambda: versions)
    assert f"version.vllm is {plain.fields['version.vllm']!r} there and '0.0.1' here" in key_of(tiny).differences(plain)


@pytest.mark.parametrize(
    "options",
    [{"max_model_len": 32}, {"max_num_seqs": 2}, {"enforce_eager": True}, {"seed": 7}, {"served_model_name": "other"}],
)
def test_what_leaves_the_weights_alone_leaves_the_key(tiny: Path, options: dict[str, Any]) -> None:
    assert key_of(tiny, **options).id == key_of(tiny).id


def test_a_link_is_what_it_points_to(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "directory").symlink_to(tiny)
    files = tmp_path / "files"
    files.mkdir()
    for file in tiny.iterdir():
        (files / file.name).symlink_to(file)
    assert key_of(tmp_path / "directory").id == key_of(files).id == key_of(tiny).id


# ---- what engines decide


class Engines:
    """Decisions of engines on one device, and what the loading ones publish."""

    def __init__(self, place: Place) -> None:
        self.settings: Settings = place.settings
        self._decisions: list[Any] = []

    def decide(self, model: Path, **options: Any) -> session.Attach | session.Load:
        made = config(model, **options)
        decision = session._decide(made, made.model_config, self.settings)
        assert not isinstance(decision, session.Alone)
        self._decisions.append(decision)
        return decision

    def load(self, model: Path, **options: Any) -> session.Load:
        """Decide, expect to be elected, and publish something under the key."""
        decision = self.decide(model, **options)
        assert isinstance(decision, session.Load)
        publish(decision)
        return decision

    def attaches(self, model: Path, **options: Any) -> bool:
        decision = self.decide(model, **options)
        decision.close()
        return isinstance(decision, session.Attach)

    def close(self) -> None:
        for decision in self._decisions:
            decision.close()


def publish(decision: session.Load) -> None:
    publishing.publish(decision.granted.publication, nn.Linear(2, 2))
    decision.election.release()


@pytest.fixture
def engines(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    place.companion()
    monkeypatch.setattr(session, "_connections", {})
    monkeypatch.setattr(session, "_drafts", {})
    monkeypatch.setattr(digest, "_SETTLED_S", -1.0)  # files of a test are always new
    made = Engines(place)
    yield made
    made.close()
    for connection in session._connections.values():
        connection.close()


def kept(engines: Engines) -> int:
    directory = Path(engines.settings.runtime_dir, "digests")
    return len([path for path in directory.iterdir() if path.name != "lock"]) if directory.exists() else 0


def flip(path: Path, offsets: Iterable[int]) -> None:
    """Change the bytes at `offsets`."""
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def copy_of(model: Path, name: str = "copied") -> Path:
    return Path(shutil.copytree(model, model.with_name(name)))


def fine_tune_of(model: Path, offsets: Iterable[int]) -> Path:
    """A copy of the same shape: its weights differ at `offsets` of the file, and the header does not."""
    tuned = copy_of(model, "tuned")
    flip(tuned / WEIGHTS, offsets)
    return tuned


def test_a_copy_is_the_same_model_and_is_read_once(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.load(first)
    copied = copy_of(first)
    assert engines.attaches(copied)
    assert kept(engines) == 2, "one digest of each file"
    monkeypatch.setattr(digest, "_read", lambda path: pytest.fail(f"{path} is read again"))
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
    monkeypatch.setattr(digest, "_read", lambda path: pytest.fail(f"{path} is read"))
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


def test_a_digest_of_a_file_that_was_just_written_is_not_kept(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written again within the same tick of the clock."""
    monkeypatch.setattr(digest, "_SETTLED_S", 2.0)
    engines.load(first)
    assert engines.attaches(copy_of(first))
    assert kept(engines) == 0


def test_copies_that_start_together_load_once(engines: Engines, first: Path) -> None:
    copied = copy_of(first)
    loader = engines.decide(first)
    assert isinstance(loader, session.Load)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(engines.decide(copied)))
    other.start()
    other.join(1)
    assert other.is_alive(), "it waits"
    publish(loader)
    other.join(10)
    assert isinstance(found[0], session.Attach)


def test_whoever_was_elected_looks_again(engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both asked before either was known, so each has an election of its own; the device's lock orders them."""
    copied = copy_of(first)
    loader = engines.decide(first)
    assert isinstance(loader, session.Load)
    held = session._held
    asked: list[Any] = []

    def blind_at_first(status: Any, wanted: EntryKey, *rest: Any) -> EntryKey:
        asked.append(rest)
        return wanted if len(asked) == 1 else held(status, wanted, *rest)

    monkeypatch.setattr(session, "_held", blind_at_first)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(engines.decide(copied)))
    other.start()
    other.join(1)
    assert other.is_alive(), "it waits for the lock"
    publish(loader)
    other.join(10)
    assert isinstance(found[0], session.Attach)
    assert len(asked) == 2


def test_a_mismatch_names_the_fields_and_both_values(
    engines: Engines, first: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines.load(first)
    assert not engines.attaches(first, hf_overrides={"rms_norm_eps": 0.5})
    said = [record.getMessage() for record in caplog.records if "loaded differently" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("so it is loaded once more: hf.rms_norm_eps is '1e-05' there and '0.5' here.")


def test_a_pipe_where_another_client_says_that_its_checkpoint_is_does_not_hang_an_engine(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert digest._sample(tmp_path / "pipe") == (-1, b"")
    began = time.monotonic()
    digest._read(tmp_path / "pipe")
    assert time.monotonic() - began < 1


def test_a_damaged_digest_is_not_believed(engines: Engines, first: Path) -> None:
    tuned = fine_tune_of(first, [-1])
    engines.load(first)
    directory = Path(digests_directory(engines.settings))
    for file in (*first.iterdir(), *tuned.iterdir()):
        name = hashlib.sha256(session.checkpoint.file_identity(file).encode()).hexdigest()
        (directory / name).write_bytes(bytes(64))  # as a crash leaves it
    assert not engines.attaches(tuned)


def test_who_was_elected_for_a_copy_takes_its_own_if_that_is_there_by_then(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_of(first)
    engines.load(first)
    held, answers = session._held, [key_of(copied)]
    monkeypatch.setattr(session, "_held", lambda *rest: answers.pop() if answers else held(*rest))
    assert engines.attaches(first)


def test_an_engine_that_writes_to_its_weights_copies_what_is_held_and_publishes_nothing(
    engines: Engines, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "must_own_reason", lambda config: "EPLB moves expert weights in place")
    with pytest.raises(NotShareableError, match=r"EPLB .* nobody holds them to be copied"):
        engines.decide(first)
    assert session._connections["cpu"].status().entries == ()
    asked_for = replace(engines.settings, share="copy")
    made = config(first)
    loader = session._decide(made, made.model_config, asked_for)
    assert isinstance(loader, session.Load)
    publish(loader)
    assert engines.attaches(first)
    loader.close()


ODD = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}模\u202e\n\x1b[2J\udcff\udcfe"
"""What a path may have: spaces of other kinds, marks, control characters, and bytes that are no UTF-8."""


def test_paths_with_any_characters(engines: Engines, first: Path, tmp_path: Path) -> None:
    """What has such a path is published and attached to, also from a copy, and is shown in a printable way."""
    odd = Path(shutil.move(first, tmp_path / ODD))
    (odd / f"{ODD}.safetensors").write_bytes(b"x")
    engines.load(odd)
    assert engines.attaches(odd)
    assert engines.attaches(copy_of(odd, f"{ODD}2"))
    (entry,) = session._connection("cpu", engines.settings).status().entries
    assert entry.key.source == str(odd)
    assert f"{ODD}.safetensors" in entry.key.files
    assert entry.key.model.isprintable()
    assert entry.key.model.endswith("\\xa0\\u3000模\\u202e\\n\\x1b[2J\\udcff\\udcfe")
    assert model_name(entry.key.model) == entry.key.model


def test_linked_directories_and_quantization_files_count(tiny: Path, first: Path, tmp_path: Path) -> None:
    plain = key_of(first)
    (first / "hf_quant_config.json").write_text("{}")
    quantized = key_of(first)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"x")
    (other / "back").symlink_to(first)  # around in a circle
    (first / "2_Dense").symlink_to(other)
    linked = key_of(first)
    assert len({plain.id, quantized.id, linked.id}) == 3
    assert set(linked.files) - set(quantized.files) == {"2_Dense/model.safetensors"}


# ---- drafts of speculative decoding


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama-eagle", path, tiny=True)
    return path


def eagle(model: Path, **options: Any) -> Any:
    speculative = {"method": "eagle", "model": f"{model}-draft", "num_speculative_tokens": 2}
    return config(model, speculative_config=speculative, **options)


def test_a_draft_is_an_entry_of_its_own_that_counts_as_soon_as_somebody_has_it(engines: Engines, drafted: Path) -> None:
    first, second, third = (eagle(drafted) for _ in range(3))
    target = session.decide(first, first.model_config, engines.settings)
    assert isinstance(target, session.Load)
    publish(target)
    status = session._connections["cpu"].status
    size = status().entries[0].size_bytes
    assert session.external_bytes(second, engines.settings) == size, (
        "nobody has the draft, and nobody is elected for it"
    )
    assert [entry.key.role for entry in status().entries] == ["target"]

    loader = session.decide(first, compat.draft_config(first), engines.settings)
    assert isinstance(loader, session.Load)
    assert (loader.key.role, loader.key.rank, loader.key.model) == ("draft", "single", f"{drafted}-draft")
    assert loader.key.is_draft_of(target.key)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(session.external_bytes(third, engines.settings)))
    asking.start()  # and waits for the loader
    publish(loader)
    asking.join(20)
    assert found == [2 * size]
    for engine, announced in ((second, False), (third, True)):
        bound = session.decide(engine, compat.draft_config(engine), engines.settings)
        assert isinstance(bound, session.Attach)
        assert bound.announced is announced
        assert abs(bound.ready.published.ready_unix_s - time.time()) < 60
        bound.close()
        session.decide(engine, engine.model_config, engines.settings).close()  # type: ignore[union-attr]
    loader.close()
    target.close()


def draft_key_of(model: Path, **options: Any) -> EntryKey:
    made = eagle(model, **options)
    draft = compat.draft_config(made)
    fields = key.draft_fields(made, draft)
    return key.compute_draft(fields, draft, key_of(model, **options), "auto", Path(f"{model}-draft"), {})


@pytest.mark.parametrize(
    ("field", "options"),
    [("target.hf.rms_norm_eps", {"hf_overrides": {"rms_norm_eps": 0.5}}), ("model.dtype", {"dtype": "bfloat16"})],
)
def test_what_changes_the_target_or_the_draft_changes_the_drafts_key(
    drafted: Path, field: str, options: dict[str, Any]
) -> None:
    plain, other = draft_key_of(drafted), draft_key_of(drafted, **options)
    assert plain.id == draft_key_of(drafted, max_num_seqs=2).id
    assert field in {line.split(" is ")[0] for line in other.differences(plain)}
    assert not other.is_draft_of(key_of(drafted))
    assert plain.is_draft_of(key_of(drafted))


def test_a_draft_is_shared_with_its_target_or_not_at_all(engines: Engines, drafted: Path) -> None:
    made = eagle(drafted)
    draft = compat.draft_config(made)
    alone = session.decide(made, draft, engines.settings)
    session.forget(draft)
    assert isinstance(alone, session.Alone)
    assert "together with its target" in alone.reason
    with pytest.raises(NotShareableError, match="together with its target"):
        session.decide(made, draft, replace(engines.settings, fallback=False))
    draft_alike = replace_parallel(made)
    assert session.settings_for(draft_alike, engines.settings).share == "copy"


def replace_parallel(made: Any) -> Any:
    """As vLLM configures a draft with parallel settings of its own, in an engine with EPLB."""
    made.parallel_config.enable_eplb = True
    assert made.speculative_config.target_parallel_config is made.parallel_config
    made.parallel_config = made.speculative_config.draft_parallel_config
    assert not made.parallel_config.enable_eplb
    return made


def test_an_engine_that_guesses_by_ngrams_has_no_draft(tiny: Path, engines: Engines) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    made = config(tiny, speculative_config=ngram)
    assert made.speculative_config.draft_model_config is made.model_config
    assert compat.draft_config(made) is None
    assert isinstance(engines.decide(tiny, speculative_config=ngram), session.Load)


def test_a_model_that_is_its_own_draft_is_found_by_its_role(engines: Engines, tmp_path: Path) -> None:
    model = tmp_path / "mtp"
    models.make("deepseek-v3-mtp", model, tiny=True)
    made = config(model, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    for model_config in (made.model_config, compat.draft_config(made)):
        loader = session.decide(made, model_config, engines.settings)
        assert isinstance(loader, session.Load)
        publish(loader)
    connection = session._connections["cpu"]
    found = {role: connection.wait_ready(str(model), role=role, timeout_s=5).key for role in ("draft", "target")}
    assert found["draft"].is_draft_of(found["target"])
    assert found["draft"].model == found["target"].model
    assert connection.wait_ready(str(model), timeout_s=5).key == found["target"]
    for model_config in (made.model_config, compat.draft_config(made)):
        session._decisions[id(model_config)].close()  # type: ignore[union-attr]


def test_who_knew_a_companion_that_was_killed_and_followed_asks_the_next_one(
    engines: Engines, place: Place, first: Path
) -> None:
    engines.load(first)
    place.processes[-1].kill()
    place.processes[-1].wait(5)
    following = threading.Thread(target=place.companion)
    following.start()
    while not is_listening(place.paths):  # a channel that has failed waits before it connects again
        with contextlib.suppress(CompanionError):
            session._connections["cpu"].status()
    following.join(20)
    assert isinstance(engines.decide(first), session.Load)


def test_what_a_failed_engine_was_to_load_is_left_to_the_next_in_the_same_process(
    engines: Engines, first: Path
) -> None:
    """An engine may end between its decision and its load: its share of the memory may be too small."""
    made = config(first)
    assert isinstance(session.decide(made, made.model_config, engines.settings), session.Load)
    again = config(first)
    del made
    gc.collect()
    decision = session.decide(again, again.model_config, replace(engines.settings, wait_timeout_s=5))
    assert isinstance(decision, session.Load)
    session.forget(again.model_config)
    decision.close()


def test_speculation_changes_the_key_of_a_hybrid(tiny: Path, tmp_path: Path) -> None:
    """Gated delta nets keep the number of tokens as an attribute, which parity compares."""
    models.make("hybrid", tmp_path / "hybrid", tiny=True)
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    assert key_of(tiny).id == key_of(tiny, speculative_config=guess).id
    changed = key_of(tmp_path / "hybrid", speculative_config=guess).differences(key_of(tmp_path / "hybrid"))
    assert changed == ["speculative.num_speculative_tokens is 'absent' there and '3' here"]
