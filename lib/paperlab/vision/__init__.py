"""Vision systems: one module a paper."""
