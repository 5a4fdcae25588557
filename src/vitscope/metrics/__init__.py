"""Metrics: how faithful an attribution is to its model, and how well attributions agree."""
