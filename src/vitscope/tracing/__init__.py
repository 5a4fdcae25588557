"""Running a model under the tap: :func:`~vitscope.tracing.capture.capture` makes a trace, ``check`` verifies it."""
