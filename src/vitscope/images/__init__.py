"""Images: what is read, how it becomes model input, and the way back to the photo."""
