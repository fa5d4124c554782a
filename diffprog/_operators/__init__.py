"""Softmax, softargmax and their derivatives, for any f-divergence."""
