"""Directions for training behind one call, and bounds of networks."""
