"""Attention calls, their weights, and the trace of a run that holds them. Knows no model."""
