"""Drafts of speculative decoding: entries of their own, shared with their targets."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import models
from tests.support.configs import config
from tests.support.deciding import Engines, publish
from tests.support.keys import key_of
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.engine import decide, decisions, session
from vllm_companion_plugin.engine.identity import key
from vllm_companion_plugin.engine.vllm import drafts
from vllm_companion_plugin.errors import NotShareableError

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama-eagle", path, tiny=True)
    return path


def eagle(model: Path, **options: Any) -> Any:
    speculative = {"method": "eagle", "model": f"{model}-draft", "num_speculative_tokens": 2}
    return config(model, speculative_config=speculative, **options)


def draft_key_of(model: Path, **options: Any) -> EntryKey:
    made = eagle(model, **options)
    draft = drafts.draft_config(made)
    fields = key.draft_fields(made, draft)
    return key.compute_draft(fields, draft, key_of(model, **options), "auto", Path(f"{model}-draft"), {})


def test_a_draft_is_an_entry_of_its_own_that_counts_as_soon_as_somebody_has_it(engines: Engines, drafted: Path) -> None:
    first, second, third = (eagle(drafted) for _ in range(3))
    target = decide.decide(first, first.model_config, engines.settings)
    assert isinstance(target, decisions.Load)
    publish(target)
    status = session.current()._connections["cpu"].status
    size = status().entries[0].size_bytes
    assert decide.external_bytes(second, engines.settings) == size, "nobody has the draft, and nobody is elected for it"
    assert [entry.key.role for entry in status().entries] == ["target"]

    loader = decide.decide(first, drafts.draft_config(first), engines.settings)
    assert isinstance(loader, decisions.Load)
    assert (loader.key.role, loader.key.rank, loader.key.model) == ("draft", "single", f"{drafted}-draft")
    assert loader.key.is_draft_of(target.key)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(decide.external_bytes(third, engines.settings)))
    asking.start()  # and waits for the loader
    publish(loader)
    asking.join(30)
    assert found == [2 * size]
    for engine, announced in ((second, False), (third, True)):
        bound = decide.decide(engine, drafts.draft_config(engine), engines.settings)
        assert isinstance(bound, decisions.Attach)
        assert bound.announced is announced
        assert abs(bound.attachment.held.published.ready_unix_s - time.time()) < 60
        bound.close()
        decide.decide(engine, engine.model_config, engines.settings).close()  # type: ignore[union-attr]
    loader.close()
    target.close()


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
    draft = drafts.draft_config(made)
    alone = decide.decide(made, draft, engines.settings)
    session.current().forget(draft)
    assert isinstance(alone, decisions.Alone)
    assert "together with its target" in alone.reason
    with pytest.raises(NotShareableError, match="together with its target"):
        decide.decide(made, draft, replace(engines.settings, fallback=False))
    draft_alike = replace_parallel(made)
    assert decide.settings_for(draft_alike, engines.settings).share == "copy"


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
    assert drafts.draft_config(made) is None
    assert isinstance(engines.decide(tiny, speculative_config=ngram), decisions.Load)


def test_a_model_that_is_its_own_draft_is_found_by_its_role(engines: Engines, tmp_path: Path) -> None:
    model = tmp_path / "mtp"
    models.make("deepseek-v3-mtp", model, tiny=True)
    made = config(model, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    for model_config in (made.model_config, drafts.draft_config(made)):
        loader = decide.decide(made, model_config, engines.settings)
        assert isinstance(loader, decisions.Load)
        publish(loader)
    connection = session.current()._connections["cpu"]
    found = {role: connection.wait_ready(str(model), role=role, timeout_s=5).key for role in ("draft", "target")}
    assert found["draft"].is_draft_of(found["target"])
    assert found["draft"].model == found["target"].model
    assert connection.wait_ready(str(model), timeout_s=5).key == found["target"]
    for model_config in (made.model_config, drafts.draft_config(made)):
        session.current()._decisions[id(model_config)].close()  # type: ignore[union-attr]
