"""The embedded model and the demonstration that serves it."""
