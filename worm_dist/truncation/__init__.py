"""Truncation of frozen channels: their gradients are not sent, their weights held or removed."""
