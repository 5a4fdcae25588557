"""Interventions: run a model with some of its tokens removed, or without its positions."""
