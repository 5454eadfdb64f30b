"""Training without the usual recipe: other losses, other orders and other starting points."""
