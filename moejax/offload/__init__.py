"""Experts in host memory: which of them are on the device, and which come early."""
