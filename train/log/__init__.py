"""What a run tells: its seconds and its events. Reading a log needs no torch."""
