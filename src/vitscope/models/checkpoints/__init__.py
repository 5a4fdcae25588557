"""Checkpoints: weights files and folders, read without unpickling and checked before anything is built."""
