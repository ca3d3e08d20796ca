"""Training wrappers and their optimizers: DistributedDataParallel, DeepSpeed, a bare module."""
