"""Engines that commands start to examine a model or to fill a companion, for `verify` and `serve MODEL`."""
