"""Reports of a run: console, TensorBoard, journal, result file and plots."""
