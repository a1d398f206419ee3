"""Synthetic checkpoints: every architecture and format that is tried, with random weights, without a download.

`models` is the table of cases, `architectures` and `transformers_models` write them, and `formats` knows the tensors,
the quantized formats and the tokenizer that they are made of. `copies` copies and changes what was written.
"""
