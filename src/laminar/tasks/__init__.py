"""Whole applications, one readable file each."""
