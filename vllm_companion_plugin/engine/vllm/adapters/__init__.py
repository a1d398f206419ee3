"""Adapters that a companion holds, in vLLM: `requests.py` is what its front ends do, `loading.py` its workers,
`serving.py` its servers of HTTP."""
