"""Images: reading, conversion to model input, and the way back to the photo."""
