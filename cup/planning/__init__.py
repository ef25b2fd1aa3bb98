"""Which channels stay, as plain data, and when to cut."""
