"""What launch/bench.py models runs: other people's networks, their masked twins, and Torch-Pruning beside us."""
