"""A live attachment: its memory leaves its addresses and comes back, and what is private is renewed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.place import Place, until
from tests.support.publishing import Small, load
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.client.attachment import Attachment
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.errors import ArenaError


@pytest.fixture
def attached(place: Place) -> Iterator[Attachment]:
    """One entry of `Small`, attached as a program does; its loader stays."""
    place.companion()
    with connect("cpu", place.settings, spawn=False) as connection:
        load(connection, Small())
        with CompanionClient("cpu", runtime_dir=place.settings.runtime_dir).attach("test/model") as made:
            yield made


class TestMemory:
    def test_leaves_and_comes_back(self, attached: Attachment) -> None:
        """Tensors view the same addresses, with the same bytes, as often as one likes."""
        tensor = attached.tensors["embed.weight"]
        before, address = tensor.clone(), tensor.data_ptr()
        for _ in range(20):
            attached.unmap()
            attached.map_again()
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, before)

    def test_stays_held_meanwhile(self, attached: Attachment, place: Place) -> None:
        """The companion dies while nothing is mapped: the entry is handed back, and comes back."""
        before = attached.tensors["embed.weight"].clone()
        attached.unmap()
        place.processes[0].kill()
        assert attached.lease.lost.wait(5)
        until(lambda: not attached.lost, 20, "it is handed back")
        attached.map_again()
        assert torch.equal(attached.tensors["embed.weight"], before)

    def test_is_gone_once_it_was_unloaded(self, attached: Attachment, place: Place) -> None:
        """Nobody could map it again, and the error says so."""
        attached.unmap()
        with connect("cpu", place.settings, spawn=False) as connection:
            connection.unload(model="test/model", force=True)
        until(lambda: attached._mirror is not None and attached._mirror.ended, 10, "the client is told")
        with pytest.raises(ArenaError, match=r"test/model .* was unloaded"):
            attached.map_again()


class TestPrivate:
    def test_is_renewed(self, attached: Attachment) -> None:
        """A clone gets the arena's bytes again, whatever was written to it."""
        views, first = attached.views(), attached.manifest.storages[0]
        clone = views.bytes_at(first.offset_bytes, first.size_bytes).clone()
        attached.keep_private([(first.offset_bytes, clone)])
        clone.zero_()
        attached.renew()
        assert torch.equal(clone, views.bytes_at(first.offset_bytes, first.size_bytes))
        assert clone.count_nonzero()
