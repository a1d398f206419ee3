"""Threads that a model's code begins while it is loaded: what they do counts as what the loading thread does."""

from __future__ import annotations

import _thread
import multiprocessing.pool
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vllm_companion_plugin.engine.vllm.threads import Threads
from vllm_companion_plugin.tree.notation import of_tensor
from vllm_companion_plugin.tree.observe import Observation

Work = Callable[[], None]


class Subclass(threading.Thread):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def run(self) -> None:
        self._work()


def in_thread(work: Work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)


def in_subclass(work: Work) -> None:
    thread = Subclass(work)
    thread.start()
    thread.join(10)


def in_executor(work: Work) -> None:
    with ThreadPoolExecutor(1) as executor:
        executor.submit(work).result(10)


def by_map(work: Work) -> None:
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda number: work(), range(3)))


def in_pool(work: Work) -> None:
    with multiprocessing.pool.ThreadPool(1) as pool:
        pool.apply(work)


def in_thread_of_a_thread(work: Work) -> None:
    in_executor(lambda: in_thread(work))


WAYS = (in_thread, in_subclass, in_executor, by_map, in_pool, in_thread_of_a_thread)


@pytest.mark.parametrize("begin", WAYS)
def test_it_works_for_the_load(begin: Callable[[Work], None]) -> None:
    """What surrounds the load's work is open there, and closed when the work ends."""
    threads, said = Threads(), []

    @contextmanager
    def around() -> Iterator[None]:
        said.append("open")
        yield
        said.append("closed")

    threads.surround(around)
    with threads.followed():
        begin(lambda: said.append(f"here: {threads.is_here}"))
        assert threads.is_here
    assert [*dict.fromkeys(said)] == ["open", "here: True", "closed"]
    said.clear()
    begin(lambda: said.append(f"here: {threads.is_here}"))
    assert {*said} == {"here: False"}


def test_an_executor_of_before() -> None:
    """Its threads are there already: each task counts, and only those of the load."""
    threads = Threads()
    with ThreadPoolExecutor(1) as executor:
        assert not executor.submit(lambda: threads.is_here).result(10)
        with threads.followed():
            assert executor.submit(lambda: threads.is_here).result(10)
        assert not executor.submit(lambda: threads.is_here).result(10)


def test_threads_of_others() -> None:
    """What a thread begins that does not load is nothing of the load."""
    threads, go, found = Threads(), threading.Event(), []

    def other() -> None:
        go.wait(10)
        in_thread(lambda: found.append(threads.is_here))
        in_executor(lambda: found.append(threads.is_here))

    thread = threading.Thread(target=other)
    thread.start()
    with threads.followed():
        go.set()
        thread.join(10)
    assert found == [False, False]


def test_an_error_reaches_who_waits() -> None:
    threads = Threads()
    with threads.followed(), ThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError):
        executor.submit(lambda: 1 / 0).result(10)


@pytest.mark.parametrize("begin", WAYS)
def test_what_it_writes_is_seen(begin: Callable[[Work], None]) -> None:
    """A parameter that a thread fills is a weight, and a table that it reads counts; no mode of PyTorch is left."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1 << 19), requires_grad=False)
    model.register_buffer("table", torch.ones(1 << 19))
    threads, read = Threads(), torch.ones(1 << 19)
    observation = Observation(model)
    with threads.followed(), observation.watching():
        threads.surround(observation.watching_beside)
        observation.note_read("weight", read)
        begin(lambda: model.weight.data.copy_(read * model.table))
        assert not observation.is_own(model.weight)
        observation.end_loading(model)
    assert observation.is_computed(model.weight)
    assert of_tensor("table") in observation._loaded.modules[""].values
    assert not is_in_torch_dispatch_mode()


def test_a_thread_that_outlives_the_load() -> None:
    """What it does afterwards is nobody's, and kept nowhere."""
    model, threads, go, worked = nn.Linear(4, 4), Threads(), threading.Event(), threading.Event()
    observation = Observation(model)

    def work() -> None:
        assert go.wait(10)
        for _ in range(100):
            torch.ones(3).add(1).tolist()
        worked.set()

    with threads.followed(), observation.watching():
        threads.surround(observation.watching_beside)
        threading.Thread(target=work, daemon=True).start()
        observation.end_loading(model)
    known = len(observation._watch._addresses), len(observation._watch.measured)
    go.set()
    assert worked.wait(10)
    assert (len(observation._watch._addresses), len(observation._watch.measured)) == known


@pytest.mark.parametrize("when", ["before it runs", "while it runs"])
def test_whoever_starts_it_is_interrupted(when: str) -> None:
    """As by SIGTERM or Ctrl-C: that reaches who started it, and the thread goes on."""
    threads, go, began, found = Threads(), threading.Event(), threading.Event(), []

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert super().wait(10)
            assert when != "while it runs" or began.wait(10)
            raise KeyboardInterrupt

        def set(self) -> None:
            super().set()
            assert when == "while it runs" or go.wait(10)

    thread = threading.Thread(target=lambda: (began.set(), found.append(go.wait(10))))
    thread._started = Interrupted()
    with threads.followed():
        with pytest.raises(KeyboardInterrupt):
            thread.start()
        go.set()
        thread.join(10)
    assert found == [True]
    assert "run" not in vars(thread)


def test_a_thread_that_nobody_sees() -> None:
    """A thread that is begun past `threading` is none of the load's: its writes are found by the bytes."""
    threads, done, found = Threads(), threading.Event(), []
    with threads.followed():
        _thread.start_new_thread(lambda: (found.append(threads.is_here), done.set()), ())
        assert done.wait(10)
    assert found == [False]
