"""Channel groups: the slices of parameters that live and die together."""
