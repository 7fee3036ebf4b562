"""Kernels: each with a plain-JAX twin, backends tried in order, and its own gradients."""
