"""What the processes of one host share: the runtime directory, its locks and notes, the companion that is started when
nobody answers.

May import: core, errors, settings.
Of other packages: filelock.
"""
