"""`vllm serve` with the arguments that it is given, in a fork of the nursery."""

from __future__ import annotations

import os
import sys


def main() -> None:
    from vllm.entrypoints.cli.main import main as serve

    os.dup2(2, 1)  # nobody reads its output, which is a pipe
    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    serve()
