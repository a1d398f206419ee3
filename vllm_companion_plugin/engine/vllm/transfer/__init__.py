"""vLLM's weight-transfer backend `companion`: the worker's engine, the trainer's engine, and many engines as one.

No bytes go from one to the other. The trainer writes the next generation into the companions, and names it.
"""
