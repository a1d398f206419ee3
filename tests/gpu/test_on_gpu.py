"""What only a GPU can show, besides the arenas' contract and real engines (benchmarks/)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.place import Place, alive, until
from tests.support.publishing import Small, load
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client import peft
from vllm_companion_plugin.client.adapter_leases import AdapterFile
from vllm_companion_plugin.client.adapters import file_of
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.client.mapped import tensors_by_name
from vllm_companion_plugin.core.arena import PIECE_BYTES
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.core.placement import CHUNK_BYTES
from vllm_companion_plugin.engine.vllm.adapters.staging import Staging
from vllm_companion_plugin.errors import CompanionError, IntegrityError
from vllm_companion_plugin.memory.tensors.checksum import Summing
from vllm_companion_plugin.memory.tensors.views import ArenaViews
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.hidden import Known, hidden_tensors, storage_bytes
from vllm_companion_plugin.tree.pack import copy, prepare
from vllm_companion_plugin.wire.manifest import manifest_from_bytes, manifest_to_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

GIB = 1 << 30


def cli(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = place.run("-m", "vllm_companion_plugin.cli.main", *arguments)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def uuid() -> str:
    return CompanionClient().device


def listening(place: Place, device: str) -> bool:
    try:
        with connect(device, place.settings, spawn=False) as connection:
            return connection.status().device == device
    except CompanionError:
        return False


@pytest.fixture
def served(place: Place) -> Iterator[subprocess.Popen[str]]:
    """`vllm-companion serve --device 0`, answering."""
    process = place.run("-m", "vllm_companion_plugin.cli.main", "serve", "--device", "0")
    until(lambda: listening(place, uuid()), 60, "the companion of GPU 0 answers")
    yield process
    process.terminate()
    process.wait(5)


def test_serve_names_the_gpu_by_its_uuid_and_ends_with_its_companion(
    place: Place, served: subprocess.Popen[str]
) -> None:
    (status,) = json.loads(cli(place, "status", "--json").stdout)
    assert status["device"] == uuid()
    assert uuid().startswith("GPU-")
    served.terminate()
    assert served.wait(3) == 0
    until(lambda: not alive(status["pid"]), 3, "the companion is gone")


@pytest.mark.parametrize("device", [None, "all", "uuid"])
def test_serve_finds_the_gpus_by_itself(place: Place, device: str | None) -> None:
    named = [] if device is None else ["--device", uuid() if device == "uuid" else device]
    process = place.run("-m", "vllm_companion_plugin.cli.main", "serve", *named)
    until(lambda: listening(place, uuid()), 60, "the companion of the GPU answers")
    process.terminate()
    assert process.wait(5) == 0


def test_a_gpu_that_is_not_there_is_refused(place: Place) -> None:
    result = cli(place, "serve", "--device", "99")
    assert result.returncode == 2
    assert "99" in result.stderr


def test_doctor_finds_that_the_gpu_shares_memory(place: Place) -> None:
    result = cli(place, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert checks[f"GPU {uuid()}"]["level"] == "ok"
    assert [check for check in checks.values() if check["level"] == "FAIL"] == []


NAMES = """
import json
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.cli.devices import visible_gpus
from vllm_companion_plugin.engine.vllm import devices
print(json.dumps([visible_gpus(), CompanionClient().device, devices.engine_device().id]))
"""


def names(place: Place, visible: str) -> list[str]:
    """UUIDs of the devices seen with CUDA_VISIBLE_DEVICES=`visible`, if all parts agree on the first."""
    place.environment["CUDA_VISIBLE_DEVICES"] = visible
    out, err = place.run("-c", NAMES).communicate(timeout=120)
    gpus, client, engine = json.loads(out.splitlines()[-1]) if out else pytest.fail(err)
    assert client == engine == gpus[0]
    return gpus


def test_a_gpu_has_one_name_however_it_is_made_visible(place: Place) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    everything = names(place, visible)
    assert everything[0] == uuid()
    for index, name in list(zip(visible.split(","), everything, strict=True))[:2]:
        assert names(place, index) == names(place, name) == [name]
    assert names(place, ",".join(reversed(everything))) == everything[::-1]


READER = """
import json, sys
from vllm_companion_plugin import CompanionClient
import torch
with CompanionClient().attach("test/model") as weights:
    tensors = {n: t.cpu().view(torch.uint8).flatten().tolist() if t.is_contiguous() else t.cpu().tolist()
               for n, t in weights.tensors.items()}
    print(json.dumps({"device": str(weights.tensors["embed.weight"].device), "tensors": tensors}))
