"""Training: sources of batches, the pure step, the loop, and checkpoints."""
