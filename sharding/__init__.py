"""Meshes, named collectives, stored pieces, and the cost of it all."""
