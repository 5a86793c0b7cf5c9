"""PyTorch references of the attention family."""
