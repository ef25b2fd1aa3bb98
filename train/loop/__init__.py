"""The training loop and what looks at every step of it."""
