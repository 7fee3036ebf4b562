"""Balance: how many of a batch's assignments each replica of an expert takes."""
