"""The parts of `speed.py`: cells, environments, workers, and the report."""
