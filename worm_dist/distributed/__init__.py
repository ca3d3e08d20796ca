"""What the ranks agree on: the only ad-hoc collectives."""
