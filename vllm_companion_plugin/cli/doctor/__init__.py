"""`vllm-companion doctor`: what could keep companions and engines from working here."""
