"""A trainer of processed updates: two of them, and a third one that it never finishes.

Arguments: the entry's model, the directory of a checkpoint, and MiB of a chunk. Prints a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from vllm_companion_plugin import CompanionClient


def main() -> None:
    model, directory, chunk_mib = sys.argv[1:]
    weights = load_file(Path(directory, "model.safetensors"))
    client = CompanionClient("cpu", update_chunk_mib=int(chunk_mib))

    def said() -> dict[str, object]:
        (headless,) = [each.process.pid for _, each in client._headless.values()]
        return {"headless": headless}

    for version, values in (("step-1", {name: -tensor for name, tensor in weights.items()}), ("step-2", weights)):
        with client.update(model, version) as new:
            new.load(values)
        print(json.dumps(said() | {"committed": version}), flush=True)
    with client.update(model, "step-3") as new:
        new.load(iter(list(weights.items())[:-1]))
        print(json.dumps(said()), flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
