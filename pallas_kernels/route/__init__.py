"""Route: the best experts of each token, and where assignments lie when sorted by group."""
