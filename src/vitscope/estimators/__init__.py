"""Estimates from a model's outputs for masks of one image: regressions over segments, and means over masks."""
