"""CLS tokens in the windows of a Swin: what they look at, and a classifier that reads them."""
