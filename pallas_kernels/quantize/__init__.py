"""Quantize: numbers rounded to 8 or 4 bits in blocks with a scale each, for the wire."""
