"""The engine: search, truncate, draw; its state, and what it hears of the training."""
