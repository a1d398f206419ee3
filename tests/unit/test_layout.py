"""What may take the place of what: the digest of a layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.publishing import Small
from vllm_companion_plugin import memory as arenas
from vllm_companion_plugin.core.layout import layout_digest
from vllm_companion_plugin.core.module_tree import Manifest, Stage
from vllm_companion_plugin.tree.capture import capture
from vllm_companion_plugin.tree.pack import prepare

BLOCKS = (8192,)


def manifest_of(model: torch.nn.Module) -> Manifest:
    return prepare(capture(model), Stage.PROCESSED, arenas.MEMFD, torch.device("cpu")).manifest


class TestLayout:
    def test_other_values_have_the_same(self) -> None:
        """What the bytes are, what hangs on modules and tensors, and which files were read is the generation's."""
        made = manifest_of(Small())
        other = replace(
            made,
            modules=(replace(made.modules[0], attributes={"scale": "0.25"}), *made.modules[1:]),
            tensors=(replace(made.tensors[0], attributes={"note": "1"}), *made.tensors[1:]),
            files={"config.json": "12"},
        )
        assert layout_digest(other, arenas.MEMFD, BLOCKS) == layout_digest(made, arenas.MEMFD, BLOCKS)
        inline = [
            replace(made, tensors=(replace(made.tensors[0], inline=data), *made.tensors[1:])) for data in (b"a", b"b")
        ]
        assert len({layout_digest(one, arenas.MEMFD, BLOCKS) for one in inline}) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: replace(m, stage=Stage.UNPROCESSED),
            lambda m: replace(m, storages=(replace(m.storages[0], offset_bytes=512), *m.storages[1:])),
            lambda m: replace(m, tensors=(replace(m.tensors[0], dtype="float16"), *m.tensors[1:])),
            lambda m: replace(m, tensors=(replace(m.tensors[0], stride=(1, 64)), *m.tensors[1:])),
            lambda m: replace(m, tensors=(replace(m.tensors[0], private=True), *m.tensors[1:])),
            lambda m: replace(m, modules=m.modules[:-1]),
            lambda m: replace(m, modules=(replace(m.modules[0], class_name="x.Y"), *m.modules[1:])),
        ],
    )
    def test_another_form_has_another(self, change) -> None:  # type: ignore[no-untyped-def]
        made = manifest_of(Small())
        assert layout_digest(change(made), arenas.MEMFD, BLOCKS) != layout_digest(made, arenas.MEMFD, BLOCKS)

    def test_other_blocks_have_another(self) -> None:
        made = manifest_of(Small())
        digests = [layout_digest(made, arenas.MEMFD, BLOCKS), layout_digest(made, arenas.MEMFD, (4096, 4096))]
        digests.append(layout_digest(made, arenas.CUDA_VMM, BLOCKS))
        assert len(set(digests)) == 3
