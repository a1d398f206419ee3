"""A small model, packed and published as the engine that loaded it does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tests.support.place import KEY, Place, until
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Ready, connect
from vllm_companion_plugin.client.publication import Publication
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.layout import layout_digest
from vllm_companion_plugin.core.module_tree import Stage
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import copy, prepare
from vllm_companion_plugin.wire.manifest import manifest_to_bytes

CPU = torch.device("cpu")


class Small(nn.Module):
    """Parameters, a tie, a strided tensor, an fp8 one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 64, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(6, 3).t())
        self.quantized = nn.Parameter(torch.randn(8).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("steps", torch.arange(5))


def publish(publication: Publication, model: nn.Module, device: torch.device = CPU) -> None:
    """On a GPU the model is bound to the arena, which therefore stays mapped."""
    on_gpu = device.type == "cuda"
    kind, stage = (arenas.CUDA_VMM, Stage.PROCESSED) if on_gpu else (arenas.MEMFD, Stage.UNPROCESSED)
    packed = prepare(capture(model), stage, kind, device)
    arena = copy(packed, kind, device, rebind=on_gpu, release=torch.cuda.empty_cache)
    manifest = packed.manifest
    layout = layout_digest(manifest, kind, arena.info.block_sizes)
    publication.publish(arena.info, arena.fds, manifest_to_bytes(manifest), len(manifest.tensors), layout=layout)
    if not on_gpu:
        arena.close()


def load(connection: CompanionConnection, model: nn.Module, device: torch.device = CPU, key: EntryKey = KEY) -> None:
    """Be elected to load `key`, and publish `model` as its weights, for as long as the connection is open."""
    outcome = connection.attach(key, may_load=True, client_name="loader").wait(30)
    assert isinstance(outcome, Granted)
    publish(outcome.publication, model, device)


def hold_zeros(place: Place) -> CompanionClient:
    """A client of the companion of `place`, which holds `Small` of zeros, and nobody who uses it."""
    with connect("cpu", place.settings, spawn=False) as connection:
        model = Small()
        torch.nn.init.zeros_(model.embed.weight)
        load(connection, model)
    client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
    until(
        lambda: not next(each for each in client.status().entries if each.key == KEY).leases, 5, "the loader has left"
    )
    return client


def damage(connection: CompanionConnection) -> None:
    """Publish the only entry anew with other checksums than its bytes have, as if its memory had changed since."""
    lease = connection.attach(may_load=False, client_name="damager")
    ready = lease.wait(30)
    assert isinstance(ready, Ready)
    fds = ready.redeem()
    connection.unload(force=True)
    checksums = replace(ready.arena.checksums, values=tuple(value ^ 1 for value in ready.arena.checksums.values))
    outcome = connection.attach(ready.key, may_load=True, client_name="damager").wait(30)
    assert isinstance(outcome, Granted)
    arena = replace(ready.arena, checksums=checksums)
    outcome.publication.publish(arena, fds, ready.manifest, ready.published.tensor_count)
    fds.close()
