"""Inside vLLM: the load format `companion`. The only layer that knows vLLM."""
