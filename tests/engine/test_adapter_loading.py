"""What a worker's loading of an adapter makes of vLLM's own, where its device is a GPU; here a CPU computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from vllm_companion_plugin.client import peft
from vllm_companion_plugin.client.adapter_leases import AdapterFile
from vllm_companion_plugin.client.adapters import file_of
from vllm_companion_plugin.core.adapters import Bound, content_of
from vllm_companion_plugin.core.arena import PIECE_BYTES, piece_count
from vllm_companion_plugin.engine.vllm import patches
from vllm_companion_plugin.engine.vllm.adapters import loading, staging
from vllm_companion_plugin.errors import BadRequestError, IntegrityError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.memory.tensors.checksum import Verification

pytestmark = pytest.mark.core

PREFIX = "base_model.model.model.layers.0.self_attn."
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
NUMBER = 5
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def tensors(dtype: torch.dtype = torch.float32, width: int = 32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"{PREFIX}{module}.lora_{side}.weight": torch.randn((4, width) if side == "A" else (width, 4), dtype=dtype)
        for module in ("q_proj", "v_proj")
        for side in "AB"
    }


class Worker:
    """As vLLM's manager of a worker's adapters, which loads from a directory, and one file that a companion has."""

    def __init__(self, file: AdapterFile, device: torch.device, q_outputs: int = 32) -> None:
        self.file, self.fetched = file, 0
        self.options: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16}
        self.kept = loading._Kept(self, device, "full")  # type: ignore[arg-type]
        attention = "model.layers.0.self_attn"
        projections = [f"{attention}.{each}_proj" for each in "qkv"]
        linear = SimpleNamespace(base_layer=SimpleNamespace(input_size=32, output_sizes=[q_outputs, 32, 32]))
        self._adapter_manager = SimpleNamespace(
            modules={f"{attention}.qkv_proj": linear},
            packed_modules={f"{attention}.qkv_proj": projections},
            packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
            model=torch.nn.Module(),
            lora_config=SimpleNamespace(target_modules=None),
        )
        loading._kept[self] = self.kept
        self.load = loading._loading(lambda _, request: self.from_directory(request.lora_path))

    def fetch(self, bound: Bound) -> AdapterFile:
        self.fetched += 1
        return AdapterFile(self.file.info, self.file.fds.dup())

    def from_directory(self, directory: str) -> Any:
        helper = PEFTHelper.from_local_dir(directory, None)
        modules = {"q_proj", "v_proj"}
        return LoRAModel.from_local_checkpoint(
            directory, modules, peft_helper=helper, lora_model_id=NUMBER, **self.options
        )

    def __call__(self) -> dict[str, torch.Tensor]:
        bound = Bound("mine", 1, content_of(self.file.info))
        model = self.load(self, SimpleNamespace(lora_path=bound.path, lora_int_id=NUMBER))
        sides = {"A": "lora_a", "B": "lora_b"}
        return {
            f"base_model.model.{name}.lora_{side}.weight": getattr(lora, attribute)
            for name, lora in model.loras.items()
            for side, attribute in sides.items()
        }


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`verify` of each time something is staged."""
    calls: list[str] = []

    class Staging(staging.Staging):
        def __init__(self, file: AdapterFile, device: torch.device, label: str) -> None:
            assert device == GPU
            super().__init__(file, CPU, label)

        def tensors(self, names: Any, dtype: Any, verify: str) -> Any:
            calls.append(verify)
            return super().tensors(names, dtype, verify)

    monkeypatch.setattr(staging, "Staging", Staging)
    patches.STAGED_ADAPTERS.apply(loading._staging)  # as in a worker; once in a process
    return calls


@pytest.fixture
def published() -> Iterator[Callable[[dict[str, torch.Tensor]], AdapterFile]]:
    files: list[AdapterFile] = []

    def publish(weights: dict[str, torch.Tensor]) -> AdapterFile:
        files.append(AdapterFile(*file_of(peft.Adapter(weights, CONFIG))))
        return files[-1]

    yield publish
    for file in files:
        file.close()


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())


def damaged(file: AdapterFile) -> AdapterFile:
    sums = tuple(value ^ 1 for value in file.info.checksums.values)
    return AdapterFile(replace(file.info, checksums=replace(file.info.checksums, values=sums)), file.fds)


def test_values(staged: list[str], published: Any) -> None:
    """vLLM finds what casting gives, in one piece of memory; once proved, it is not proved again."""
    expected = tensors()
    worker = Worker(published(expected), GPU)
    found = worker()
    check(found, expected)
    assert len({each.untyped_storage().data_ptr() for each in found.values()}) == 1
    check(worker(), expected)
    assert (staged, worker.fetched) == (["full", "off"], 1)


def test_what_is_skipped(staged: list[str], published: Any) -> None:
    """Of what vLLM leaves out, nothing is kept."""
    expected = tensors()
    worker = Worker(published(expected), GPU)
    worker.options["skip_prefixes"] = ["model.layers.0.self_attn.v_proj"]
    names = [name for name in expected if "q_proj" in name]
    found = worker()
    check(found, {name: expected[name] for name in names})


