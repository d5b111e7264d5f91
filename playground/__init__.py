"""The playground: a drawn world, the small text-to-image model trained on it, and the two concepts held out of it."""
