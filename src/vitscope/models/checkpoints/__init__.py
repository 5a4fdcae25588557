"""Checkpoints: files and folders of weights, read without unpickling and checked before anything is built."""
