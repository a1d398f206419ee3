"""Full fine-tuning in place: as on any model, with one copy, and nobody but the owner writes, in steps alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.test_from_companion import TOKENS, adapted, held, logits, mappings_of, on_companion
from tests.support.checkpoints import models
from tests.support.place import Place, until
from tests.unit.test_fleet import Rollout
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.update import updating
from vllm_companion_plugin.core.plans import Plan
from vllm_companion_plugin.core.status import EntryStatus
from vllm_companion_plugin.errors import (
    BadRequestError,
    EntryInUseError,
    FleetError,
    LayoutError,
    NotShareableError,
    NotSharedError,
    SettingsError,
    SharedWeightsError,
    StaleError,
)
from vllm_companion_plugin.training import Trained, trained

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_rank")]


def client(place: Place) -> CompanionClient:
    return CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)


def entry_of(place: Place) -> EntryStatus:
    (entry,) = client(place).status().entries
    return entry


def begin(place: Place, path: Path, *engines: Any, **options: Any) -> Trained:
    return trained(str(path), engines, version="run", device="cpu", runtime_dir=place.settings.runtime_dir, **options)


@pytest.fixture
def on(place: Place, tiny: Path) -> Iterator[tuple[Place, Path]]:
    with held(place, tiny):
        yield place, tiny


def test_it_is_what_from_pretrained_makes_and_learns_the_same(place: Place, tmp_path: Path) -> None:
    """With masters in fp32, to the last bit; the entry's dtype is what is trained. Whoever maps it sees each step."""
    models.make("llama-tied", tmp_path, tiny=True)
    with held(place, tmp_path), begin(place, tmp_path) as training:
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        reader = on_companion(place, tmp_path)
        steps = (fitted(training.model, training), fitted(other, None))
        for number, (one, two) in enumerate(zip(*steps, strict=True), 1):
            assert one == two
            assert torch.equal(logits(training.model), logits(other))
            assert torch.equal(logits(reader), logits(other))
            assert training.steps == number
        (old, new) = entry_of(place).generations
        assert (old.number, old.trained, new.number, new.trained, new.is_current) == (1, False, 2, True, True)
        assert (training.generation, new.version) == (2, "run")


def fitted(model: Any, training: Trained | None) -> Iterator[float]:
    """Losses of some steps of AdamW on masters."""
    masters = {each: each.detach().float().clone() for each in model.parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3)
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        for parameter, master in masters.items():
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        if training is None:
            copy(masters)
        else:
            with training.step():
                copy(masters)
        yield float(loss.detach())


