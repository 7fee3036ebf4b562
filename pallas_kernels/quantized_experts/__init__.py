"""Experts with weights of 8 bits and a scale for each block of 128 × 128."""
