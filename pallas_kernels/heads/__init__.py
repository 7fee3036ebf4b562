"""Heads of queries and keys normalised and rotated in one pass over their joint product."""
