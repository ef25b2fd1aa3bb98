"""What a network is made of: its layers, the channels that they share, and what each call reads and writes."""
