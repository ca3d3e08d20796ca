"""Physical removal: channels go, the training state stays, the outputs are compared first."""
