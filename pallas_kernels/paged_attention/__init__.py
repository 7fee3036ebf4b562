"""Attention of one new token a text to the pages of a key-value cache."""
