"""Scenes, which describe figures and pages as plain data, and their rendering as PNG and HTML."""
