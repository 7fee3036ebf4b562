"""The decoder: attention, blocks, embedding, loss and key-value cache."""
