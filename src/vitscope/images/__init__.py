"""Images: reading, conversion to model input, and display of results on the original photo."""
