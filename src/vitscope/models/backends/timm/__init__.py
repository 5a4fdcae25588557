"""The backend for timm."""
