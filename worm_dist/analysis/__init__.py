"""Analysis of runs from their files, without training."""
