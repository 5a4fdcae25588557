"""Attention calls, attention weights and the trace of a captured run, independent of any model library."""
