"""The engine: the model, its attention by segments, the head at trained positions, the module."""
