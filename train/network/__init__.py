"""The network that trains, and what goes with it from step to step."""
