"""Metrics: how well an attribution follows the model, and how far attributions agree."""
