"""Fewer and smaller experts: merging, pruning, sharing, grouping; `python -m moejax.compress`."""
