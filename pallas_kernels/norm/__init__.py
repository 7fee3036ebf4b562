"""RMSNorm of a residual stream's rows, with the sum before it, forward and backward in one pass."""
