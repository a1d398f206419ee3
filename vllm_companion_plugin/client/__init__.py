"""What a client of a companion does: connect, attach, publish, mirror what it maps so that the next companion gets it;
and `CompanionClient`, the API.

May import: core, host, wire, memory, tree, fleet, settings, errors.
Of other packages: torch, typing_extensions.
"""
