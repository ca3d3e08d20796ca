"""The ``ticket`` command: shows, verifies, compares and exports tickets."""
