"""CLS tokens in the windows of a Swin: what they attend to, and a classifier that reads them."""
