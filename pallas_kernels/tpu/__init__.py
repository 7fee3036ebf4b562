"""What the kernels for TPUs (Pallas, Mosaic TPU) share."""
