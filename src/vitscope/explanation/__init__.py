"""Explanations of predictions: several maps of a photo, with its classes and the agreement of the maps."""
