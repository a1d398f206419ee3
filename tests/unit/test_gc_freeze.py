"""Freezing of garbage collection while an engine starts, each in a process of its own: it is once a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

BEGIN = """
import gc, threading, types, weakref
from vllm_companion_plugin.core.process import StartFreeze

class Cycle:
    def __init__(self):
        self.me = self

freeze = StartFreeze("vllm")
engine = types.ModuleType("vllm.engine")
exec('''
import gc
def start(do, *args):
    return do(*args)
''', vars(engine))

def lives(reference):
    return reference() is not None

def before_and_in_a_start(during=lambda: None):
    older = Cycle()
    reference = weakref.ref(older)
    freeze.begin()
    del older
    gc.collect()
    during()
    return reference
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


class TestStartFreeze:
    def test_passed_over(self) -> None:
        """As long as a start goes on, a collection leaves alone what was there before, and nothing else."""
        run("""
def during():
    young = Cycle()
    reference = weakref.ref(young)
    del young
    gc.collect()
    assert not lives(reference)
    assert gc.get_freeze_count()
reference = engine.start(before_and_in_a_start, during)
assert lives(reference)
""")

    def test_failed_start(self) -> None:
        """After a start that vLLM did not finish, the first full collection finds all."""
        run("""
reference = engine.start(before_and_in_a_start)
gc.collect(1)
assert lives(reference)
gc.collect()
assert not lives(reference) and not gc.get_freeze_count()
""")

    def test_other_thread(self) -> None:
        """A collection in another thread does not end a start, and a start whose thread is gone does not go on."""
        run("""
def during():
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    assert gc.get_freeze_count()
found = []
thread = threading.Thread(target=lambda: found.append(engine.start(before_and_in_a_start, during)))
thread.start()
thread.join()
assert lives(found[0])
gc.collect()
assert not lives(found[0])
""")

    def test_vllm_has_frozen(self) -> None:
        """What vLLM freezes when it is up stays frozen until vLLM unfreezes."""
        run("""
kept = []
def during():
    kept.extend(Cycle() for _ in range(1000))
    gc.freeze()
reference = engine.start(before_and_in_a_start, during)
gc.collect()
assert lives(reference) and gc.get_freeze_count() > 1000
gc.unfreeze()
gc.collect()
assert not lives(reference)
""")

    def test_once(self) -> None:
        """A second start freezes nothing, and gets rid of what a failed one has left."""
        run("""
reference = engine.start(before_and_in_a_start)
assert lives(reference)
engine.start(freeze.begin)
assert not lives(reference) and not gc.get_freeze_count()
engine.start(freeze.begin)
assert not gc.get_freeze_count()
""")
