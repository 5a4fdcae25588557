"""Metrics: how faithful an attribution is to the model, and how well attributions agree."""
