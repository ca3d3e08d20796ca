"""Gradient reduction: live slices are packed, averaged over the ranks and unpacked."""
