"""Physical removal of channels, with transfer of the training state and a check of the outputs."""
