"""Edited images: objects are cut out of a photo and pasted back scaled, moved, mirrored or on another background."""
