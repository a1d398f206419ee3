"""What a companion knows and decides: entries, leases, who owns it, what is due. Pure: no clock, no socket, no thread.

`state.py` decides, with `updates.py` for generations and `sleeping.py` for clients that sleep. `steps.py` carries out
what `table.py` allows, `lifetime.py` and `room.py` know the rules of time and of memory, and observers learn of every
step by `moves.py`.

May import: core, errors.
"""
