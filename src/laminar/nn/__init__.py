"""Conditioners: networks that map a vector to parameters and know nothing of bijections."""
