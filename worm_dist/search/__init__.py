"""Search: scores and masks of channels.  Pure functions of tensors, without ranks or files."""
