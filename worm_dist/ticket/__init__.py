"""Tickets on disk: the drawn network without its dropped channels."""
