"""Chains of stages: control problems and networks, run forward."""
