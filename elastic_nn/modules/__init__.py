"""Elastic operators: layers whose channels, kernels and bits are run-time state."""
