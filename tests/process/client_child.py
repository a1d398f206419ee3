"""A client in a process of its own, for tests to kill. Prints one line for each event."""

from __future__ import annotations

import sys

from vllm_companion_plugin.client.connection import Granted, connect
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.settings import resolve

name, *options = sys.argv[1:]
connection = connect("cpu", resolve(), spawn="spawn" in options)
print("connected", flush=True)
if "attach" in options:
    key = EntryKey("ab" * 32, "test/model", fields={"dtype": "bfloat16"})
    lease = connection.attach(key, may_load="reader" not in options, client_name=name)
    outcome = lease.wait(30, lambda loader: print("waiting", loader.pid, flush=True))
    print("granted" if isinstance(outcome, Granted) else "ready", flush=True)
if "exit" not in options:
    sys.stdin.read()
