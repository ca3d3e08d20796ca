"""Which channels matter: tensors in, values out.  Nothing here knows of ranks, hooks or files."""