@pytest.mark.parametrize("where", ["layers.0.self_attn", "model.layers.7.self_attn", "model.layers.0.attn"])
def test_modules_that_the_model_does_not_have(where: str, staged: list[str], published: Any) -> None:
    """It is an error each time, and nothing of the adapter is kept."""
    other = {name.replace("model.layers.0.self_attn", where, 1): each for name, each in tensors().items()}
    worker = Worker(published(other), GPU)
    for _ in range(2):
        with pytest.raises(BadRequestError, match=r"mine.*: 2 of its 2 modules have no place in this engine's model"):
            worker()
    assert worker.fetched == 2


def test_another_way(staged: list[str], published: Any) -> None:
    """What is not staged is proved all the same."""
    expected = tensors()
    worker = Worker(published(expected), GPU)
    worker.options["device"] = torch.device("cpu", 0)
    check(worker(), expected)
    worker = Worker(damaged(worker.file), GPU)
    worker.options["device"] = torch.device("cpu", 0)
    with pytest.raises(IntegrityError):
        worker()
    assert staged == []


@pytest.mark.parametrize("pieces", [1, 8, 9, 21])
def test_large(published: Any, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Of any number of pieces, and with tensors that begin in one and end in another."""
    monkeypatch.setattr(staging, "AHEAD", 3)
    monkeypatch.setattr(staging, "THREADS", 2)
    expected = {
        f"{PREFIX}q_proj.lora_A.weight": torch.randn(4, pieces * (PIECE_BYTES >> 4) - 3000),
        f"{PREFIX}q_proj.lora_B.weight": torch.randn(500, 4),
    }
    file = published(expected)
    assert piece_count(file.info.size_bytes) == pieces
    for verify in ("full", "sample", "off"):
        with closing(staging.Staging(file, CPU, "mine")) as its:
            check(its.tensors(expected.keys(), torch.bfloat16, verify), expected)
    staging.Staging(file, CPU, "mine").close()


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_damaged(staged: list[str], published: Any, device: torch.device) -> None:
    """It is an error, and nothing of it is kept."""
    worker = Worker(damaged(published(tensors())), device)
    for _ in range(2):
        with pytest.raises(IntegrityError):
            worker()
    assert worker.fetched == 2


@pytest.mark.parametrize("at", [20, 60])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_damaged_header(staged: list[str], published: Any, device: torch.device, at: int) -> None:
    """What cannot be read, or says something else, is no fault of who published it."""
    file = published(tensors())
    data = bytearray(os.pread(file.fds[0], file.info.size_bytes, 0))
    data[at] ^= 0x10
    fd = os.memfd_create("vllm-companion-damaged", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    with Descriptors([fd]) as fds:
        import fcntl

        from vllm_companion_plugin.memory.kinds.memfd import SEALS

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        worker = Worker(AdapterFile(file.info, fds), device)
        for _ in range(2):
            with pytest.raises(IntegrityError):
                worker()
        assert worker.fetched == 2


def test_the_adapters_fault(staged: list[str], published: Any) -> None:
    worker = Worker(published(tensors() | {f"{PREFIX}o_proj.lora_A.weight": torch.zeros(4, 32)}), GPU)
    with pytest.raises(BadRequestError, match="o_proj") as error:
        worker()
    assert "Adapter mine, generation 1" in str(error.value)


def test_unaligned(staged: list[str], published: Any) -> None:
    """Where a float32 begins between two of its places, vLLM reads the file itself."""
    expected = tensors(width=32)
    expected[f"{PREFIX}q_proj.lora_A.weight"] = torch.randn(3, 32)
    expected[f"{PREFIX}q_proj.lora_B.weight"] = torch.randn(5, 3, dtype=torch.bfloat16)
    worker = Worker(published(expected), GPU, q_outputs=5)
    check(worker(), expected)
    assert worker.kept.fetch(Bound("mine", 1, content_of(worker.file.info)), NUMBER).is_proved


def test_no_room(staged: list[str], published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is full costs time, and nothing else."""
    expected = tensors()
    worker = Worker(published(expected), GPU)

    def failing(error: Exception) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            raise error

        return fail

    for method, error in (("tensors", torch.OutOfMemoryError("full")), ("__init__", staging.CannotStage("full"))):
        monkeypatch.setattr(staging.Staging, method, failing(error))
        worker = Worker(published(expected), GPU)
        check(worker(), expected)
        worker = Worker(damaged(worker.file), GPU)
        with pytest.raises(IntegrityError):
            worker()


def test_nothing_to_lock(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory that there is not is no fault of the adapter."""
    right = torch.empty

    def fail(*args: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return right(*args, **named)

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(staging.CannotStage, match="cannot be page-locked"):
        staging.Staging(published(tensors()), GPU, "mine")


def test_another_failure(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before vLLM has begun: it is told as it is."""
    worker = Worker(published(tensors()), GPU)

    def fail(*_: Any) -> None:
        raise ValueError("no thread")

    monkeypatch.setattr(loading._Fetched, "reading_ahead", fail)
    with pytest.raises(BadRequestError, match=r"^no thread"):
        worker()


def test_a_cpu(staged: list[str], published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads the file itself, after it was proved, once."""
    expected, proofs = tensors(), []
    right = Verification.check
    monkeypatch.setattr(Verification, "check", lambda *args: proofs.append(right(*args)))
    worker = Worker(published(expected), CPU)
    for _ in range(2):
        check(worker(), expected)
    assert (staged, len(proofs)) == ([], 1)
