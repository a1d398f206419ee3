"""`python -m vllm_companion_plugin.keeper` runs a keeper."""

import sys

from vllm_companion_plugin.keeper.process import main

if __name__ == "__main__":
    sys.exit(main())
