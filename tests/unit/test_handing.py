"""Tensors that are handed to another process: the pieces, the arenas, and the socket between both."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.support.left import none_left_open
from vllm_companion_plugin import memory
from vllm_companion_plugin.client.handing import Giving, Taking
from vllm_companion_plugin.errors import ArenaError, BadRequestError, ManifestError, UpdateError, WaitTimeoutError
from vllm_companion_plugin.memory.descriptors import Descriptors
from vllm_companion_plugin.wire.handover import Channel, Piece

CPU = torch.device("cpu")
PAGE = memory.granularity(memory.MEMFD, None)

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels = Channel(ours, "the child"), Channel(theirs, "the trainer")
    yield channels
    for channel in channels:
        channel.close()


class Hands:
    """Both ends in one process. What is handed over goes through the socket, with its descriptors."""

    def __init__(self, pair: Pair, size_bytes: int) -> None:
        self.sender, self.receiver = pair
        self.giving = Giving(memory.MEMFD, size_bytes, CPU, self._hand_over)
        self.taking = Taking(CPU)
        self.taken: list[tuple[str, torch.Tensor]] = []
        self.arenas = 0

    def _hand_over(self, pieces: Sequence[Piece], arena: memory.Arena) -> None:
        described = {"kind": arena.info.kind, "block_sizes": arena.info.block_sizes}
        self.sender.send({"pieces": [piece.to_json() for piece in pieces], **described}, arena.fds)
        self.taken += self.taking.take(*self.receiver.receive(5))
        self.arenas += 1

    def message(self, *pieces: Piece) -> tuple[dict[str, object], Descriptors]:
        """As the other process would send it, of an arena of one page."""
        writer = memory.create(memory.MEMFD, PAGE)
        writer.add_block(PAGE)
        with contextlib.closing(writer.seal()) as arena:
            listed = [piece.to_json() for piece in pieces]
            return {"pieces": listed, "kind": memory.MEMFD, "block_sizes": [PAGE]}, arena.fds.dup()


def digest(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class TestTensors:
    def test_arrive(self, pair: Pair) -> None:
        """Of any form, and larger than an arena, in order; changing one after it was given changes nothing."""
        random = torch.Generator().manual_seed(1)
        large = torch.randn(3 * PAGE // 4 + 5, generator=random)
        wanted = {
            "large": large,
            "turned": torch.randn(4, 6, generator=random).t(),
            "quantized": torch.randn(7, generator=random).to(torch.float8_e4m3fn),
            "bfloat": torch.randn(300, generator=random, dtype=torch.bfloat16),
            "number": torch.tensor(7),
            "empty": torch.empty(0, 5),
            "flags": torch.tensor([True, False]),
        }
        with none_left_open():
            hands = Hands(pair, PAGE)
            for name, tensor in wanted.items():
                given = tensor.clone()
                hands.giving.add(name, given)
                given.zero_()
            hands.giving.flush()
            hands.taking.end()
        assert [name for name, _ in hands.taken] == list(wanted)
        for name, found in hands.taken:
            assert found.dtype == wanted[name].dtype
            assert found.shape == wanted[name].shape
            assert digest(found) == digest(wanted[name])
        assert hands.arenas > large.nbytes // PAGE

    @pytest.mark.parametrize("name", ["", "layer." * 100, "\u00fc" * 50], ids=["short", "long", "escaped"])
    def test_many_small_ones_take_several_packets(self, pair: Pair, name: str) -> None:
        hands, count = Hands(pair, 4 << 20), 1200
        for number in range(count):
            hands.giving.add(f"{name}{number}", torch.full((1, 1, 1, 1), number))
        hands.giving.flush()
        assert [(found, int(tensor)) for found, tensor in hands.taken] == [(f"{name}{n}", n) for n in range(count)]
        assert hands.arenas > 1

    def test_forgotten_ones_leave_nothing(self, pair: Pair) -> None:
        with none_left_open():
            hands = Hands(pair, PAGE)
            hands.giving.add("a", torch.ones(3))
            hands.giving.close()
            hands.giving.flush()
        assert (hands.taken, hands.giving.began) == ([], False)


class TestBadPieces:
    @pytest.mark.parametrize(
        ("piece", "error"),
        [
            (Piece("a", "float32", (4,), 4, 0, 12), BadRequestError),  # a gap
            (Piece("a", "float32", (2,), 0, 0, 12), BadRequestError),  # more than the tensor has
            (Piece("a", "float32", (4,), 0, 0, -1), BadRequestError),
            (Piece("a", "float32", (PAGE,), 0, 256, PAGE), ManifestError),  # more than the arena has
            (Piece("a", "nothing", (4,), 0, 0, 16), ManifestError),
        ],
        ids=["gap", "beyond the tensor", "negative", "beyond the arena", "dtype"],
    )
    def test_are_refused(self, pair: Pair, piece: Piece, error: type[Exception]) -> None:
        with none_left_open():
            hands = Hands(pair, PAGE)
            with pytest.raises(error):
                hands.taking.take(*hands.message(piece))

    def test_a_part_alone_is_no_tensor(self, pair: Pair) -> None:
        hands = Hands(pair, PAGE)
        assert hands.taking.take(*hands.message(Piece("a", "float32", (4,), 0, 0, 8))) == []
        with pytest.raises(BadRequestError, match="Of a not all bytes came"):
            hands.taking.end()

    def test_other_descriptors_are_refused(self, pair: Pair) -> None:
        hands = Hands(pair, PAGE)
        message, fds = hands.message(Piece("a", "float32", (4,), 0, 0, 16))
        fds.close()
        with pytest.raises(ArenaError):
            hands.taking.take(message, Descriptors([os.open("/dev/null", os.O_RDONLY)]))


class TestChannel:
    def test_the_end_of_the_other_side_is_an_error(self, pair: Pair) -> None:
        ours, theirs = pair
        theirs.close()
        with pytest.raises(UpdateError, match="the child has ended"):
            ours.receive(5)
        with pytest.raises(UpdateError):
            ours.send({})

    def test_waits_end(self, pair: Pair) -> None:
        with pytest.raises(WaitTimeoutError, match="the child"):
            pair[0].receive(0.01)

    def test_a_process_has_ended_although_a_fork_of_it_has_the_socket(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            code = "import os, time; os.fork() or print('up', flush=True) or time.sleep(60); time.sleep(60)"
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert child.stdout is not None
        channel = Channel(ours, "the child", child.pid)
        child.stdout.readline()
        child.kill()
        try:
            with pytest.raises(UpdateError, match="has ended"):
                channel.receive(5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
            channel.close()