"""


def test_another_process_maps_the_tensors_of_a_model_by_device_alone(
    place: Place, served: subprocess.Popen[str]
) -> None:
    model = Small().cuda()
    with connect(uuid(), place.settings, spawn=False) as connection:
        load(connection, model, torch.device("cuda", 0))
        reader = place.run("-c", READER)
        out, err = reader.communicate(timeout=120)
        assert reader.returncode == 0, err
    read = json.loads(out)
    assert read["device"] == "cuda:0"
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert read["tensors"].keys() == named.keys()
    for name, tensor in named.items():
        host = tensor.detach().cpu()
        wanted = host.view(torch.uint8).flatten().tolist() if host.is_contiguous() else host.tolist()
        assert read["tensors"][name] == wanted, name


CYCLES = """
import json, os, time, torch
from tests.process.scale_child import usage
from vllm_companion_plugin import CompanionClient

client, measured = CompanionClient(), []
for cycle in range(1, 1001):
    with client.attach("test/model") as weights:
        assert len(weights.tensors) == 300
    if cycle in (100, 1000):
        time.sleep(1)  # what ends in the background has ended
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        measured.append(usage(os.getpid()) | {"free_kb": free >> 10})
print(json.dumps(measured))
"""


def test_a_thousand_attachments_leave_nothing_on_the_gpu_or_beside_it(
    place: Place, served: subprocess.Popen[str]
) -> None:
    model = nn.ModuleList(Small() for _ in range(60)).cuda()
    with connect(uuid(), place.settings, spawn=False) as connection:
        load(connection, model, torch.device("cuda", 0))
        place.environment["MALLOC_ARENA_MAX"] = "2"  # or glibc reserves 64 MiB for a thread now and then
        child = place.run("-c", CYCLES)
        out, err = child.communicate(timeout=150)
        assert child.returncode == 0, err
    early, late = json.loads(out)
    print(early, late)
    assert late["fds"] <= early["fds"]
    assert late["threads"] <= early["threads"]
    assert late["free_kb"] >= early["free_kb"]
    # What allocators keep. 160 bytes a tensor, which PyTorch loses with each array interface, would be 40,000.
    assert late["resident_kb"] <= early["resident_kb"] + 8_000
    assert late["space_kb"] <= early["space_kb"] + 8_000


def test_each_tensor_is_where_it_was_with_elements_or_without() -> None:
    device = torch.device("cuda", 0)
    model = nn.Linear(8, 8, device=device)
    model.indices = nn.Parameter(torch.empty((8, 0), dtype=torch.int32, device=device), requires_grad=False)
    model.on_host = [torch.empty((8, 0)), torch.ones(3)]
    packed = prepare(capture(model), Stage.PROCESSED, arenas.CUDA_VMM, device)
    arena = copy(packed, arenas.CUDA_VMM, device, rebind=False, release=lambda: None)
    manifest = manifest_from_bytes(manifest_to_bytes(packed.manifest))
    found = tensors_by_name(manifest, ArenaViews(arena, arena.info.size_bytes, device))
    where = {name: tensor.device.type for name, tensor in found.items()}
    here = {"weight": "cuda", "bias": "cuda", "indices": "cuda", "on_host[0]": "cpu", "on_host[1]": "cpu"}
    assert where == here
    arena.close()


def test_what_another_stream_has_not_computed_yet_is_waited_for() -> None:
    device = torch.device("cuda", 0)
    for cycles in (1, 1 << 30):  # the first time loads kernels, which would wait for the device; then, half a second
        model = nn.Linear(1024, 1024, bias=False, device=device)
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(cycles)
            model.weight.fill_(5.0)
            packed = prepare(capture(model), Stage.PROCESSED, arenas.CUDA_VMM, device)
            arena = copy(packed, arenas.CUDA_VMM, device, rebind=True, release=lambda: None)
        assert arena.address <= model.weight.data_ptr() < arena.address + arena.info.size_bytes
        assert bool((model.weight == 5.0).all())


FULL = """
import json, torch
from torch import nn
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import copy, prepare
from vllm_companion_plugin.core.module_tree import Stage
device = torch.device("cuda", 0)
free, total = torch.cuda.mem_get_info()
each = 240 << 20
model = nn.ParameterList(
    nn.Parameter(torch.full((each // 2,), i % 100, dtype=torch.bfloat16, device=device), requires_grad=False)
    for i in range(int(0.85 * total) // each)
)
lowest = before = torch.cuda.mem_get_info()[0]
def release():
    global lowest
    lowest = min(lowest, torch.cuda.mem_get_info()[0])
    torch.cuda.empty_cache()
packed = prepare(capture(model), Stage.PROCESSED, arenas.CUDA_VMM, device)
arena = copy(packed, arenas.CUDA_VMM, device, rebind=True, release=release)
right = all(bool((p == i % 100).all()) and arena.address <= p.data_ptr() for i, p in enumerate(model))
print(json.dumps({"weights": arena.info.size_bytes, "total": total, "extra": before - lowest, "right": right}))
"""


def test_a_model_that_fills_85_percent_of_the_gpu_is_packed() -> None:
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", FULL], text=True, capture_output=True, timeout=170)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    print(figures, f"{time.monotonic() - started:.1f} s")
    assert figures["right"]
    assert figures["weights"] > 0.84 * figures["total"]
    assert figures["extra"] <= GIB
    assert figures["extra"] >= CHUNK_BYTES // 2


class Written:
    """Memory where an arena is expected."""

    def __init__(self, words: torch.Tensor) -> None:
        self.words = words
        self.address = words.data_ptr()

    def sums(self) -> tuple[int, ...]:
        views = ArenaViews(self, self.words.nbytes, self.words.device)  # type: ignore[arg-type]
        summing = Summing(views, self.words.nbytes, self.words.device)
        summing.extend(PIECE_BYTES)
        summing.extend(self.words.nbytes)
        return summing.values()


@pytest.mark.parametrize("index", [0, 1])
def test_the_kernel_adds_up_what_torch_does(index: int) -> None:
    """Also on a GPU that is not the current one."""
    if index >= torch.cuda.device_count():
        pytest.skip("one GPU")
    torch.cuda.set_device(0)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, ((3 * PIECE_BYTES + 69 * 4096) // 8,))
    on_host, on_device = Written(words), Written(words.to(f"cuda:{index}"))
    sums = on_device.sums()
    assert len(sums) == 4
    assert sums == on_host.sums()
    for at in (0, PIECE_BYTES // 8 - 1, 2 * PIECE_BYTES // 8 + 4242, words.numel() - 1):
        on_device.words[at] ^= 1 << (at % 63)
        damaged = [piece for piece, pair in enumerate(zip(sums, on_device.sums(), strict=True)) if pair[0] != pair[1]]
        assert damaged == [at * 8 // PIECE_BYTES]
        on_device.words[at] ^= 1 << (at % 63)


def test_the_memory_of_a_model_is_accounted_for_to_the_byte() -> None:
    """What is left over is a tensor that was not found, and then it is searched."""
    from vllm_companion_plugin.engine.vllm import devices

    torch.cuda.init()
    device = devices.engine_device()
    torch.zeros(5, 5, device="cuda") @ torch.zeros(5, 5, device="cuda")  # its workspace stays
    before = devices.requested_bytes(device)
    model = Small().cuda()
    model.view = model.head.weight[1:]
    tree = capture(model)
    assert devices.requested_bytes(device) - before == storage_bytes(tree, "cuda")
    secret = torch.ones(3, device="cuda")
    model.iterator = iter([secret])  # nobody looks into one by attributes
    assert devices.requested_bytes(device) - before - storage_bytes(capture(model), "cuda") == 12
    assert len(hidden_tensors(model, Known.of(tree), "cuda")) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_adapter_leaves_the_gpu_and_comes_back(dtype: torch.dtype | None) -> None:
    """What a trainer publishes from a GPU is what a CPU would publish; an engine's GPU casts it, and nothing else."""
    random = torch.Generator("cuda").manual_seed(0)
    tensors = {
        f"{number}.lora_{side}.weight": torch.randn(16, 4096 + number, device="cuda", generator=random)
        for number in range(200)
        for side in "AB"
    }
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    gpu = torch.device("cuda", 0)
    info, fds = file_of(peft.Adapter(tensors, {"r": 16}), dtype)
    other, others = file_of(peft.Adapter(on_cpu, {"r": 16}), dtype)
    with fds, others:
        assert info == other
        assert os.pread(fds[0], 1 << 20, 0) == os.pread(others[0], 1 << 20, 0)
        for _ in range(3):
            with closing(Staging(AdapterFile(info, fds), gpu, "the adapter")) as staging:
                staged = staging.tensors(tensors, torch.bfloat16, "full")
            for name, tensor in on_cpu.items():
                assert staged[name].is_pinned()
                assert staged[name].pin_memory() is staged[name]
                assert torch.equal(staged[name], tensor.to(torch.bfloat16))
        wrong = replace(info, checksums=replace(info.checksums, values=tuple(v ^ 1 for v in info.checksums.values)))
        with closing(Staging(AdapterFile(wrong, fds), gpu, "the adapter")) as staging, pytest.raises(IntegrityError):
            staging.tensors(tensors, None, "full")
