"""Write the weights of a checkpoint as the next generation of a model, and have running engines take them together.

Usage: python advance.py MODEL CHECKPOINT VERSION URL...
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

from vllm_companion_plugin import CompanionClient

model, checkpoint, version, *engines = sys.argv[1:]
client = CompanionClient()

with client.update(model, version) as new:  # a trainer has a module here, or an iterator of names and tensors
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        new.load(load_file(file))
report = client.advance(model, engines)
for engine in report.engines:
    print(engine)
