"""The engine: search, truncate and draw; its state and its hooks on the training."""
