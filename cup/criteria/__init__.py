"""Which channel of a group goes first."""
