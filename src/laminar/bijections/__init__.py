"""Bijections: exact invertible maps with their log-dets; each file imports lower tiers only."""
