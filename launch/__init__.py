"""What a person runs: each script parses, calls down, and returns an exit code."""
