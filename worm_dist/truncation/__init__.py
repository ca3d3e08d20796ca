"""What frozen channels stop doing: sending gradients, moving, or both."""
