"""What survives: the network without its dropped channels, and the training state with it."""
