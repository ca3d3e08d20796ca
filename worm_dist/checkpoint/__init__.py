"""Checkpoints on disk: a training state that is there whole or not at all, and found again.

It knows nothing of engines, trainers and process groups: a state is nested dicts, lists and tuples
of tensors and plain values.  Nothing that is read is executed.
"""
