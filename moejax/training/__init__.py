"""Training: run directory, checkpoints, reporting, and what else `train.py` is made of."""