def copy(masters: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, master in masters.items():
            parameter.copy_(master)


def test_it_has_one_copy_and_one_more_mapping(on: tuple[Place, Path]) -> None:
    """That of the generation, twice in this process: writable by steps, and as any client maps it."""
    with begin(*on) as training:
        lines = mappings_of(training.model.get_parameter("model.norm.weight"))
        assert len(lines) == 2
        start, end = (int(text, 16) for text in lines[0].split()[0].split("-"))
        other = [int(text, 16) for text in lines[1].split()[0].split("-")]
        for parameter in training.model.parameters():
            address = parameter.data_ptr()
            assert start <= address < end or other[0] <= address < other[1]
        assert [line.split()[1] for line in lines] == ["r--s", "r--s"]
        with training.step():
            lines = mappings_of(training.model.get_parameter("model.norm.weight"))
            assert sorted(line.split()[1] for line in lines) == ["r--s", "rw-s"]


def test_an_optimizer_is_stopped_outside_of_a_step(on: tuple[Place, Path]) -> None:
    """Others are none of its business."""
    with begin(*on) as training:
        before = logits(training.model)
        optimizer = torch.optim.SGD(training.model.parameters(), lr=1.0)
        training.model(TOKENS, labels=TOKENS).loss.backward()
        with pytest.raises(SharedWeightsError, match=r"SGD would write to .*Call it inside of `with trained.step"):
            optimizer.step()
        with pytest.raises(SharedWeightsError, match="SGD would write to"):
            torch.compile(optimizer.step, backend="eager")()
        torch.compiler.reset()
        assert torch.equal(logits(training.model), before)
        own = torch.nn.Parameter(torch.ones(1))
        own.grad = torch.ones(1)
        torch.optim.SGD([own], lr=1.0).step()
        with training.step():
            optimizer.step()
        assert not torch.equal(logits(training.model), before)


def test_an_optimizer_of_an_adapter_is_not_stopped(on: tuple[Place, Path]) -> None:
    with begin(*on) as training:
        made = adapted(training.model)
        mine = [each for name, each in made.named_parameters() if "lora_" in name]
        optimizer = torch.optim.SGD(mine, lr=1.0)
        made(TOKENS, labels=TOKENS).loss.backward()
        before = mine[0].detach().clone()
        optimizer.step()
        assert not torch.equal(mine[0], before)


STEP = """
import gc, sys, torch
from torch.optim import optimizer
from vllm_companion_plugin.errors import SharedWeightsError
from vllm_companion_plugin.training import trained

def closed(training):
    training.close()
    return training.model.parameters()

def dropped(training):
    return training.model.parameters()

def of_others(training):
    return [torch.nn.Parameter(each.detach()) for each in training.model.parameters()]

def step(then):
    mine = list(then(trained(sys.argv[1], version="run", device="cpu", runtime_dir=sys.argv[2])))
    gc.collect()
    for each in mine:
        each.grad = torch.ones_like(each)
    try:
        torch.optim.SGD(mine, lr=1.0).step()
    except SharedWeightsError:
        print(then.__name__, flush=True)

for then in (closed, dropped, of_others):
    step(then)
    gc.collect()
print(len(optimizer._global_optimizer_pre_hooks))
"""


def test_an_optimizer_is_stopped_as_long_as_there_are_parameters(on: tuple[Place, Path]) -> None:
    """Also when nobody can open a step any more. In another process, which a write would end."""
    place, path = on
    command = [sys.executable, "-c", STEP, str(path), place.settings.runtime_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.stdout.split(), done.returncode) == (["closed", "dropped", "of_others", "0"], 0), done.stderr[-2000:]


WRITE = """
import sys, torch
from vllm_companion_plugin.training import trained
training = trained(sys.argv[1], version="run", device="cpu", runtime_dir=sys.argv[2])
print("begun", flush=True)
with torch.no_grad():
    training.model.get_parameter("model.norm.weight").zero_()
"""


def test_any_other_write_outside_of_a_step_ends_the_process(on: tuple[Place, Path]) -> None:
    """And changes nothing. What it owned stays current, and the next one begins there."""
    place, path = on
    command = [sys.executable, "-c", WRITE, str(path), place.settings.runtime_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("begun\n", -signal.SIGSEGV), done.stderr[-2000:]
    until(lambda: [each.client for each in entry_of(place).leases] == ["loader"], 10, "the trainer has left")
    assert entry_of(place).generation == 2
    with begin(place, path) as training:
        assert training.generation == 3
        assert float(training.model.get_parameter("model.norm.weight").detach().min()) > 0


class TestRefused:
    def test_no_view(self, place: Place, tiny: Path) -> None:
        """By the names of parameters that are none; no generation was made."""
        lost = "model.layers.1.mlp.down_proj.weight"
        with held(place, tiny, lost):
            with pytest.raises(NotShareableError, match=rf"{lost} \(\d+ bytes\) was computed.*CompanionClient.update"):
                begin(place, tiny)
            assert [each.number for each in entry_of(place).generations] == [1]
            assert [lease.client for lease in entry_of(place).leases] == ["loader"]

    def test_another_writer(self, on: tuple[Place, Path]) -> None:
        place, path = on
        with (
            client(place).attach(str(path)) as attachment,
            updating(attachment, "mine", place.settings),
            pytest.raises(EntryInUseError, match="writes the next generation"),
        ):
            begin(place, path)

    def test_no_version(self, place: Place) -> None:
        with pytest.raises(BadRequestError, match="version"):
            trained("m", version="", device="cpu")

    def test_an_engine(self, on: tuple[Place, Path]) -> None:
        """One that cannot take it: what was current is again, and nobody maps what was to be trained."""
        place, path = on
        engine = Rollout(prepare=LayoutError("its kernels use 4 tensors that it has processed for itself"))
        with pytest.raises(FleetError, match="its kernels use 4 tensors"):
            begin(place, path, engine)
        assert "pause" not in engine.told
        assert entry_of(place).generation == 1
        until(lambda: not any(each.pids for each in entry_of(place).generations[1:]), 10, "nobody maps it")

    def test_what_left(self, on: tuple[Place, Path]) -> None:
        """Parameters that were replaced, before and in a step: engines would not get what is written."""
        with begin(*on) as training:
            head = training.model.lm_head
            mine = head.weight
            head.weight = torch.nn.Parameter(mine.detach().clone())
            with pytest.raises(NotSharedError, match=r"lm_head\.weight"), training.step():
                raise AssertionError("it writes")
            head.weight = mine
            with pytest.raises(NotSharedError, match=r"lm_head\.weight"), training.step():
                head.weight = torch.nn.Parameter(mine.detach().clone())
            head.weight = mine
            training.model.lm_head = deepcopy(head)
            with pytest.raises(NotSharedError, match=r"lm_head\.weight"), training.step():
                raise AssertionError("it writes")
            training.model.lm_head = head
            with training.step():
                pass

    def test_another_generation(self, on: tuple[Place, Path]) -> None:
        """Once somebody has rolled back, until it is current again."""
        place, path = on
        with begin(place, path) as training:
            client(place).make_current(str(path), 1)
            with pytest.raises(StaleError, match=r"Generation 2 .* is not current any more: 1 is"), training.step():
                raise AssertionError("it writes")
            client(place).make_current(str(path), 2)
            with training.step():
                pass

    def test_two_steps_at_once_and_after_the_end(self, on: tuple[Place, Path]) -> None:
        training = begin(*on)
        with training.step():
            with pytest.raises(BadRequestError, match="open already"), training.step():
                raise AssertionError("it writes")
            with pytest.raises(BadRequestError, match="open already"):
                training.close()
        training.close()
        training.close()
        with pytest.raises(BadRequestError, match="has ended"), training.step():
            raise AssertionError("it writes")
        assert logits(training.model).isfinite().all()


class TestEngines:
    """What they are told in a step. Their weights are not written here; tests/vllm does that."""

    @pytest.fixture
    def engine(self, on: tuple[Place, Path]) -> Rollout:
        return self.rollout(on[1])

    def rollout(self, path: Path, **faults: Any) -> Rollout:
        return Rollout(Plan(2, "run", 2, "run"), title=f"{path} (target)", **faults)

    def test_pause(self, on: tuple[Place, Path], engine: Rollout) -> None:
        """For each step, with caches reset, and their outputs name it."""
        with begin(*on, engine) as training:
            for number in (1, 2):
                engine.told.clear()
                with training.step():
                    assert engine.is_paused
                    assert engine.told[-1] == "reset_encoder_cache"
                assert not engine.is_paused
                assert engine.told[-4:] == ["switch", "label", "resume", "forget"]
                assert engine.label == f"run+{number}"
                assert training.report is not None
                assert training.report.has_advanced

    def test_resume(self, on: tuple[Place, Path], engine: Rollout) -> None:
        """Whatever fails: before the step nothing is written, in it the report says that weights may be partly new."""
        with begin(*on, engine) as training:
            engine.faults["reset_prefix_cache"] = False
            with pytest.raises(FleetError, match="prefix cache was not reset"), training.step():
                raise AssertionError("it writes")
            assert not engine.is_paused
            assert training.steps == 0
            del engine.faults["reset_prefix_cache"]
            with (
                pytest.raises(FleetError, match=r"in the middle \(ZeroDivisionError: .*partly new") as told,
                training.step(),
            ):
                raise ZeroDivisionError("of the user")
            assert isinstance(told.value.__cause__, ZeroDivisionError)
            assert [each.state for each in told.value.report.engines] == ["unknown"]
            assert not engine.is_paused
            with pytest.raises(KeyboardInterrupt), training.step():
                raise KeyboardInterrupt
            assert not engine.is_paused
            with training.step():
                pass
            assert training.steps == 1

    def test_that_maps_another_one(self, on: tuple[Place, Path], engine: Rollout) -> None:
        """Is refused before anybody pauses: it would not see what is written."""
        with begin(*on, engine) as training:
            engine.plan = Plan(2, "run", 1, "")
            engine.told.clear()
            with pytest.raises(FleetError, match=r"it maps generation 1 of .*, and not 2"), training.step():
                raise AssertionError("it writes")
            assert "pause" not in engine.told
            training.join(engine)
            engine.plan = Plan(2, "run", 2, "run")

    def test_that_are_none_are_refused_before_anything_is_made(self, on: tuple[Place, Path], engine: Rollout) -> None:
        """A generation would stay in memory until the next one is written."""
        for engines in ([3], [engine, engine], "http://127.0.0.1:1"):
            with pytest.raises(SettingsError):
                trained(str(on[1]), engines, version="run", device="cpu", runtime_dir=on[0].settings.runtime_dir)
        assert len(entry_of(on[0]).generations) == 1

    def test_that_joins_again(self, on: tuple[Place, Path], engine: Rollout) -> None:
        """As after it was started anew: it takes part once."""
        with begin(*on, engine) as training:
            training.join(engine)
            engine.told.clear()
            with training.step():
                pass
            assert engine.told.count("prepare") == 1
            assert training.report is not None
            assert len(training.report.engines) == 1

    def test_that_joins_by_another_url(self, on: tuple[Place, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        with begin(*on) as training:
            monkeypatch.setattr("vllm_companion_plugin.fleet.advance", lambda engines, generations: None)
            training.join("http://a:1")
            training.join("http://a:1/")
            assert training._engines == ["http://a:1"]

    def test_one_that_does_not_renew_does_not_send_the_others_back(self, on: tuple[Place, Path]) -> None:
        place, path = on
        good, bad = self.rollout(path), self.rollout(path)
        with begin(place, path, good, bad) as training:
            bad.faults["switch"] = LayoutError("of a worker")
            with pytest.raises(FleetError) as told, training.step():
                pass
            assert [each.state for each in told.value.report.engines] == ["new", "unknown"]
            assert "back" not in good.told + bad.told
            assert not good.is_paused
            assert not bad.is_paused
