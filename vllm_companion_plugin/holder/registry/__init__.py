"""What a companion knows of entries, leases and clients. Pure: no clock, no socket, no thread of its own.

May import: core, errors.
"""
