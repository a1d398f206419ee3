"""A model as data: capture a module tree, pack its tensors, observe how they came about, and restore another model of
the same kind from them.

May import: core, memory, errors.
Of other packages: torch, numpy.
"""
