"""Capturing and verification: :func:`~vitscope.tracing.capture.capture` returns a trace, ``check`` verifies a model."""
