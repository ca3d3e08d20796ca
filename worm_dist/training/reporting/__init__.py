"""What a run says of itself: console, TensorBoard, journal, result, plots."""
