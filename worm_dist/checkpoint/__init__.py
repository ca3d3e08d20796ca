"""Atomic checkpoints on disk: each is complete or absent, and verified when it is read.

The package is independent of engines, trainers and process groups: a state is nested dicts, lists
and tuples of tensors and plain values.  Nothing that is read is executed.
"""
