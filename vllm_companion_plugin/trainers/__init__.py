"""Drop-ins for trainers' frameworks, a file each. A file needs its framework only where it says so, and nothing else of
the project needs a file of these.

May import: client, fleet, training, core, settings, errors.
Of other packages: torch, typing_extensions, trl, verl, ray.
"""
