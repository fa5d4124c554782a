"""Optimal control: linear-quadratic problems, directions, searches, solve."""
