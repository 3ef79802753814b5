"""Pictures of flows and data."""
