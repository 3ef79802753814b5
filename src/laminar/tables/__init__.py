"""Tables and the exact densities of their rows in the user's units."""
