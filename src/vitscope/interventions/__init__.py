"""Interventions: run a model without some of its tokens, or without position information."""
