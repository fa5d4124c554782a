"""Optimizers for training, side by side: `make bench-training`."""
