"""Interventions: a model run with some of its tokens or positions taken away."""
