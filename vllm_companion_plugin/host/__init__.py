"""What the processes of one host share: the runtime directory, its locks and notes, and how a process starts a
companion if none answers.

May import: core, errors, settings.
Of other packages: filelock, blake3.
"""
