"""The checks of launch/doctor.py: what a machine has to do right before a training run is worth starting on it."""
