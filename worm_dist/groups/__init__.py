"""Channel groups: the parameter slices that are kept or removed together."""
