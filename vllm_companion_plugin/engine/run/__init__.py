"""Engines that are started to be looked at or to fill a companion: `verify` and `serve MODEL`."""
