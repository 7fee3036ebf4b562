"""Gradients, and gathered weights, in fewer bytes: rounded in blocks, sparse, or of low rank."""
