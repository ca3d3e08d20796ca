"""Time, bytes and FLOPs to an accuracy, of whole runs at several link rates."""
