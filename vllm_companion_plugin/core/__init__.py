"""Values and pure rules that every part shares: keys, arenas, models as data, a companion's status, and what every
process of this project needs (logs, output, limits).

May import: core, errors.
"""
