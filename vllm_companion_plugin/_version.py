"""The version of this package, for those who may import nothing else of it."""

__version__ = "0.1.0"
