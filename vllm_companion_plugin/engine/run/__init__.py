"""Engines that others start: to examine a model (`verify`), to fill a companion (`serve MODEL`), to process new weights
(`CompanionClient.update`).
"""
