"""Interventions: run a model without some of its tokens, heads or keys, or without position information."""
