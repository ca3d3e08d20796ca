"""Forecast of a run without training: channel groups, sizes, traffic and step time."""
