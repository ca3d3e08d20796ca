"""The program around the engine: data, optimizer, training loop, checkpoints, reports."""
