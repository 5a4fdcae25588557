"""The backend for torchvision."""
