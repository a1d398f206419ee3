"""Values and pure rules that every part shares: keys, arenas, models as data, what a companion says of itself, and
what any process of ours needs (logs, output, limits).

May import: core, errors.
"""
