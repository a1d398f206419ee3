"""`vllm-companion doctor` finds faults that could keep companions and engines from working on this host."""
