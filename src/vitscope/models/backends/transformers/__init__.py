"""The backend for transformers."""
