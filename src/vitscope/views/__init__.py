"""Scenes: what a figure or page shows, as plain data; and their drawing as PNG and HTML."""
